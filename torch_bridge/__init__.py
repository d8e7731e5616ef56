"""Everything that needs PyTorch; the training side never imports it."""

import importlib
from types import ModuleType

from cocoedit_jax.errors import UserError
from torch_bridge.torchvision_ops import repair_torchvision


def require_torch(*packages: str) -> ModuleType:
    """The module ``torch``, after making sure that it and ``packages`` (such as "diffusers") can be imported.

    Raises:
        UserError: one line naming the packages that are missing and how to install them.
    """
    missing = []
    for name in ("torch", *packages):
        try:
            module = importlib.import_module(name)
            if name == "torch":
                repair_torchvision(module)
        except ModuleNotFoundError as error:
            # A package that is there but lacks one of its own parts is another fault, and is shown as it is.
            if error.name != name.partition(".")[0]:
                raise
            missing.append(name)
    if missing:
        names = " and ".join(missing)
        raise UserError(f"{names} cannot be imported; install with: pip install 'cocoedit-jax[bridge]'")
    return importlib.import_module("torch")
