"""What every command does with bad input: one line that says what is wrong, instead of a traceback."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from cocoedit_jax.errors import UserError


def _parse(argv: list[str]) -> list[str]:
    """The command line, with configuration files loaded. Faults of either end the program."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {error}\nPass --help for the options.")
    except UserError as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections raises these for overrides and files that do not fit, with what was looked for in the text.
        sys.exit(f"error: --config: {error}")


def run(main: Callable[[list[str]], None]) -> None:
    """Runs ``main`` as absl does; its UserErrors and stops by non-finite numbers become one message and exit code 1."""

    def guarded(argv: list[str]) -> None:
        if len(argv) > 1:
            sys.exit(f"error: unexpected arguments {argv[1:]}; options are written --name=value")
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
        try:
            main(argv)
        except (UserError, FloatingPointError) as error:
            sys.exit(f"error: {error}")

    app.run(guarded, flags_parser=_parse)
