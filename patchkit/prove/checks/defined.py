"""That logits are those which the definition gives that a patch names.

Where activations are rounded, a last bit may turn one level up or down, and what follows is another text: on a model of 30 layers two
computations of the very same rounded model then differ by as much as rounding itself does. So definitions of patches that round are given,
layer by layer, the inputs that the patched layers had. What is left is what a layer makes of its inputs, and that is held to a last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from patchkit.patch import Patch
from patchkit.prove.checks.bounds import SIXTEEN_BITS, Bound, largest, noise_bound, same, size, takes, tight
from patchkit.prove.checks.case import BEYOND, Case
from patchkit.prove.checks.compare import Pieces
from patchkit.prove.checks.feeding import fed
from patchkit.prove.checks.logits import WAYS, at_of

# A definition runs each query as a text of its own; more tokens than this in all are too many.
_DEFINED_TOKENS = 1 << 16
# The arguments of every call of a module, by its name.
_Calls = dict[str, list[tuple[Any, ...]]]


def defined(case: Case) -> None:
    """Logits, in every way of feeding, are those of the definition."""
    for patch, promise in case.promises.items():
        if promise.definition is not None:
            (_rounded if promise.rounds else _plain)(case, patch)


def _plain(case: Case, patch: Patch) -> None:
    reach = case.promises[patch].same_up_to
    length = reach + BEYOND
    if reach * BEYOND > _DEFINED_TOKENS:
        length = reach + max(4, _DEFINED_TOKENS // reach)
    ids = case.text(length)
    at = case.watched(ids.shape[1])

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        expected = [_worked_out(case, patch, ids, at)]
        return ((fed(view, ids, way, at=at), expected) for way in case.ways(ids.shape[1]))

    detail = f"{at_of(ids, at)}, {WAYS}, and worked out by definition"
    same(case, patch.spec, "logits are those of the definition", pairs, detail, of_any_view=False)


def _rounded(case: Case, patch: Patch) -> None:
    ids = case.text(BEYOND)
    names = list(case.facts(patch).modules)

    def pairs(view: Any) -> Iterator[tuple[Pieces, Pieces]]:
        for way in case.ways(ids.shape[1]):
            with _heard(view, names) as calls:
                actual = list(fed(view, ids, way))
            inputs = _as_a_whole(calls, way, ids.shape[1])
            if inputs is None:
                continue
            with _given(case.without(patch), inputs):
                yield actual, [_worked_out(case, patch, ids, None)]

    def unsure() -> Bound:
        with _heard(case.full, names) as calls:
            list(fed(case.full, ids, []))
        with _given(case.without(patch), calls):
            sure = _worked_out(case, patch, ids, None)
            draws = (torch.Generator().manual_seed(draw) for draw in range(3))
            noise = largest(([_worked_out(case, patch, ids, None, unsure=draw)], [sure]) for draw in draws)
        # A level that turned up or down shows at some positions; what is wrong with a layer shows at all. In 16 bits so does noise.
        typical = None if case.model.dtype in SIXTEEN_BITS else max(noise.typical, tight(case).value)
        return noise_bound(size(case, noise), typical)

    detail = f"{ids.shape[1]} tokens, {WAYS}, and worked out by definition on the inputs of each of {len(names)} modules"
    takes_unsure = takes(case.promises[patch].definition, "unsure")
    same(case, patch.spec, "logits are those of the definition", pairs, detail, of_any_view=False, noise=unsure if takes_unsure else None)


def _worked_out(case: Case, patch: Patch, ids: torch.Tensor, at: torch.Tensor | None, **options: Any) -> torch.Tensor:
    definition: Any = case.promises[patch].definition
    if takes(definition, "at"):
        logits: torch.Tensor = definition(case.without(patch), ids, case.facts(patch), at=at, **options)
        return logits
    logits = definition(case.without(patch), ids, case.facts(patch), **options)
    return logits if at is None else logits[:, at.to(logits.device)]


# -- the inputs of modules -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _heard(view: Any, names: Sequence[str]) -> Iterator[_Calls]:
    """What these modules of ``view`` are called with."""
    calls: _Calls = {name: [] for name in names}

    def hear(name: str) -> Any:
        return lambda module, args: calls[name].append(args)

    with _hooked([view.get_submodule(name).register_forward_pre_hook(hear(name)) for name in names]):
        yield calls


@contextlib.contextmanager
def _given(view: Any, calls: _Calls) -> Iterator[None]:
    """Within this context every forward calls these modules of ``view`` with the arguments that were heard, whatever it has itself."""
    done = dict.fromkeys(calls, 0)

    def give(name: str) -> Any:
        def instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            done[name] += 1
            return calls[name][(done[name] - 1) % len(calls[name])]

        return instead

    with _hooked([view.get_submodule(name).register_forward_pre_hook(give(name)) for name in calls]):
        yield


def _as_a_whole(calls: _Calls, way: Sequence[int], length: int) -> _Calls | None:
    """Calls in forwards of these many tokens as those of one forward; None where a module does not see every token once."""
    if len(way) <= 1:
        return calls
    if any(
        len(each) != len(way) or any(args[0].shape[-2] != size for args, size in zip(each, way, strict=True)) for each in calls.values()
    ):
        return None
    return {name: [tuple(_joined(parts) for parts in zip(*each, strict=True))] for name, each in calls.items()}


def _joined(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts), -2) if torch.is_tensor(parts[0]) else parts[0]


@contextlib.contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
