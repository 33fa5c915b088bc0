"""JSON schemas: valid instances of them, made without any model."""

from __future__ import annotations

from .instances import instance
from .merging import NoInstance

__all__ = ["NoInstance", "instance"]
