"""Post-trains Qwen-Image-Edit-2511, which sees the source image as a clean one (``zero_cond_t``); all else as 2509.

    python -m launch.prepare_data --encode=qwen --model=Qwen/Qwen-Image-Edit-2511 --out=DATA --resolution=512
    python -m launch.train --config=configs/qwen_image_edit_2511.py --config.data.path=DATA \\
        --config.judge.vlm.endpoints=URL

Expected result: unknown; nobody has published one.
"""

from ml_collections import ConfigDict

from configs import qwen_image_edit


def get_config(name: str = "cocoedit") -> ConfigDict:
    """The configuration of preset ``name``."""
    config = qwen_image_edit.get_config(name)
    config.model.path = "Qwen/Qwen-Image-Edit-2511"
    return config
