"""mlp_int8: int8 weights for the linear layers of the feed-forward blocks, and nothing else.

1. Weights are rounded to int8, symmetric, with one scale per output channel (Dettmers et al. 2022, LLM.int8(),
   https://arxiv.org/abs/2208.07339).
2. Each stays in its `nn.Linear` (or `Conv1D`) as an `Int8Weight`, which runs the op `int8_linear`. Fused experts run the op
   `int8_experts_linear` through transformers' experts interface.
3. Attention, embeddings, the head, routers and norms are not changed: most bytes are in the feed-forward blocks, and rounding harms
   them least. `int8` (`patchkit.patches.int8`) converts attention and the head too.
4. `save_pretrained` writes a torchao checkpoint (`Int8Tensor`), which stock transformers loads. Patching that model takes over the same
   int8 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from patchkit.anatomy.target import Target
from patchkit.definitions import rounded_logits
from patchkit.handle import Handle
from patchkit.int8.find_blocks import Scope, find_blocks
from patchkit.int8.install import install
from patchkit.module_timing import patterns_of
from patchkit.patch import Facts, Patch, Promises, Stage, register_patch


@register_patch("mlp_int8")
@dataclass(frozen=True)
class MLPInt8(Patch):
    """int8 weights for the linear layers of the feed-forward blocks.

    Args:
        mode: "weight_only" keeps activations in floating point; "dynamic" also rounds them to int8, per token; "auto" times both for
            every shape on one row, and takes weight-only, which is more accurate, unless it costs over 30 % more.
        keep_original: keep the floating-point weights for `unpatch_model`. False frees them; `unpatch_model` then raises
            IrreversiblePatch.
        modules: names of the modules to convert, or patterns such as "*.down_proj"; None for all that are found.
        min_snr: leave out a module whose output on the calibration text has a signal-to-noise ratio below this, in dB.
        calibration: token ids [T] or [B, T] on which that ratio is measured; None for 64 random tokens.
        strict: raise `SlowerPatch` where the patch is slower than the original; otherwise warn.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.WEIGHTS
    facts = Facts(
        goal="fewer bytes per token",
        exact="no: weights are rounded; the signal-to-noise ratio of each module is in the report",
        cost="none at run time; patching times itself, and warns where it is slower. With `keep_original=False` it cannot be undone",
        source="[torchao](https://github.com/pytorch/ao) (format); Dettmers et al. 2022, "
        "[2208.07339](https://arxiv.org/abs/2208.07339) (why not attention)",
    )

    scope: ClassVar[Scope] = "mlp"

    mode: Literal["auto", "weight_only", "dynamic"] = "auto"
    keep_original: bool = True
    modules: tuple[str, ...] | None = None
    min_snr: float | None = None
    calibration: Any = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "weight_only", "dynamic"):
            raise ValueError(f"mode={self.mode!r}: give 'auto', 'weight_only' or 'dynamic'")
        object.__setattr__(self, "modules", patterns_of(self.modules))
        if self.min_snr is not None and (isinstance(self.min_snr, bool) or not isinstance(self.min_snr, int | float)):
            raise ValueError(f"min_snr={self.min_snr!r}: give decibels such as 30, or None")
        for name in ("keep_original", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.calibration is not None:
            try:
                ids = torch.as_tensor(self.calibration)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"calibration={self.calibration!r} ({error}): give token ids [T] or [B, T]") from None
            if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.numel() == 0:
                raise ValueError(f"calibration of shape {tuple(ids.shape)} and dtype {ids.dtype}: give token ids [T] or [B, T]")

    @property
    def irreversible(self) -> bool:
        return not self.keep_original

    def promises(self, target: Target) -> Promises:
        return Promises(definition=rounded_logits, rounds=True)

    @classmethod
    def candidates(cls, target: Target) -> list[MLPInt8]:
        return [cls(mode=mode) for mode in ("auto", "dynamic", "weight_only")]

    def check(self, target: Target) -> None:
        find_blocks(target, self.modules, self.scope)

    def apply(self, target: Target, handle: Handle) -> None:
        install(target, handle, self, find_blocks(target, self.modules, self.scope))
