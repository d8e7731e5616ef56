"""Installs CoCoEdit-JAX: ``pip install -e .``; extras in brackets, as in ``pip install -e '.[test]'``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "cocoedit_jax/__init__.py").read_text())[0]

JUDGE = ["starlette>=1.0,<2", "uvicorn>=0.54,<1", "pydantic>=2.11,<3", "prometheus_client>=0.22,<1"]
BRIDGE = ["diffusers>=0.42,<0.43", "transformers>=5.23,<6", "peft>=0.21,<0.22", "accelerate>=1.15,<2"]
SKIMAGE = "scikit-image>=0.26,<0.27"
RAY = "ray[data]>=2.50,<3"
PARQUET = "pyarrow>=21,<27"  # OmniEdit and ImgEdit come in such files

setup(
    name="cocoedit-jax",
    version=VERSION,
    description="Region-regularised reinforcement learning for instruction image editors, in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["cocoedit_jax*", "launch*", "torch_bridge*"]) + ["configs"],
    package_data={
        "cocoedit_jax": ["assets/**/*", "rewards/prompts/*", "annotation/prompts/*"],
        "launch": ["recipes/*"],
    },
    install_requires=[
        # flax up to 0.12.8 subclasses a class that jax 0.11 no longer has.
        "jax>=0.10.2,<0.11",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "ml_collections>=1.1,<2",
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "httpx2>=2.0,<3",  # the HTTP client that huggingface_hub uses
        "huggingface_hub>=1.0,<3",
        "ml_dtypes>=0.5",
        "numpy>=2.0,<3",
        "matplotlib>=3.11,<4",
        "pillow>=12",
        "scipy>=1.13,<2",
        "safetensors>=0.5",
        "tensorboardX>=2.6.2.2,<3",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "annotate": [SKIMAGE],  # the segmenter random-walker
        "ray": [RAY],
        # Where this fetches a second PyTorch or fails to build, see the README.
        "sam2": ["torch>=2.13,<2.14", "torchvision>=0.28,<0.29", "sam2>=1.1,<2"],
        "parquet": [PARQUET],
        "bridge": ["torch>=2.13,<2.14", *BRIDGE],
        "judge": JUDGE,
        "test": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "ruff>=0.17,<0.18",
            "pyright>=1.1.400",
            "openai>=3.50,<4",  # its types check replies
            "pyyaml>=6,<7",  # and jsonschema: the Kubernetes recipes
            "jsonschema>=4.18,<5",
            SKIMAGE,
            PARQUET,
            RAY,
            "torch==2.13.0",  # parity and golden numbers are compared to the last digits
            *BRIDGE,
            *JUDGE,
        ],
    },
)
