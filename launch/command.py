"""What every command does: bad input ends in one line that says what is wrong, and compiled programs are kept."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding.chips import GPU_SHARE

_CACHE = flags.DEFINE_string(
    "xla_cache", "~/.cache/cocoedit_jax/xla",
    "Folder of compiled programs, so that a second start compiles nothing; 'off': none. The environment variable "
    "JAX_COMPILATION_CACHE_DIR comes before the default. Whatever is in there may be deleted.",
)  # fmt: skip


def keep_compiled_programs() -> None:
    """Tells JAX to keep every program that it compiles, unless ``--xla_cache=off``."""
    if _CACHE.value == "off":  # also where JAX_COMPILATION_CACHE_DIR is set, which JAX itself reads
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_enable_compilation_cache", False)
        return
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    settings = {
        "jax_compilation_cache_dir": folder if folder and not _CACHE.present else _CACHE.value,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    settings["jax_compilation_cache_dir"] = str(Path(settings["jax_compilation_cache_dir"]).expanduser().absolute())
    if "jax" in sys.modules:  # and has read its environment
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, value)
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})


def give_simulated_devices_threads() -> None:
    """Lets the simulated devices of ``--xla_force_host_platform_device_count`` run on eight threads each.

    An exchange that waits for other devices holds a thread, and a device may wait in several at once. XLA's own number
    is the larger of cores and devices: there they all wait sooner or later, and after 40 s it ends the process.
    """
    if forced := re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")):
        os.environ.setdefault("PJRT_NPROC", str(max(8 * int(forced[1]), os.cpu_count() or 1)))


def give_jax_the_gpus() -> None:
    """Lets JAX use ``GPU_SHARE`` of a GPU's memory, unless the environment says what it may: its own default is 75 %.

    Must come before JAX starts. JAX refuses a process where both names of the share are set.
    """
    said = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR")
    shares_gpus = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    if not shares_gpus and not any(os.environ.get(name) for name in said):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(GPU_SHARE)


def _parse(argv: list[str]) -> list[str]:
    """The command line, with configuration files loaded. Faults of either end the program."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # ml_collections puts the whole traceback of a configuration file into the message; its end says what is wrong.
        first, *rest = [line for line in str(error).splitlines() if line.strip()]
        last = rest[-1].rpartition("errors.UserError: ")[2] if rest else ""
        sys.exit(f"error: {first.removesuffix(' Error whilst parsing config file:')} {last}".rstrip())
    except UserError as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections raises these for overrides and files that do not fit, with what was looked for in the text.
        missing = error.args[0] if error.args and isinstance(error.args[0], KeyError) else None
        if missing is not None:  # 'learning_rat' <newline> Did you mean "learning_rate" instead of "learning_rat"?
            sys.exit(f"error: --config: there is no key {'; '.join(str(missing.args[0]).splitlines())}")
        sys.exit(f"error: --config: {error}")


def run(main: Callable[[list[str]], None], setup: Callable[[], None] | None = None, *, jax_only: bool = False) -> None:
    """Runs ``main`` as absl does; its UserErrors and stops by non-finite numbers become one message and exit code 1.

    Args:
        main: what the command does.
        setup: called before it, with flags parsed: ``distributed.initialize`` for what runs on several hosts.
        jax_only: nothing else in this process, such as PyTorch, uses the GPUs: see ``give_jax_the_gpus``.
    """

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {argv[1:]}; options are written --name=value")
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
        keep_compiled_programs()
        give_simulated_devices_threads()
        if jax_only:
            give_jax_the_gpus()
        try:
            if setup is not None:
                setup()
            main(argv)
        except OSError as error:
            # A configuration file that is not there is reported by ml_collections when it is first used.
            if not str(error).startswith("Configuration is not available"):
                raise
            sys.exit(f"error: --config: {str(error).strip().splitlines()[-1].strip()}")
        except (UserError, FloatingPointError) as error:
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=_parse)
