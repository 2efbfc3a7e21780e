"""Reasons to refuse a call that several ops share. Those of Triton are in `patchkit.kernels.triton`."""

from __future__ import annotations

from typing import Any

import torch


def not_on_cpu(x: torch.Tensor, *rest: Any) -> str | None:
    """Reason why a CPU backend cannot serve x, or None."""
    return None if x.is_cpu else f"{x.device.type} tensors: it is for a CPU"
