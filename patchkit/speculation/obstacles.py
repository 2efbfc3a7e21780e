"""The test whether a model can verify or draft: it is run on a few tokens, not known by name."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat
from patchkit.speculation.cached_model import CachedModel, make_cache
from patchkit.tolerance import TOLERANCES, logit_error
from patchkit.views import evaluating


def find_obstacle(model: Any, drafts: bool = False) -> tuple[str | None, bool]:
    """Feed a short sequence in pieces with rollbacks in between, and compare with one token at a time.

    Args:
        drafts: the model only drafts. It may then round differently where it is fed several tokens (int8 activations do), but rolled-back
            tokens must leave no trace: the comparison is with the same pieces after a rollback of other tokens.

    Returns:
        The reason why nothing can be verified exactly, or None; and whether rows may advance by different numbers of tokens.
    """
    probe = _probe_rollback if drafts else _probe
    with evaluating(model), torch.no_grad():
        errors: dict[bool, float] = {}
        for ragged in (True, False):
            try:
                errors[ragged] = probe(model, ragged)
            except Exception as error:
                if not ragged:
                    return f"it failed when a forward of several tokens was rolled back ({type(error).__name__}: {error})", False
                errors[ragged] = float("inf")
            if errors[ragged] <= TOLERANCES[model.dtype].logits:
                return None, ragged
    if drafts:
        return f"tokens that were rolled back change later logits (by {errors[False]:.2g})", False
    return f"a forward of several tokens gives other logits than one token at a time (by {errors[False]:.2g})", False


def _probe_rollback(model: Any, ragged: bool) -> float:
    """Largest change of later logits by the tokens that were rolled back. Rows and counts are those of `_probe`."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text, pads, counts = _probe_tokens(model, vocabulary), [0, 2], [1, 3] if ragged else [1, 1]

    def run(wrong: int) -> torch.Tensor:
        fed = CachedModel(model, make_cache(model), pads, ragged)
        if ragged and not fed.ragged:
            return text.new_full((1,), torch.inf, dtype=torch.float32)
        fed.forward(text[:, :9])
        fed.keep([9, 9])
        fed.record()
        fed.forward((text[:, 9:13] + wrong) % vocabulary)
        fed.keep([0, 0])
        piece = text[:, 9:13].clone()
        for row, count in enumerate(counts):
            piece[row, count:] = (piece[row, count:] + wrong) % vocabulary
        fed.forward(piece)
        fed.keep(counts)
        return fed.forward(torch.stack([row[9 + count : 13 + count] for row, count in zip(text, counts, strict=True)]))

    first, second = run(1), run(2)
    return logit_error(first, second) if bool(first.isfinite().all()) else float("inf")


def _probe_tokens(model: Any, vocabulary: int) -> torch.Tensor:
    return (torch.arange(40, device=model.device).reshape(2, 20) * 7 + 3) % vocabulary


def _probe(model: Any, ragged: bool) -> float:
    """Largest error of logits after a rollback, in 2 rows, the second left-padded, that keep 1 and 3 of 4 tokens, or both 1."""
    pads = [0, 2]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text = _probe_tokens(model, vocabulary)
    fed = CachedModel(model, make_cache(model), pads, ragged)
    if ragged and not fed.ragged:
        return float("inf")
    fed.forward(text[:, :9])
    fed.keep([9, 9])
    fed.record()
    fed.forward((text[:, 9:13] + 1) % vocabulary)  # wrong tokens
    fed.keep([0, 0])
    fed.forward(text[:, 9:13])
    counts = [1, 3] if ragged else [1, 1]
    fed.keep(counts)
    got = fed.forward(torch.stack([row[9 + count : 13 + count] for row, count in zip(text, counts, strict=True)]))

    plain = CachedModel(model, _compat.DynamicCache(config=model.config), pads, ragged=False)
    steps = []
    for start, end in [(0, 9), *((i, i + 1) for i in range(9, 16))]:
        steps.append(plain.forward(text[:, start:end])[:, -1])
        plain.keep([end - start] * 2)
    wanted = torch.stack([torch.stack(steps, 1)[row, 1 + count : 5 + count] for row, count in enumerate(counts)])
    return logit_error(got, wanted)
