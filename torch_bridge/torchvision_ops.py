"""Keeps torchvision importable where its operators cannot be loaded."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_ops: list[Any] = []  # a torch.library.Library withdraws its operators when it is garbage collected


def repair_torchvision(torch: ModuleType) -> None:
    """Beside a PyTorch for CPUs, the package index's torchvision (built for CUDA) cannot load its operators, and its
    import stops because two of them are not declared; so does every import of transformers, which takes torchvision
    where it is installed. Neither is used here: declaring them is enough. To be called before torchvision is imported.
    """
    if _ops or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    places = (spec.submodule_search_locations if spec is not None else None) or []
    for library in (path for place in places for path in Path(place).glob("_C*.so")):
        try:
            torch.ops.load_library(os.fspath(library))
        except OSError:
            declared = torch.library.Library("torchvision", "DEF")
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            for name in ("nms", "qnms"):
                declared.define(name + arguments)
            _ops.append(declared)
            return
