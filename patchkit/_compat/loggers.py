"""Loggers of other libraries."""

from __future__ import annotations

from patchkit._compat.declared import Names

RELIED_ON: Names = {"torch.utils:_pytree": None}

# transformers imports torchao where it is installed, and these then say which of its CUDA libraries did not load.
LOUD_AT_IMPORT = ("torchao", "torch.utils._pytree")
