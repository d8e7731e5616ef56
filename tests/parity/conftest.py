"""Fixtures that skip where PyTorch's side is not installed."""

from collections.abc import Callable, Iterator

import pytest

from tests.parity.flux_cases import Case, draw_case
from tests.parity.lora_cases import LATENT_CHANNELS
from tests.parity.transformer_cases import NUM_CASES


@pytest.fixture(scope="session")
def torch_side() -> None:
    for package in ("torch", "diffusers", "peft"):
        pytest.importorskip(package, reason=f"parity tests compare with PyTorch; {package} is not installed")


@pytest.fixture(params=range(NUM_CASES))
def case(request: pytest.FixtureRequest, torch_side: None) -> Case:
    """One of the run's random models, fresh."""
    return draw_case(request.param)


@pytest.fixture
def one_case(torch_side: None) -> Case:
    """A model with all parts, for what need not be tried on many."""
    return draw_case(2)


@pytest.fixture
def double_blocks(torch_side: None) -> Case:
    """A Kontext model that diffusers can read in every format."""
    return draw_case(3, in_channels=4 * LATENT_CHANNELS, num_layers=2, num_single_layers=0)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, torch_side: None) -> Iterator[Callable[[], list[str]]]:
    """diffusers' warnings: it logs keys that it does not use, and goes on."""
    from diffusers.utils import logging

    logging.enable_propagation()
    logging.disable_default_handler()
    expected = "prefix='text_encoder'"  # logged for every file that adapts the transformer alone
    yield lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith(("diffusers", "peft")) and expected not in record.getMessage()
    ]
    logging.disable_propagation()
    logging.enable_default_handler()
