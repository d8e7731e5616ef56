"""One file per command; run as ``python -m launch.NAME``."""
