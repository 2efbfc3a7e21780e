"""mlp_int8: int8 weights for the linear layers of the feed-forward blocks, and nothing else.

1. Weights are rounded to int8, symmetric, with one scale per output channel (Dettmers et al. 2022, LLM.int8(),
   https://arxiv.org/abs/2208.07339).
2. Each stays in its `nn.Linear` (or `Conv1D`) as an `Int8Weight`, which runs the op `int8_linear`. Fused experts run the op
   `int8_experts_linear` through transformers' experts interface.
3. Attention, embeddings, the head, routers and norms are not changed: most bytes are in the feed-forward blocks, and rounding harms
   them least.
4. `save_pretrained` writes a torchao checkpoint (`Int8Tensor`), which stock transformers loads. Patching that model takes over the same
   int8 values.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.definitions import rounded_logits
from patchkit.derived import Derived, keep_fresh
from patchkit.handle import Handle
from patchkit.int8.calibration import calibrated_inputs
from patchkit.int8.counting import count_products
from patchkit.int8.experts import Int8Experts
from patchkit.int8.find_blocks import accurate_blocks, find_blocks
from patchkit.int8.linears import Int8Linear, make_saveable
from patchkit.int8.requantize import requantize
from patchkit.int8.saving import restore_weights
from patchkit.int8.timing import choose_activations
from patchkit.module_timing import patterns_of, report_speed
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
        find_blocks(target, self.modules)

    @torch.no_grad()
    def apply(self, target: Target, handle: Handle) -> None:
        found = find_blocks(target, self.modules)
        inputs = calibrated_inputs(target, {**{block.name: block.module for block in found.linears}, **found.experts}, self.calibration)
        blocks: list[Int8Linear | Int8Experts] = [
            *found.linears,
            *(Int8Experts.quantized(name, module) for name, module in found.experts.items()),
        ]
        choose_activations(self.mode, blocks)
        kept, too_noisy = accurate_blocks(blocks, inputs, self.min_snr, handle.record)
        for what, why in (found.left | too_noisy).items():
            handle.record.left_alone(what, why)
        report_speed("mlp_int8", kept, handle.record, self.strict, (1, 256), "leave the patch out unless you want the memory")

        originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        handle.on_undo(functools.partial(restore_weights, originals))
        for block in kept:
            block.install(handle, originals, self.keep_original)
        count_products(_compat.decoder_of(target.model), handle, kept)
        make_saveable(target.model, handle, [block for block in kept if isinstance(block, Int8Linear) and not block.transposed])
        if self.keep_original:
            renew = functools.partial(requantize, originals, handle.record.hits)
            derived = Derived([original for _, _, original in originals], renew)
            keep_fresh(handle, target.model, _compat.decoder_of(target.model), derived)
        else:
            handle.make_final(
                "mlp_int8(keep_original=False) has freed the floating-point weights, so the model stays patched: load it again",
                originals.clear,
            )
