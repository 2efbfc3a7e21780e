"""Feeding a model the tokens of a text in different ways, and which of its logits are looked at.

Shapes: B rows, T tokens, P positions looked at, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from patchkit import _compat
from patchkit.definitions import keeps_some, logits_at

# Of one side of a comparison so many bytes of logits may be in memory.
MOST_BYTES = 128 << 20
# Above this many, a text is fed one by one only where something begins or wraps around.
ONE_BY_ONE = 160
# How far around such a place every token is looked at, or fed alone.
_AROUND = 8


class NotJudged(Exception):
    """This cannot be decided here; the message says why."""


def cut(sizes: Sequence[int], length: int) -> list[int]:
    """These sizes, over and over, up to ``length`` in all."""
    found: list[int] = []
    for size in itertools.cycle(sizes):
        if length == 0:
            return found
        found.append(min(size, length))
        length -= found[-1]
    return found


def in_chunks(length: int, places: Sequence[int], thorough: bool) -> list[int]:
    """Chunks of many sizes, and single tokens around ``places``."""
    if length <= ONE_BY_ONE:
        return cut([1, 2, 7, 1, 13], length)
    if thorough:
        return cut([1, 2, 97, 1, 61], length)
    found, end = [], 0
    sizes = itertools.cycle([97, 256, 1, 61, 331])
    for place in [*sorted(places), length]:
        first = min(max(end, place - 2), length)
        while end < first:
            found.append(min(next(sizes), first - end))
            end += found[-1]
        singles = min(4 if place < length else length, length - end)
        found, end = [*found, *[1] * singles], end + singles
    return found


def one_by_one(length: int, begins: int) -> list[int]:
    """One by one; in long texts only from six tokens before ``begins`` on and at the end, with one leap between."""
    if length <= ONE_BY_ONE:
        return [1] * length
    edge = max(1, min(begins - 6, length - 12))
    rest = length - edge
    return [edge, *[1] * min(12, rest), *([rest - 24] if rest > 24 else []), *[1] * min(12, max(0, rest - 12))]


def watched(length: int, bytes_of_one: int, places: Sequence[int] = ()) -> torch.Tensor | None:
    """Positions [P] at which logits of a text are compared: None for all, if they fit into `MOST_BYTES`.

    Else those around ``places`` and at both ends, nearest first, up to half of what fits, and others evenly spread over the text.

    Args:
        bytes_of_one: bytes of all logits of one position.
    """
    room = that_fit(bytes_of_one)
    if room >= length:
        return None
    near = [place + step for step in sorted(range(-_AROUND, _AROUND), key=abs) for place in (0, length - 1, *places)]
    chosen = dict.fromkeys(place for place in near if 0 <= place < length)
    found = set(itertools.islice(chosen, room // 2))
    spread = room - len(found)
    return torch.tensor(sorted(found | {i * length // spread for i in range(spread)}))


def that_fit(bytes_of_one: int) -> int:
    """Positions of which all logits fit into `MOST_BYTES`, at least 8."""
    return max(8, MOST_BYTES // bytes_of_one)


def fed(
    view: Any,
    ids: torch.Tensor,
    way: Sequence[int],
    mask: torch.Tensor | None = None,
    cache: Any = None,
    at: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Logits of ids [B, T] forward by forward, [B, n, V] each, fed in forwards of these many tokens; as a whole without a cache for none.

    Args:
        mask: [B, T] attention mask, for padding.
        cache: what was fed before.
        at: positions [P] in rising order that are wanted; None for all.

    Raises:
        NotJudged: the model returns no cache.
    """
    if not way:
        options = {} if mask is None else {"attention_mask": mask}
        yield logits_at(view, ids, at, **options)
        return
    end = 0
    for size in way:
        start, end = end, end + size
        options = {} if mask is None else {"attention_mask": mask[:, :end]}
        wanted = None if at is None else at[(at >= start) & (at < end)].to(ids.device) - start
        if wanted is not None and len(wanted) < size and keeps_some(view):
            # Of none at all, the last one: an empty product is a shape that nobody else asks for.
            options["logits_to_keep"] = wanted if len(wanted) else torch.tensor([size - 1], device=ids.device)
        out = view(input_ids=ids[:, start:end], use_cache=True, **{_compat.CACHE: cache}, **options)
        cache = cache_of(out)
        if wanted is None or len(wanted) == size:
            yield out.logits
        elif len(wanted):
            yield out.logits if keeps_some(view) else out.logits[:, wanted]


def cache_after(view: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> Any:
    """The cache after ids [B, T] in one forward, of which no logits are wanted.

    Raises:
        NotJudged: the model returns no cache.
    """
    options = {} if mask is None else {"attention_mask": mask}
    if keeps_some(view) and ids.shape[1] > 1:
        options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
    return cache_of(view(input_ids=ids, use_cache=True, **{_compat.CACHE: cache}, **options))


def cache_of(out: Any) -> Any:
    """The cache in an output.

    Raises:
        NotJudged: there is none.
    """
    cache = _compat.cache_of(out)
    if cache is None:
        raise NotJudged("the model returns no cache")
    return cache


def padded(texts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch [B, length] of texts [1, T], padded on the left with tokens that must not count, and its mask."""
    rows = [torch.cat([text[:, :1].expand(-1, length - text.shape[1]), text], 1) for text in texts]
    mask = [torch.arange(length, device=text.device)[None] >= length - text.shape[1] for text in texts]
    return torch.cat(rows), torch.cat(mask).long()


def listed(values: Iterable[Any]) -> str:
    """In words, with commas."""
    return ", ".join(map(str, values))
