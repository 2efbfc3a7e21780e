"""Check that the logits of a patch are those of its definition.

Where activations are rounded, a last bit may flip a rounding step, and everything after it differs: on a model of 30 layers two
computations of the same rounded model then differ by as much as rounding itself. So definitions of patches that round get, module by
module, the inputs that the patched modules had. Only the computation inside a module remains, and it is compared to the last bits.
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
from patchkit.prove.checks.logits import CHUNKINGS, at_of

# A definition runs each query as a separate sequence; this bounds the number of tokens in all of them.
_DEFINED_TOKENS = 1 << 16
# The arguments of every call of a module, by its name.
_Calls = dict[str, list[tuple[Any, ...]]]


def defined(case: Case) -> None:
    """Check that logits, in every chunking, are those of the definition."""
    for patch, promise in case.promises.items():
        if promise.definition is not None:
            (_rounded if promise.rounds else _plain)(case, patch)


def _plain(case: Case, patch: Patch) -> None:
    reach = case.promises[patch].same_up_to
    length = reach + BEYOND
    if reach * BEYOND > _DEFINED_TOKENS:
        length = reach + max(4, _DEFINED_TOKENS // reach)
    ids = case.sequence(length)
    at = case.watched(ids.shape[1])

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        expected = [_defined_logits(case, patch, ids, at)]
        return ((fed(view, ids, chunks, at=at), expected) for chunks in case.chunkings(ids.shape[1]))

    detail = f"{at_of(ids, at)}, {CHUNKINGS}, and computed by definition"
    same(case, patch.spec, "logits are those of the definition", pairs, detail, of_any_view=False)


def _rounded(case: Case, patch: Patch) -> None:
    ids = case.sequence(BEYOND)
    names = list(case.facts(patch).modules)

    def pairs(view: Any) -> Iterator[tuple[Pieces, Pieces]]:
        for chunks in case.chunkings(ids.shape[1]):
            with _recorded(view, names) as calls:
                actual = list(fed(view, ids, chunks))
            inputs = _as_a_whole(calls, chunks, ids.shape[1])
            if inputs is None:
                continue
            with _replayed(case.without(patch), inputs):
                yield actual, [_defined_logits(case, patch, ids, None)]

    def unsure() -> Bound:
        with _recorded(case.full, names) as calls:
            list(fed(case.full, ids, []))
        with _replayed(case.without(patch), calls):
            sure = _defined_logits(case, patch, ids, None)
            draws = (torch.Generator().manual_seed(draw) for draw in range(3))
            noise = largest(([_defined_logits(case, patch, ids, None, unsure=draw)], [sure]) for draw in draws)
        # A flipped rounding step shows at some positions; an error of a module shows at all. In 16 bits so does noise.
        typical = None if case.model.dtype in SIXTEEN_BITS else max(noise.typical, tight(case).value)
        return noise_bound(size(case, noise), typical)

    detail = f"{ids.shape[1]} tokens, {CHUNKINGS}, and computed by definition on the inputs of each of {len(names)} modules"
    takes_unsure = takes(case.promises[patch].definition, "unsure")
    same(case, patch.spec, "logits are those of the definition", pairs, detail, of_any_view=False, noise=unsure if takes_unsure else None)


def _defined_logits(case: Case, patch: Patch, ids: torch.Tensor, at: torch.Tensor | None, **options: Any) -> torch.Tensor:
    definition: Any = case.promises[patch].definition
    if takes(definition, "at"):
        logits: torch.Tensor = definition(case.without(patch), ids, case.facts(patch), at=at, **options)
        return logits
    logits = definition(case.without(patch), ids, case.facts(patch), **options)
    return logits if at is None else logits[:, at.to(logits.device)]


# -- the inputs of modules -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recorded(view: Any, names: Sequence[str]) -> Iterator[_Calls]:
    """Record the arguments of every call of these modules of ``view``."""
    calls: _Calls = {name: [] for name in names}

    def record(name: str) -> Any:
        return lambda module, args: calls[name].append(args)

    with _hooked([view.get_submodule(name).register_forward_pre_hook(record(name)) for name in names]):
        yield calls


@contextlib.contextmanager
def _replayed(view: Any, calls: _Calls) -> Iterator[None]:
    """Replace the arguments of these modules of ``view`` by recorded ones in every forward within this context."""
    done = dict.fromkeys(calls, 0)

    def give(name: str) -> Any:
        def instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            done[name] += 1
            return calls[name][(done[name] - 1) % len(calls[name])]

        return instead

    with _hooked([view.get_submodule(name).register_forward_pre_hook(give(name)) for name in calls]):
        yield


def _as_a_whole(calls: _Calls, chunks: Sequence[int], length: int) -> _Calls | None:
    """Join the calls of a chunked forward to those of one forward; None if a module does not see every token once."""
    if len(chunks) <= 1:
        return calls
    if any(
        len(each) != len(chunks) or any(args[0].shape[-2] != size for args, size in zip(each, chunks, strict=True))
        for each in calls.values()
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
