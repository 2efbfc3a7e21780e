"""Perplexity of a text streamed through one cache, in total and by position.

A stock evaluation cuts a long text into windows, so a cache never holds more than one of them. Here the whole text goes
through a single cache in chunks: token t is predicted from everything that the cache still holds of tokens 0..t-1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from patchkit import _compat
from patchkit.errors import UnsupportedModel
from patchkit.measure.texts import TextError

Progress = Callable[[int], object]

# Neighbouring tokens are hard or easy together, so the error is estimated from means over blocks of this many.
_BLOCK = 32


@dataclass(frozen=True)
class Bucket:
    """Mean negative log-likelihood over a range of positions.

    Attributes:
        start, stop: positions [start, stop) of the tokens that predict; position p predicts token p + 1.
        tokens: number of predictions in the range.
        nll: mean negative log-likelihood, nats per token.
        perplexity: exp(nll).
        stderr: standard error of `nll` in nats; infinite where there is a single block of tokens.
    """

    start: int
    stop: int
    tokens: int
    nll: float
    perplexity: float
    stderr: float


def stream_nll(
    model: PreTrainedModel,
    ids: Sequence[int] | torch.Tensor,
    chunk: int = 512,
    progress: Progress | None = None,
    keep: Callable[[int, Any], object] | None = None,
) -> torch.Tensor:
    """Negative log-likelihood of each token of a text given all before it, streamed through one cache.

    Works for an unpatched and for a patched model. Memory is the cache plus O(chunk · vocabulary).

    Args:
        ids: T token ids, [T].
        chunk: tokens per forward. An exact model gives the same result for every value, up to rounding.
        progress: called after each forward with the number of tokens scored in it.
        keep: called after each forward with the number of tokens seen so far and the cache. The next forward changes that
            cache: copy it to keep it.

    Returns:
        [T - 1] fp32 on the CPU: nats of tokens 1..T-1.

    Raises:
        TextError: fewer than two tokens.
        UnsupportedModel: the model returns no cache, or its position table ends before the text does.
        ValueError: chunk < 1.
    """
    ids = _as_row(ids)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give at least one token per forward")
    cache = None
    scored = []
    with torch.no_grad():
        for start in range(0, len(ids) - 1, chunk):
            targets = ids[start + 1 : start + 1 + chunk]
            block = ids[start : start + len(targets)].to(model.device)
            try:
                out = model(input_ids=block[None], use_cache=True, **{_compat.CACHE: cache})
            except IndexError as error:
                raise UnsupportedModel(
                    f"{type(model).__name__} cannot take tokens {start}..{start + len(block) - 1} ({error}): its position table is "
                    "shorter, or the tokenizer is not its own. Score fewer tokens (--max-tokens)"
                ) from error
            cache = _compat.cache_of(out)
            if cache is None and len(targets) < len(ids) - 1:
                raise UnsupportedModel(f"{type(model).__name__} returns no cache to stream through: score it with one chunk")
            scored.append(_nll(out.logits[0], targets))
            if progress:
                progress(len(targets))
            if keep:
                keep(start + len(targets), cache)
    return torch.cat(scored)


def block_nll(
    model: PreTrainedModel, ids: Sequence[int] | torch.Tensor, block: int = 512, batch: int = 8, progress: Progress | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each token of a text, with the context cut off every `block` tokens: quality at trained lengths.

    Position p sees the tokens from p - p % block on, and no cache is involved.

    Returns:
        [T - 1] fp32 on the CPU, in nats.

    Raises:
        TextError: fewer than two tokens.
    """
    ids = _as_row(ids)
    inputs, targets = ids[:-1], ids[1:]
    whole = len(inputs) // block * block
    groups: list[tuple[torch.Tensor, torch.Tensor]] = []
    if whole:
        groups += zip(inputs[:whole].view(-1, block).split(batch), targets[:whole].view(-1, block).split(batch), strict=True)
    if whole < len(inputs):
        groups.append((inputs[None, whole:], targets[None, whole:]))
    scored = []
    with torch.no_grad():
        for rows, wanted in groups:
            logits = model(input_ids=rows.to(model.device), use_cache=False).logits
            scored.append(_nll(logits.flatten(0, 1), wanted.flatten()))
            if progress:
                progress(wanted.numel())
    return torch.cat(scored)


def by_position(nll: torch.Tensor, edges: Sequence[int]) -> list[Bucket]:
    """Means of `nll` [N] over the position ranges between neighbouring `edges`; ranges past the end are cut or left out.

    Raises:
        ValueError: the edges do not rise.
    """
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise ValueError(f"edges {list(edges)} do not rise: give positions in ascending order")
    buckets = []
    for start, stop in itertools.pairwise(edges):
        stop = min(stop, len(nll))
        if start < stop:
            buckets.append(_bucket(nll[start:stop].double(), start, stop))
    return buckets


def default_edges(tokens: int) -> list[int]:
    """Edges 0, 512, 2k, 8k, 32k, ... up to the end of a text of `tokens` predictions."""
    edges = [0, 512]
    while edges[-1] < tokens:
        edges.append(edges[-1] * 4)
    return edges


def _bucket(nll: torch.Tensor, start: int, stop: int) -> Bucket:
    whole = len(nll) // _BLOCK * _BLOCK
    blocks = nll[:whole].view(-1, _BLOCK).mean(1)
    stderr = blocks.std().item() / math.sqrt(len(blocks)) if len(blocks) > 1 else math.inf
    mean = nll.mean().item()
    return Bucket(start, stop, len(nll), mean, perplexity_of(mean), stderr)


def perplexity_of(nll: float) -> float:
    """exp(nll), infinite where a float cannot hold it."""
    return math.exp(nll) if nll < 700 else math.inf


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none").cpu()


def _as_row(ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
    row = torch.as_tensor(ids, dtype=torch.long, device="cpu").flatten()
    if len(row) < 2:
        raise TextError(f"{len(row)} token(s) leave nothing to predict: give a longer text")
    return row
