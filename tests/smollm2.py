"""smollm2, the real pretrained model, for tests that need one: they are skipped only where it is not installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import pytest

from patchkit.models import SMOLLM2, SMOLLM2_COMMAND, ModelUnavailable, load_model, smollm2_gguf


def _is_installed() -> bool:
    try:
        smollm2_gguf()
    except ModelUnavailable:
        return False
    return all(importlib.util.find_spec(package) is not None for package in ("gguf", "accelerate"))


needs_smollm2 = pytest.mark.skipif(not _is_installed(), reason=f"smollm2 is not installed: {SMOLLM2_COMMAND}")


@functools.cache
def load_smollm2() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer: once per process, so a test leaves both as they were."""
    return load_model(SMOLLM2)
