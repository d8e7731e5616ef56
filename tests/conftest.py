"""Eight CPU devices and strict dtype promotion for every test; set before JAX is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# The programs of the tests are tiny and run once or twice: compiling them is what takes time. The older emitters of
# fused loops take half of it.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",  # 40 s otherwise: a busy machine is no failure
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

os.environ["PJRT_NPROC"] = "64"  # see give_simulated_devices_threads in launch/command.py
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # nothing of a test outlives it

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
