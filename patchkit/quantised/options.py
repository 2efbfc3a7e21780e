"""The options that all patches have which quantise weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from patchkit.anatomy.target import Target
from patchkit.handle import Handle
from patchkit.module_timing import patterns_of
from patchkit.patch import Patch, Stage
from patchkit.quantised.find_blocks import SCOPES, Scope, find_blocks
from patchkit.quantised.install import install
from patchkit.quantised.scheme import Scheme


@dataclass(frozen=True)
class QuantisedWeights(Patch):
    """Weights of few bits for linear layers; a subclass says in which form by its `scheme`.

    Args:
        mode: "weight_only" keeps activations in floating point; "dynamic" also rounds them to int8; "auto" times both for every shape on
            one row, and takes weight-only, which is more accurate, unless it costs over 30 % more.
        keep_original: keep the floating-point weights for `unpatch_model`. False frees them; `unpatch_model` then raises
            IrreversiblePatch.
        modules: names of the modules to convert, or patterns such as "*.down_proj"; None for all that are found.
        min_snr: leave out a module whose output on the calibration text has a signal-to-noise ratio below this, in dB.
        calibration: token ids [T] or [B, T] on which that ratio is measured; None for 64 random tokens.
        strict: raise `SlowerPatch` where the patch is slower than the original; otherwise warn.
        view: keep the floating-point weights in their modules, trainable, and the quantised ones beside them: only forwards without
            gradients run over these, in training mode only those with a cache, as of `generate`. They follow the weights before the next
            prompt. Layers with weights of another library, and fused experts, are left alone.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.WEIGHTS
    acts = ("forwards",)
    scope: ClassVar[Scope] = "mlp"

    mode: Literal["auto", "weight_only", "dynamic"] = "auto"
    keep_original: bool = True
    modules: tuple[str, ...] | None = None
    min_snr: float | None = None
    calibration: Any = None
    strict: bool = False
    view: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "weight_only", "dynamic"):
            raise ValueError(f"mode={self.mode!r}: give 'auto', 'weight_only' or 'dynamic'")
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r}: give one of {', '.join(map(repr, SCOPES))}")
        object.__setattr__(self, "modules", patterns_of(self.modules))
        if self.min_snr is not None and (isinstance(self.min_snr, bool) or not isinstance(self.min_snr, int | float)):
            raise ValueError(f"min_snr={self.min_snr!r}: give decibels such as 30, or None")
        for name in ("keep_original", "view", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.view and not self.keep_original:
            raise ValueError("view=True keeps the floating-point weights, and keep_original=False frees them: leave one of the two out")
        if self.calibration is not None:
            try:
                ids = torch.as_tensor(self.calibration)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"calibration={self.calibration!r} ({error}): give token ids [T] or [B, T]") from None
            if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.numel() == 0:
                raise ValueError(f"calibration of shape {tuple(ids.shape)} and dtype {ids.dtype}: give token ids [T] or [B, T]")

    @property
    def scheme(self) -> Scheme:
        """The form of the weights."""
        raise NotImplementedError(f"{type(self).__name__} has no scheme: define it")

    @property
    def irreversible(self) -> bool:
        return not self.keep_original

    def check(self, target: Target) -> None:
        find_blocks(target, self.modules, self.scope, self.scheme, self.view)

    def apply(self, target: Target, handle: Handle) -> None:
        install(target, handle, self, find_blocks(target, self.modules, self.scope, self.scheme, self.view), self.scheme)
