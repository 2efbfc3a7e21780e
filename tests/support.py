"""What tests of several folders share: how a cache is handed over, how a text is fed in pieces, and which cases are the long axis."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import pytest
import torch

from patchkit._compat import CACHE, cache_of

__all__ = ["CACHE", "FAMILIES_FAST", "cache_of", "cached", "fast_first", "feed", "matrix"]

# Families that cover, two by two, what anatomies differ in: grouped keys and half rotary; partial rotary and parallel blocks; latent
# attention and experts; sliding beside full layers and two rotaries; ALiBi; learned positions and Conv1D; learned sinks and fused
# experts; recurrent layers.
FAMILIES_FAST = ("llama", "gpt_neox", "deepseek_v3", "gemma3_text", "bloom", "gpt2", "gpt_oss", "qwen3_next")


def cached(cache: Any) -> dict[str, Any]:
    """The cache as an argument of forward or generate, by the name that this transformers has for it: ``model(ids, **cached(cache))``."""
    return {CACHE: cache}


@torch.no_grad()
def feed(model: Any, ids: torch.Tensor, chunks: Iterable[int], mask: torch.Tensor | None = None, cache: Any = None) -> tuple[Any, Any]:
    """Logits [B, T, V] of ``ids`` [B, T] fed in forwards of ``chunks`` tokens, and the cache.

    Args:
        mask: [B, S + T], of the S tokens in ``cache`` and those of ``ids``.
    """
    logits, start = [], 0
    seen = 0 if cache is None else cache.get_seq_length()
    for n in chunks:
        extra = {} if mask is None else {"attention_mask": mask[:, : seen + start + n]}
        out = model(input_ids=ids[:, start : start + n], use_cache=True, **cached(cache), **extra)
        cache = cache_of(out)
        logits.append(out.logits)
        start += n
    assert start == ids.shape[1]
    return torch.cat(logits, 1), cache


def matrix(*values: Any, id: str | None = None) -> Any:
    """A case of ``pytest.mark.parametrize`` that only `make test-all` runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.matrix)


def fast_first(cases: Iterable[Any], fast: Collection[Any] | Callable[[Any], bool] = FAMILIES_FAST) -> list[Any]:
    """Cases for ``pytest.mark.parametrize``: those in ``fast`` (or for which it is true) run always, the others in the matrix.

    A case is a value, or a tuple of the values of several arguments.

    Raises:
        ValueError: ``fast`` chooses none of the cases, or names one that is not among them: the fast layer would lose it in silence.
    """
    cases = list(cases)
    chosen = [case for case in cases if (fast(case) if callable(fast) else case in fast)]
    missing = [] if callable(fast) or fast is FAMILIES_FAST else [case for case in fast if case not in cases]
    if missing or not chosen:
        raise ValueError(f"of the fast cases {missing or fast} none is among {cases}")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in chosen else pytest.mark.matrix) for case in cases
    ]


# Beginnings of Python files, for stdlib-7m.
BEGINNINGS = (
    "def read(path):\n",
    "import os\n\n",
    "class Node:\n    def __init__",
    "for line in",
    "return self.",
    '"""A file',
    "x = [",
    "if not",
)
