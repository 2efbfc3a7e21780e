"""Ops: one file each, found by folder. `patchkit.kernels.available_ops()` lists them, `patchkit kernels` shows what would run here."""

from patchkit.kernels.op import Backend, Op, available_ops, op

__all__ = ["Backend", "Op", "available_ops", "op"]
