import sys

import pytest

from cocoedit_jax.errors import UserError
from torch_bridge import require_torch


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


def test_the_module_is_returned(monkeypatch):
    stand_in = type(sys)("torch")
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    assert require_torch("json") is stand_in
