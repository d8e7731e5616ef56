"""Post-trains FLUX.1 Kontext-dev on a CoCoEdit-40K-style folder, with the released hyperparameters.

    python -m launch.prepare_data --encode=flux --model=black-forest-labs/FLUX.1-Kontext-dev --out=DATA
    python -m launch.train --config=configs/flux_kontext.py --config.data.path=DATA --config.judge.vlm.endpoints=URL

Presets as in the quickstart: configs/flux_kontext.py:cocoedit-official and so on. 24 groups of 12 edits per optimizer
step; at 512 px a sample costs 31.4 TFLOP per forward pass. Expected result (paper, 1000 steps, GEdit-Bench): score
6.286 -> 6.939, PSNR outside the mask 24.17 -> 25.33 dB; not reproduced yet.
"""

from ml_collections import ConfigDict

from cocoedit_jax.nft.presets import preset
from configs.vlm_judge import vlm_judge

# What the released Kontext configuration has besides the preset.
RELEASED = {
    "cocoedit": {"lambda_ner": 0.02, "lambda_er": 0.02},
    "cocoedit-official": {"lambda_ner": 0.02, "lambda_er": 0.02, "reward_weights": {"judge": 0.9, "pixel": 0.1}},
    "cocoedit-corrected": {"lambda_ner": 0.02, "lambda_er": 0.02},
}


def get_config(name: str = "cocoedit") -> ConfigDict:
    """The configuration of preset ``name``."""
    config = ConfigDict()
    config.preset = name
    config.seed = 0

    config.model = ConfigDict()
    config.model.kind = "flux_kontext"
    config.model.path = "black-forest-labs/FLUX.1-Kontext-dev"  # folder in diffusers' layout, or a cached repository
    config.model.dtype = "bfloat16"  # of the transformer's weights and activations
    config.model.text_tokens = 128  # T5 tokens of an instruction, as the text cache was made; stock inference has 512
    config.model.guidance = 2.5  # embedded guidance scale
    config.model.vae_dtype = "float32"  # of the autoencoder
    config.model.vae_tile = 0  # pixels: decode larger pictures in tiles of this size; 0: exactly
    config.model.remat = "full"  # what the backward pass recomputes, rising: none, dots, attention, full, offload
    config.model.attention = "auto"  # auto, xla, blocked, cudnn (GPU), splash (TPU), ulysses, ring (mesh.context)
    config.model.quantize = ""  # frozen base in 8 bits: int8, int8_weights (memory only), fp8; empty: it is not

    config.data = ConfigDict()
    config.data.path = "data/cocoedit-40k"  # metadata.jsonl, images/, masks/; masks are white where to keep
    config.data.generate = 0  # scenes to draw where the path is empty
    config.data.resolution = 512  # pixels
    config.data.crop = "center"  # center, or buckets (keeps the aspect ratio)
    config.data.held_out = 0.01  # share of the records kept for evaluation
    config.data.strict = False  # refuse a folder with a faulty record, instead of skipping the record

    config.rollout = ConfigDict()
    config.rollout.groups = 24  # records per optimizer step
    config.rollout.group_size = 12  # edits per record
    config.rollout.batch_size = 24  # edits sampled at once, over all devices
    config.rollout.steps = 10  # sampler steps
    config.rollout.solver = "dpm2"  # dpm2, euler, ddim, dpm1
    config.rollout.refill = 0  # rounds in which groups that teach nothing are replaced by further records
    config.rollout.layout = ""  # of sampling alone, such as "fsdp_tensor:tensor=4"; empty: config.mesh
    config.rollout.quantize = ""  # of sampling alone, with a base of its own in memory; empty: config.model

    config.train = ConfigDict()
    config.train.steps = 1000  # optimizer steps
    config.train.micro_batch = 24  # samples per forward and backward, over all devices: 3 on each of 8
    config.train.learning_rate = 3e-4
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.layout = ""  # of the optimizer step alone; empty: config.mesh
    config.train.quantize = ""  # of the optimizer step, and of evaluations; empty: config.model
    config.train.adapters = "replicated"  # adapters and optimizer state; sharded: over the fsdp axis

    config.lora = ConfigDict()
    config.lora.rank = 32
    config.lora.alpha = 64  # the adapter counts alpha / rank times

    config.algorithm = ConfigDict(preset(name).to_dict())
    config.algorithm.update(RELEASED.get(name, {}))

    config.judge = ConfigDict()
    config.judge.name = "vlm"  # a registered judge, or MODULE:NAME of your own (CONTRIBUTING.md, "Add a judge")
    config.judge.vlm = vlm_judge()

    config.mesh = ConfigDict()  # how work is split over devices
    config.mesh.layout = "replicated"  # replicated, fsdp, data_fsdp, tensor, fsdp_tensor, fsdp_context
    config.mesh.data = 0  # devices on an axis; -1: all that are left; 0: as the layout says
    config.mesh.fsdp = 0
    config.mesh.context = 0
    config.mesh.tensor = 0

    config.evaluation = ConfigDict()
    config.evaluation.scenes = 64  # held-out records, before and after
    config.evaluation.batch_size = 8
    config.evaluation.every = 30  # optimizer steps between small evaluations
    config.evaluation.every_scenes = 16
    config.evaluation.steps = 20  # sampler steps
    config.evaluation.solver = "euler"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 30  # optimizer steps
    config.checkpoint.keep = 2

    config.max_unscored = 0.1  # stop when more than this share of a step's samples could not be scored
    return config
