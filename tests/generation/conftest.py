"""What the tests of generation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def traces_are_freed() -> Iterator[None]:
    """TorchScript keeps the code of every traced model until its process ends: 5 to 10 MB for each of hundreds of tiny models."""
    yield
    torch._C._jit_clear_class_registry()
    torch.jit._state._clear_class_state()
