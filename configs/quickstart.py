"""Post-trains the quickstart's small editor on procedural scenes: the paper's effect in minutes on a laptop.

    python -m launch.train --config=configs/quickstart.py
    python -m launch.train --config=configs/quickstart.py:cocoedit-routed      # another preset

Presets: cocoedit (default), cocoedit-official, cocoedit-corrected, cocoedit-routed, edit-r1, diffusion-nft.
Expected result: the table in README.md, made by
``python -m launch.compare --config=configs/quickstart.py --presets=... --seeds=0,1,2``.
"""

from ml_collections import ConfigDict

from cocoedit_jax.nft.presets import preset

# These settings are the same for all presets, so that a comparison varies the objective alone. In particular
# cocoedit-official here has its formulas, and not the released ban, EMA, KL or number of timesteps.
#
# The strengths that the presets leave to the model and the latent space: here pixels in [-1, 1], 6 sampler steps and
# tens of optimizer steps instead of hundreds. Chosen on scenes that no table uses.
TUNED = {
    "cocoedit": {"lambda_ner": 3.0, "lambda_er": 1.0},
    "cocoedit-official": {"lambda_ner": 3.0, "lambda_er": 1.0},
    "cocoedit-corrected": {"lambda_ner": 8.0, "lambda_er": 5.0},
    "cocoedit-routed": {},
    "edit-r1": {},
    "diffusion-nft": {},
}


def get_config(name: str = "cocoedit") -> ConfigDict:
    """The configuration of preset ``name``."""
    config = ConfigDict()
    config.preset = name
    config.seed = 0

    config.model = ConfigDict()
    config.model.kind = "quickstart"
    config.model.path = ""  # folder of a base; empty: the one that ships with the package
    config.model.remat = "none"  # what the backward pass recomputes, rising: none, dots, attention, full, offload
    config.model.attention = "auto"  # auto, xla, blocked, cudnn (GPU), splash (TPU), ulysses, ring (mesh.context)
    config.model.quantize = ""  # frozen base in 8 bits: int8, int8_weights (memory only), fp8; empty: it is not

    config.data = ConfigDict()
    config.data.path = ""  # metadata.jsonl, images/, masks/ (white where to keep); empty: scenes, drawn into data/
    config.data.generate = 1500  # scenes to draw where the path is empty
    config.data.resolution = 48  # pixels
    config.data.crop = "center"  # center, or buckets (keeps the aspect ratio)
    config.data.held_out = 0.2  # share of the records kept for evaluation
    config.data.strict = False  # refuse a folder with a faulty record, instead of skipping the record

    config.rollout = ConfigDict()
    config.rollout.groups = 6  # records per optimizer step
    config.rollout.group_size = 8  # edits per record
    config.rollout.batch_size = 24  # edits sampled at once
    config.rollout.steps = 6  # sampler steps
    config.rollout.solver = "dpm2"  # dpm2, euler, ddim, dpm1
    config.rollout.refill = 0  # rounds in which groups that teach nothing are replaced by further records
    config.rollout.layout = ""  # of sampling alone, such as "fsdp_tensor:tensor=4"; empty: config.mesh
    config.rollout.quantize = ""  # of sampling alone, with a base of its own in memory; empty: config.model

    config.train = ConfigDict()
    config.train.steps = 80  # optimizer steps
    config.train.micro_batch = 24  # samples per forward and backward
    config.train.learning_rate = 2.5e-3
    config.train.weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.layout = ""  # of the optimizer step alone; empty: config.mesh
    config.train.quantize = ""  # of the optimizer step, and of evaluations; empty: config.model
    config.train.adapters = "replicated"  # adapters and optimizer state; sharded: over the fsdp axis

    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 32  # the adapter counts alpha / rank times

    config.algorithm = ConfigDict(preset(name).to_dict())
    # One timestep per sample: new rollouts are worth more than more timesteps of the same ones.
    config.algorithm.timestep_fraction = 0.17
    config.algorithm.timestep_choice = "stratified"
    config.algorithm.train_at_pure_noise = True  # of six sampler steps, the first is too many to leave out
    config.algorithm.ban = False  # six groups of eight are too few to throw any away
    config.algorithm.kl_weight = 0.0  # a third forward per timestep for a weight of 1e-4
    config.algorithm.ema_decay = 0.9  # a short run at a high learning rate ends on noisy weights; the same for all
    config.algorithm.update(TUNED.get(name, {}))

    config.judge = ConfigDict()
    config.judge.name = "scenes"

    config.mesh = ConfigDict()  # how work is split over devices
    config.mesh.layout = "replicated"  # replicated, fsdp, data_fsdp, tensor, fsdp_tensor, fsdp_context
    config.mesh.data = 0  # devices on an axis; -1: all that are left; 0: as the layout says
    config.mesh.fsdp = 0
    config.mesh.context = 0
    config.mesh.tensor = 0

    config.evaluation = ConfigDict()
    config.evaluation.scenes = 256  # held-out records, before and after
    config.evaluation.batch_size = 32
    config.evaluation.every = 20  # optimizer steps between small evaluations
    config.evaluation.every_scenes = 64
    config.evaluation.steps = 6  # sampler steps
    config.evaluation.solver = "dpm2"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # optimizer steps
    config.checkpoint.keep = 2

    config.max_unscored = 0.5  # stop when more than this share of a step's samples could not be scored
    return config
