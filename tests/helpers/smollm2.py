"""The real chat model that the tests use, converted once and kept between runs."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from modelbus_workers.smollm2 import smollm2_folder


@lru_cache(maxsize=1)
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; in ``$MODELBUS_TEST_CACHE`` or ``.cache/models`` of the repository."""
    cache = os.environ.get("MODELBUS_TEST_CACHE") or Path(__file__).parents[2] / ".cache" / "models"
    return smollm2_folder(Path(cache))
