"""Ops: one file or folder each, found by name. `available_ops()` lists them, `patchkit kernels` shows the backends that would run here."""

from patchkit.kernels.op import Backend, Op, available_ops, op

__all__ = ["Backend", "Op", "available_ops", "op"]
