"""Fixtures around the tiny editor."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
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


@pytest.fixture(scope="session")
def programs_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("xla")


@pytest.fixture
def kept_programs(programs_folder) -> Iterator[None]:
    """Programs that an earlier whole run of these tests compiled are read, as a second start of a command does."""
    kept = {
        "jax_compilation_cache_dir": str(programs_folder), "jax_enable_compilation_cache": True,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in kept}

    def use(settings: dict) -> None:
        compilation_cache.reset_cache()  # JAX looks at these settings once
        for name, value in settings.items():
            jax.config.update(name, value)

    use(kept)
    yield
    use(before)
