"""The blocks of a model that `mlp_int8` converts, and every reason to leave one alone or to refuse the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched
from patchkit.int8.experts import Int8Experts
from patchkit.int8.linears import Int8Linear
from patchkit.int8.selection import left_experts, obstacle_of, refuse_weight
from patchkit.int8.timing import ACTIVATIONS
from patchkit.module_timing import selected
from patchkit.record import Record


class FoundBlocks(NamedTuple):
    """Feed-forward modules of one model.

    Attributes:
        linears: modules with one 2-D weight.
        experts: modules of fused experts, by name.
        left: modules that will not be converted, with the reason.
    """

    linears: list[Int8Linear]
    experts: dict[str, nn.Module]
    left: dict[str, str]


def find_blocks(target: Target, patterns: tuple[str, ...] | None) -> FoundBlocks:
    """Find the blocks whose names match ``patterns``; None for all.

    Raises:
        NothingMatched: no block can be converted.
        UnsupportedModel: a weight is sharded, or not in memory.
    """
    found = target.feed_forward
    name = type(target.model).__name__
    left = dict(found.left_alone)
    wanted = selected(patterns, [*found.linears, *found.experts], "feed-forward linear", name)
    linears = []
    for path in [path for path in found.linears if path in wanted]:
        obstacle = obstacle_of(found.linears[path])
        if obstacle is None:
            linears.append(Int8Linear(path, found.linears[path]))
        else:
            left[path] = obstacle
    experts = {path: module for path, module in found.experts.items() if path in wanted and not left_experts(path, module, left)}
    if not linears and not experts:
        reasons = (
            "; ".join(f"{what}: {why}" for what, why in list(left.items())[:3])
            or _compat.packed_gguf(target.model)
            or "its decoder layers hold no linear layer outside attention"
        )
        raise NothingMatched(f"{name} has no feed-forward linear that can be converted ({reasons})")
    for path, module in [*((block.name, block.module) for block in linears), *experts.items()]:
        for key, weight in module.named_parameters(recurse=False):
            refuse_weight(f"{path}.{key}", weight)
    return FoundBlocks(linears, experts, left)


def accurate_blocks(
    blocks: Sequence[Int8Linear | Int8Experts], inputs: dict[str, tuple[Any, ...]], min_snr: float | None, record: Record
) -> tuple[list[Int8Linear | Int8Experts], dict[str, str]]:
    """Select the blocks whose outputs on ``inputs`` have a signal-to-noise ratio of at least ``min_snr`` dB, and record them.

    Returns:
        These blocks, and for each other block the reason why it is left alone, by name.

    Raises:
        NothingMatched: no block has that ratio.
    """
    kept: list[Int8Linear | Int8Experts] = []
    left: dict[str, str] = {}
    for block in blocks:
        snr = block.signal_to_noise(inputs.get(block.name))
        if min_snr is not None and snr is not None and not snr >= min_snr:  # nan, of a weight that is not finite, is no ratio either
            left[block.name] = f"its SNR of {snr:.1f} dB is below {min_snr:g}"
            continue
        mode = next(mode for mode, activation in ACTIVATIONS.items() if activation == block.activation)
        record.describe(block.name, mode=mode, snr_db=None if snr is None else round(snr, 2), shape=block.shape)
        kept.append(block)
    if not kept:
        raise NothingMatched(f"every feed-forward module has an SNR below min_snr={min_snr:g} dB: give a lower one, or leave it out")
    ratios = [facts["snr_db"] for facts in record.modules.values() if facts["snr_db"] is not None]
    if ratios:
        record.measured("SNR", f"{min(ratios):.1f} to {max(ratios):.1f} dB")
    return kept, left
