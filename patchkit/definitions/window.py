"""Definition of attention with sinks and a sliding window (StreamingLLM)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.definitions.forward import NoDefinition, hooks_removed, logits_at

if TYPE_CHECKING:
    from patchkit.record import PatchReport

# Queries that are computed in one batch, each as a separate sequence.
_ROWS = 16


def window_logits(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    *,
    modules: Sequence[str],
    sinks: int,
    window: int,
    in_cache: bool = True,
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits by StreamingLLM: each query of the named attention modules sees the first S tokens and the last W, and no others.

    A query that sees S + W tokens is the last one of a sequence of just these tokens. So the model runs over the whole sequence, and each
    of these modules runs again for every query on the inputs of the tokens that the query sees. The module assigns them the positions
    0 to S + W - 1 (``in_cache``), or gets their true ones. No cache, mask or rotation is made here.

    Raises:
        NoDefinition: the modules do not take hidden states [B, T, D] and return them.
    """
    size, length = sinks + window, ids.shape[1]
    if length <= size:
        return logits_at(model, ids, at)
    rows = [[*range(sinks), *range(query - window + 1, query + 1)] for query in range(size - 1, length)]
    visible = torch.tensor(rows, device=ids.device)
    attention = [model.get_submodule(name) for name in modules]
    places = _token_arguments(model, attention, ids[:, :size])
    # The arguments that the model itself passes with these tokens at these positions: rotations, masks, biases.
    chunks = visible.split(_ROWS)
    calls = [_calls(model, attention, places, ids[0][chunk], None if in_cache else chunk) for chunk in chunks]
    count = Counter[int]()
    inputs: dict[int, tuple[Any, Any]] = {}
    running = False

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not running:
            inputs[id(module)] = args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal running
        if running:
            return None
        key = id(module), count[id(module)]
        count[id(module)] += 1
        running = True
        outputs: list[torch.Tensor] = []
        for chunk, recorded in zip(chunks, calls, strict=True):
            own_args, own_kwargs = recorded[key]
            own_args, own_kwargs = list(own_args), dict(own_kwargs)
            for kind, place in places[key]:
                given, own = (inputs[id(module)][0], own_args) if kind == "argument" else (inputs[id(module)][1], own_kwargs)
                own[place] = given[place][0][chunk]
            output_of_chunk = _hidden(module(*own_args, **own_kwargs))
            outputs += [output_of_chunk[0, :-1]] * (not outputs) + [output_of_chunk[:, -1]]
        running = False
        return _with_hidden(output, torch.cat(outputs)[None])

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for module in set(attention)]
    hooks += [module.register_forward_hook(after) for module in set(attention)]
    with hooks_removed(hooks):
        return logits_at(model, ids, at)


_Call = tuple[int, int]  # identity of a module, and the number of its earlier calls in this forward


def _calls(
    model: Any, modules: list[Any], places: Mapping[_Call, list[tuple[str, Any]]] | None, ids: torch.Tensor, positions: torch.Tensor | None
) -> dict[_Call, tuple[Any, Any]]:
    """Arguments of each call of these modules in a forward over ids [B, T]; those in ``places`` are left out."""
    count = Counter[int]()
    found: dict[_Call, tuple[Any, Any]] = {}

    def notice(module: nn.Module, args: Any, kwargs: Any) -> None:
        key = id(module), count[id(module)]
        count[id(module)] += 1
        left_out = [] if places is None else places[key]
        found[key] = (
            tuple(None if ("argument", i) in left_out else value for i, value in enumerate(args)),
            {name: None if ("keyword", name) in left_out else value for name, value in kwargs.items()},
        )

    options: dict[str, Any] = {}
    if positions is not None:
        if "position_ids" not in _compat.argument_names(model):
            raise NoDefinition(f"{type(model).__name__} takes no position_ids, so true positions cannot be given")
        # Without a mask, transformers takes a gap in the positions for the start of another sequence.
        options = {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
    with hooks_removed([module.register_forward_pre_hook(notice, with_kwargs=True) for module in set(modules)]):
        logits_at(model, ids, torch.tensor([ids.shape[1] - 1]), **options)  # the arguments are wanted, not the logits
    return found


def _token_arguments(model: Any, modules: list[Any], ids: torch.Tensor) -> dict[_Call, list[tuple[str, Any]]]:
    """Find the arguments of each call that hold one row per token and depend on the token: not positions, not masks."""
    first, second = (_calls(model, modules, None, each, None) for each in (ids, ids.flip(1).roll(1, 1)))
    shape = (1, ids.shape[1])
    places: dict[_Call, list[tuple[str, Any]]] = defaultdict(list)
    for key, (args, kwargs) in first.items():
        other_args, other_kwargs = second[key]
        candidates = [("argument", i, value, other_args[i]) for i, value in enumerate(args)]
        candidates += [("keyword", name, value, other_kwargs[name]) for name, value in kwargs.items()]
        for kind, place, value, other in candidates:
            rows = torch.is_tensor(value) and value.ndim >= 3 and tuple(value.shape[:2]) == shape
            if rows and not torch.equal(value, other):
                places[key].append((kind, place))
        if not places[key]:
            raise NoDefinition("an attention module of this model takes no hidden states of shape [B, T, D]")
    return places


def _hidden(output: Any) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    if _hidden(output).shape != hidden.shape:
        raise NoDefinition(f"an attention module of this model returns {list(_hidden(output).shape)}, not hidden states [B, T, D]")
    return hidden if torch.is_tensor(output) else type(output)((hidden, *output[1:]))
