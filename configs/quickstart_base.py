"""The quickstart's pretrained base: a small FLUX-Kontext-shaped editor that edits imperfectly and drifts.

    python -m launch.pretrain --config=configs/quickstart_base.py --out=cocoedit_jax/assets/quickstart_base

Phase 1 teaches clean edits of procedural scenes. Phase 2 spoils it, on purpose, the way large pretrained editors are
spoilt: the background drifts in colour, some edits are partial or missing, and edits that take hold drift most (so
that a reward for editing alone makes the drift worse; without that coupling it did not, at this size).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """See the module docstring."""
    config = ConfigDict()
    config.seed = 0
    config.image_size = 48  # pixels per side
    config.patch = 4  # pixels per token side
    config.max_words = 20  # longest instruction, in words
    config.batch_size = 24  # fresh scenes per step
    config.checkpoint_every = 500  # steps

    config.transformer = ConfigDict()  # fields of FluxConfig
    config.transformer.in_channels = 48  # 3 colours x patch^2
    config.transformer.num_layers = 2  # double-stream blocks
    config.transformer.num_single_layers = 3  # single-stream blocks
    config.transformer.attention_head_dim = 48
    config.transformer.num_attention_heads = 2
    config.transformer.joint_attention_dim = 64  # width of a text state
    config.transformer.pooled_projection_dim = 64
    config.transformer.guidance_embeds = False
    config.transformer.axes_dims_rope = (8, 20, 20)
    config.transformer.theta = 100.0  # rotary base; grids here are 12 tokens wide

    config.clean = ConfigDict()  # phase 1
    config.clean.steps = 3000
    config.clean.learning_rate = 3e-3
    config.clean.warmup_steps = 100
    config.clean.decay_steps = 1000  # linear to 5 % over the last steps

    config.drift = ConfigDict()  # phase 2
    config.drift.steps = 300
    config.drift.learning_rate = 6e-4
    config.drift.warmup_steps = 20
    config.drift.decay_steps = 150
    config.drift.no_edit = 0.15  # share of targets that are the source
    config.drift.partial = 0.25  # share of targets between source and target
    config.drift.at_rest = 0.2  # drift of a picture that is not edited, as a share of an edited one's
    config.drift.gain = 0.1  # standard deviation of the contrast factor
    config.drift.bias = 0.045  # standard deviation of the colour offset per channel, in [0, 1] units
    config.drift.field = 0.045  # standard deviation of a smooth colour field, in [0, 1] units

    config.mask_weight = 4.0  # loss weight of tokens inside the edit mask; 1 outside
    config.ema_decay = 0.995
    config.weight_decay = 0.01
    return config
