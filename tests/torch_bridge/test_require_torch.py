import sys
from types import SimpleNamespace

import pytest

from cocoedit_jax.errors import UserError
from torch_bridge import require_torch, torchvision_ops


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    with pytest.raises(UserError, match=r"no_such_package cannot be imported; .*cocoedit-jax\[bridge\]"):
        require_torch("no_such_package")


def test_a_broken_package_is_shown_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_a_package.py").write_text("import its_missing_part")
    with pytest.raises(ModuleNotFoundError, match="its_missing_part"):
        require_torch("half_a_package")


def test_torchvision_of_another_build_is_repaired_first(monkeypatch, tmp_path):
    """The package index's is for CUDA: beside a PyTorch for CPUs its operators do not load, and whoever imports it, as
    transformers does, is stopped by the first that is not declared.
    """
    declared = []
    torch = type(sys)("torch")
    torch.ops = SimpleNamespace(load_library=lambda path: (_ for _ in ()).throw(OSError("libtorch_cuda.so")))
    torch.library = SimpleNamespace(
        Library=lambda name, kind: SimpleNamespace(define=lambda schema: declared.append(f"{name}::{schema}"))
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torchvision_ops, "_ops", [])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").touch()
    (tmp_path / "torchvision/_C.so").touch()
    (tmp_path / "takes_torchvision.py").write_text("import torch\nfound = list(torch.declared)")
    torch.declared = declared
    require_torch("takes_torchvision")
    assert [name.partition("(")[0] for name in sys.modules["takes_torchvision"].found] == [
        "torchvision::nms",
        "torchvision::qnms",
    ]


def test_the_module_is_returned(monkeypatch):
    stand_in = type(sys)("torch")
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    assert require_torch("json") is stand_in
