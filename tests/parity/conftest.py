"""Fixtures that skip where PyTorch's side is not installed."""

import pytest

from tests.parity.flux_cases import NUM_CASES, Case, draw_case


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
