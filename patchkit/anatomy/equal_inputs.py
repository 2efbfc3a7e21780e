"""Equal inputs of a quantised model's layers, so that a probe of two rows sees positions and not the noise of rounding."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import decoder_layers
from patchkit.errors import NothingMatched

# The largest relative difference of two rows at the input of a layer that may be rounding in the one before it. What positions add there
# is larger: it has to show through everything else in the residual stream.
_MOST_ROUNDING = 0.12


@contextlib.contextmanager
def equal_inputs(model: Any) -> Iterator[None]:
    """Give each decoder layer of a quantised model the first row [T, D] twice, while the model runs over two rows of equal tokens.

    Rows that are not equal before the first layer carry positions, as do rows that differ by more than rounding: these stay. So does
    everything in a model of ordinary tensors, and in one without a list of decoder layers.
    """
    try:
        layers: list[nn.Module] = list(decoder_layers(model)) if _compat.loader_of(model) is not None else []
    except NothingMatched:
        layers = []
    state: dict[str, bool] = {"positions": False}
    hooks = [
        layer.register_forward_pre_hook(functools.partial(_equalise, state, index == 0), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _equalise(state: dict[str, bool], first: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not torch.is_tensor(hidden) or hidden.ndim != 3 or len(hidden) != 2:
        return None
    if first:
        state["positions"] = not torch.equal(hidden[0], hidden[1])
    difference = (hidden[1].float() - hidden[0].float()).norm()
    if first or state["positions"] or difference > _MOST_ROUNDING * hidden[0].float().norm():
        return None
    same = hidden[:1].expand_as(hidden).contiguous()
    return ((same, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": same})
