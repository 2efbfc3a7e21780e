"""The edits of patches that quantise on a model: weights, counters, checkpoints, and the way back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.derived import Derived, keep_fresh
from patchkit.handle import Handle
from patchkit.module_timing import report_speed
from patchkit.quantised.calibration import calibrated_inputs
from patchkit.quantised.counting import count_products, record_products
from patchkit.quantised.experts import QuantisedExperts
from patchkit.quantised.find_blocks import FoundBlocks, Scope, accurate_blocks
from patchkit.quantised.linears import QuantisedLinear
from patchkit.quantised.requantize import checksums, refuse_changes, requantize
from patchkit.quantised.saving import Original, restore_weights
from patchkit.quantised.scheme import Scheme
from patchkit.quantised.timing import choose_activations
from patchkit.quantised.view import install_views

_TRIED_TOKENS = 2


class QuantisedOptions(Protocol):
    """The options that patches which quantise have in common."""

    @property
    def name(self) -> str: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def mode(self) -> str: ...
    @property
    def keep_original(self) -> bool: ...
    @property
    def view(self) -> bool: ...
    @property
    def min_snr(self) -> float | None: ...
    @property
    def calibration(self) -> Any: ...
    @property
    def strict(self) -> bool: ...


@torch.no_grad()
def install(target: Target, handle: Handle, options: QuantisedOptions, found: FoundBlocks, scheme: Scheme) -> None:
    """Give the blocks found quantised weights, and try the model once, so that an error undoes everything here and not in a user's call."""
    if target.model.device.type == "cpu" and (reason := scheme.op.load_direct()) is not None:
        handle.record.left_alone(f"calls of {scheme.op.name} without Python", reason)
    inputs = calibrated_inputs(target, {**{block.name: block.module for block in found.linears}, **found.experts}, options.calibration)
    scheme.fit_layers(target, found.linears, options.calibration)
    blocks: list[QuantisedLinear | QuantisedExperts] = [
        *found.linears,
        *(QuantisedExperts.quantized(name, module, scheme) for name, module in found.experts.items()),
    ]
    choose_activations(options.mode, blocks)
    kept, too_noisy = accurate_blocks(blocks, inputs, options.min_snr, handle.record)
    for what, why in (found.left | too_noisy).items():
        handle.record.left_alone(what, why)
    report_speed(options.name, kept, handle.record, options.strict, (1, 256), "leave the patch out unless you want the memory")

    record_products(handle, kept, "feed-forward linears" if options.scope == "mlp" else "linear layers")
    if options.view:
        install_views(target, handle, options.name, [block for block in kept if isinstance(block, QuantisedLinear)], scheme)
        _try(target)
    else:
        _replace(target, handle, options, kept, scheme)


def _replace(
    target: Target, handle: Handle, options: QuantisedOptions, kept: Sequence[QuantisedLinear | QuantisedExperts], scheme: Scheme
) -> None:
    """Put the quantised weights of blocks in the place of their own."""
    originals: list[Original] = []
    handle.on_undo(functools.partial(restore_weights, originals))
    for block in kept:
        block.install(handle, originals, options.keep_original)
    _try(target)
    count_products(_compat.decoder_of(target.model), handle, kept)
    saved = [block for block in kept if isinstance(block, QuantisedLinear) and not block.transposed and not block.is_head]
    scheme.make_saveable(target.model, handle, saved)
    if options.keep_original:
        renew: Callable[[], bool] = functools.partial(requantize, originals, handle.record.hits, scheme)
        if not scheme.follows:
            renew = functools.partial(refuse_changes, originals, checksums(originals), scheme.kind)
        derived = Derived([original.weight for original in originals], renew)
        keep_fresh(handle, target.model, _compat.decoder_of(target.model), derived)
    else:
        handle.make_final(
            f"{options.name}(keep_original=False) has freed the floating-point weights, so the model stays patched: load it again",
            originals.clear,
        )


def _try(target: Target) -> None:
    target.forward(torch.zeros(1, _TRIED_TOKENS, dtype=torch.int64, device=target.model.device))
