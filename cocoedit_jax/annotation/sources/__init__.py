"""Data sets and folders as items to annotate: what is at a path, and how it is read."""

from cocoedit_jax.annotation.sources.detect import FORMATS, detect, read_items, unpack_source

__all__ = ["FORMATS", "detect", "read_items", "unpack_source"]
