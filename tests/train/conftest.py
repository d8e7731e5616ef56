"""Fixtures around the tiny editor."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.models.quickstart import build_editor, save_base
from tests.train.tiny import SIZE, random_params, tiny_config, tiny_quickstart


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(folder, tiny_quickstart(), random_params(build_editor(tiny_quickstart())), {})
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, 40, SIZE, seed=3)
    return folder


@pytest.fixture
def config(tiny_base, tiny_data) -> ConfigDict:
    return tiny_config(tiny_base, tiny_data)
