"""CoCoEdit-JAX: region-regularised reinforcement learning for instruction image editors (arXiv 2602.14068)."""

__version__ = "0.1.0"
