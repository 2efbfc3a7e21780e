"""Forwards of a sequence in different chunkings, and the positions at which logits are compared.

Shapes: B rows, T tokens, P compared positions, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from patchkit import _compat
from patchkit.definitions import keeps_some, logits_at

# Largest number of bytes of logits in memory for one side of a comparison.
MOST_BYTES = 128 << 20
# A longer sequence is fed token by token only where patches begin to act or positions wrap around.
ONE_BY_ONE = 160
# Distance from such a place within which every position is compared.
_AROUND = 8


class NotJudged(Exception):
    """A promise cannot be judged here; the message gives the reason."""


def cut(sizes: Sequence[int], length: int) -> list[int]:
    """Repeat the sizes in a cycle, up to ``length`` in total."""
    found: list[int] = []
    for size in itertools.cycle(sizes):
        if length == 0:
            return found
        found.append(min(size, length))
        length -= found[-1]
    return found


def in_chunks(length: int, places: Sequence[int], thorough: bool) -> list[int]:
    """Sizes of chunks of ``length`` tokens: many different sizes, and single tokens around ``places``."""
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
    """Sizes of chunks of one token; in long sequences only from six tokens before ``begins`` on and at the end, with one leap between."""
    if length <= ONE_BY_ONE:
        return [1] * length
    edge = max(1, min(begins - 6, length - 12))
    rest = length - edge
    return [edge, *[1] * min(12, rest), *([rest - 24] if rest > 24 else []), *[1] * min(12, max(0, rest - 12))]


def watched(length: int, bytes_of_one: int, places: Sequence[int] = ()) -> torch.Tensor | None:
    """Positions [P] at which logits of a sequence are compared; None for all, if they fit into `MOST_BYTES`.

    Else positions around ``places`` and at both ends, nearest first, up to half of what fits, and others evenly spread.

    Args:
        bytes_of_one: bytes of all logits at one position.
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
    """Number of positions whose logits fit into `MOST_BYTES`, at least 8."""
    return max(8, MOST_BYTES // bytes_of_one)


def fed(
    view: Any,
    ids: torch.Tensor,
    chunks: Sequence[int],
    mask: torch.Tensor | None = None,
    cache: Any = None,
    at: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Logits [B, n, V] of each forward over ids [B, T].

    Args:
        chunks: numbers of tokens per forward; empty for one forward without a cache.
        mask: [B, T] attention mask, for padding.
        cache: the cache to continue; None for a new one.
        at: ascending positions [P] of the wanted logits; None for all.

    Raises:
        NotJudged: the model returns no cache.
    """
    if not chunks:
        options = {} if mask is None else {"attention_mask": mask}
        yield logits_at(view, ids, at, **options)
        return
    end = 0
    for size in chunks:
        start, end = end, end + size
        options = {} if mask is None else {"attention_mask": mask[:, :end]}
        wanted = None if at is None else at[(at >= start) & (at < end)].to(ids.device) - start
        if wanted is not None and len(wanted) < size and keeps_some(view):
            # Where none is wanted, keep the last: models are not tested on empty products.
            options["logits_to_keep"] = wanted if len(wanted) else torch.tensor([size - 1], device=ids.device)
        out = view(input_ids=ids[:, start:end], use_cache=True, **{_compat.CACHE: cache}, **options)
        cache = cache_of(out)
        if wanted is None or len(wanted) == size:
            yield out.logits
        elif len(wanted):
            yield out.logits if keeps_some(view) else out.logits[:, wanted]


def cache_after(view: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> Any:
    """Run one forward over ids [B, T] and return the cache.

    Raises:
        NotJudged: the model returns no cache.
    """
    options = {} if mask is None else {"attention_mask": mask}
    if keeps_some(view) and ids.shape[1] > 1:
        options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
    return cache_of(view(input_ids=ids, use_cache=True, **{_compat.CACHE: cache}, **options))


def cache_of(out: Any) -> Any:
    """The cache of a model's output.

    Raises:
        NotJudged: there is none.
    """
    cache = _compat.cache_of(out)
    if cache is None:
        raise NotJudged("the model returns no cache")
    return cache


def padded(texts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch [B, length] of sequences [1, T], left-padded with ordinary tokens, which must not count, and its mask."""
    rows = [torch.cat([text[:, :1].expand(-1, length - text.shape[1]), text], 1) for text in texts]
    mask = [torch.arange(length, device=text.device)[None] >= length - text.shape[1] for text in texts]
    return torch.cat(rows), torch.cat(mask).long()


def listed(values: Iterable[Any]) -> str:
    """Values joined by commas, for a message."""
    return ", ".join(map(str, values))
