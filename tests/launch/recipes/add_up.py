"""A command for launchers to start in the trainer's place: joins the others and adds over all devices."""

from absl import flags

from launch import command, distributed

_ADD = flags.DEFINE_integer("add", 0, "Added by every device.")


def main(argv: list[str]) -> None:
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    mine = np.full(jax.local_device_count(), _ADD.value + jax.process_index(), np.float32)
    values = multihost_utils.host_local_array_to_global_array(mine, mesh, PartitionSpec("all"))
    add = jax.shard_map(
        lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec()
    )
    total = jax.jit(add)(values)
    print(f"sum {float(np.asarray(total.addressable_data(0))[0]):g} of {jax.process_count()} processes", flush=True)


if __name__ == "__main__":
    command.run(main, setup=distributed.initialize)
