"""The blocks of a model that patches quantise, and every reason to leave one alone or to refuse the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, PatchError
from patchkit.module_timing import selected
from patchkit.quantised.experts import QuantisedExperts
from patchkit.quantised.linears import QuantisedLinear
from patchkit.quantised.scheme import Scheme
from patchkit.quantised.selection import left_experts, obstacle_of, refuse_weight
from patchkit.quantised.timing import ACTIVATIONS
from patchkit.quantised.view import view_obstacle
from patchkit.record import Record

# Feed-forward blocks; these and the projections of attention; and the head too.
Scope = Literal["mlp", "all", "all+head"]
SCOPES: tuple[str, ...] = get_args(Scope)


class FoundBlocks(NamedTuple):
    """Modules of one model that can be converted.

    Attributes:
        linears: modules with one 2-D weight.
        experts: modules of fused experts, by name.
        left: modules that will not be converted, with the reason.
    """

    linears: list[QuantisedLinear]
    experts: dict[str, nn.Module]
    left: dict[str, str]


def find_blocks(target: Target, patterns: tuple[str, ...] | None, scope: Scope, scheme: Scheme, view: bool = False) -> FoundBlocks:
    """Find the blocks of this scope whose names match ``patterns``; None for all.

    Args:
        view: only those that can run over quantised weights which they do not hold.

    Raises:
        NothingMatched: no block can be converted.
        UnsupportedModel: a weight is sharded, or not in memory.
    """
    found = target.feed_forward
    name = type(target.model).__name__
    left = dict(found.left_alone)
    candidates = dict(found.linears)
    if scope != "mlp":
        candidates |= _projections(target, left)
    if scope == "all+head":
        candidates |= _head(target, left)
    kind = "feed-forward linear" if scope == "mlp" else "linear layer"
    wanted = selected(patterns, [*candidates, *found.experts], kind, name)
    linears = []
    for path in [path for path in candidates if path in wanted]:
        obstacle = obstacle_of(candidates[path], scheme) or (view_obstacle(candidates[path], scheme) if view else None)
        if obstacle is None:
            module = candidates[path]
            head = target.model.get_output_embeddings()
            is_head = module in (head, getattr(head, "base_layer", None))
            shared = is_head and module.weight is target.model.get_input_embeddings().weight
            linears.append(QuantisedLinear(path, module, scheme, is_head, shared))
        else:
            left[path] = obstacle
    experts = {path: module for path, module in found.experts.items() if path in wanted and not left_experts(path, module, left)}
    if view:
        left |= dict.fromkeys(experts, "fused experts have no view: leave view out to convert them")
        experts = {}
    if not linears and not experts:
        reasons = (
            "; ".join(f"{what}: {why}" for what, why in list(left.items())[:3])
            or _compat.packed_gguf(target.model)
            or "its decoder layers hold no linear layer outside attention"
        )
        raise NothingMatched(f"{name} has no {kind} that can be converted ({reasons}){_compat.loaded_by(target.model)}")
    for path, module in [*((block.name, block.module) for block in linears), *experts.items()]:
        for key, weight in module.named_parameters(recurse=False):
            refuse_weight(f"{path}.{key}", weight, scheme.kind)
    return FoundBlocks(linears, experts, left)


def _projections(target: Target, left: dict[str, str]) -> dict[str, Any]:
    """The linear layers inside attention, by name; why there are none goes into ``left``."""
    try:
        layers = target.attention_layers
    except PatchError as error:
        left["attention"] = str(error)
        return {}
    names = {module: path for path, module in target.model.named_modules()}
    return {names[module]: module for layer in layers for module in _linears(layer.module)}


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Linear | _compat.Conv1D):
        yield module
        return
    for name, child in module.named_children():
        # Of a LoRA layer, only the base; adapters are trained and small.
        if not hasattr(module, "base_layer") or name == "base_layer":
            yield from _linears(child)


def _head(target: Target, left: dict[str, str]) -> dict[str, Any]:
    head = target.model.get_output_embeddings()
    head = getattr(head, "base_layer", head)  # of a LoRA layer, only the base
    name = next((path for path, module in target.model.named_modules() if module is head), "lm_head")
    if not isinstance(head, nn.Linear):
        left[name] = f"the head is a {type(head).__module__}.{type(head).__name__}, and no plain linear layer"
        return {}
    return {name: head}


def accurate_blocks(
    blocks: Sequence[QuantisedLinear | QuantisedExperts], inputs: dict[str, tuple[Any, ...]], min_snr: float | None, record: Record
) -> tuple[list[QuantisedLinear | QuantisedExperts], dict[str, str]]:
    """Select the blocks whose outputs on ``inputs`` have a signal-to-noise ratio of at least ``min_snr`` dB, and record them.

    Returns:
        These blocks, and for each other block the reason why it is left alone, by name.

    Raises:
        NothingMatched: no block has that ratio.
    """
    kept: list[QuantisedLinear | QuantisedExperts] = []
    left: dict[str, str] = {}
    for block in blocks:
        snr = block.signal_to_noise(inputs.get(block.name))
        if isinstance(block, QuantisedLinear) and block.is_head and snr is not None:
            changed, of = block.changed_choices(inputs[block.name])
            record.measured("head", f"{snr:.1f} dB; another likeliest token at {changed} of {of} positions")
        if min_snr is not None and snr is not None and not snr >= min_snr:  # nan, of a weight that is not finite, is no ratio either
            left[block.name] = f"its SNR of {snr:.1f} dB is below {min_snr:g}"
            continue
        mode = next(mode for mode, activation in ACTIVATIONS.items() if activation == block.activation)
        record.describe(block.name, mode=mode, snr_db=None if snr is None else round(snr, 2), shape=block.shape)
        kept.append(block)
    if not kept:
        raise NothingMatched(f"every module has an SNR below min_snr={min_snr:g} dB: give a lower one, or leave it out")
    ratios = [facts["snr_db"] for facts in record.modules.values() if facts["snr_db"] is not None]
    if ratios:
        record.measured("SNR", f"{min(ratios):.1f} to {max(ratios):.1f} dB")
    return kept, left
