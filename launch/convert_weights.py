"""Converts a model's transformer: diffusers' safetensors to an Orbax checkpoint that restores onto any mesh, and back.

    python -m launch.convert_weights --from=black-forest-labs/FLUX.1-Kontext-dev --to=DIR --to_format=orbax
    python -m launch.convert_weights --from=DIR --to=DIR2 --to_format=diffusers --max_shard_size=5GB

Runs on the CPU and needs memory for the transformer once (in bfloat16 24 GB for FLUX.1, 41 GB for Qwen-Image).
"""

from pathlib import Path

from absl import flags

from launch import command

_FROM = flags.DEFINE_string("from", None, "Model folder, or repository id in the Hugging Face cache.", required=True)
_TO = flags.DEFINE_string("to", None, "Folder to write; it appears when it is complete.", required=True)
_FORMAT = flags.DEFINE_enum("to_format", None, ["orbax", "diffusers"], "What to write.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Cast the weights; default: as stored.")
_SHARD = flags.DEFINE_string("max_shard_size", "5GB", "Largest safetensors file, with --to_format=diffusers.")
_REST = flags.DEFINE_boolean(
    "copy_rest", True, "Also copy the other components: text encoders, VAE, scheduler; editing and training need them."
)


def main(argv: list[str]) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp

    from cocoedit_jax.models.convert import convert, parse_size

    size = convert(
        _FROM.value,
        Path(_TO.value),
        _FORMAT.value,
        dtype=None if _DTYPE.value is None else jnp.dtype(_DTYPE.value),
        max_shard_size=parse_size(_SHARD.value),
        copy_rest=_REST.value,
    )
    print(f"{size / 1e9:.2f} GB of weights in {Path(_TO.value) / 'transformer'}")


if __name__ == "__main__":
    command.run(main)
