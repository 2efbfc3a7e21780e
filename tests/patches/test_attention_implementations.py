"""A patch of attention holds for every implementation that a model offers, not for its default alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import oracle_logits
from tiny_configs import tiny_model

from patchkit import patch_model
from patchkit._compat import CACHE, cache_of
from patchkit.attention import original_function
from patchkit.testing import TOLERANCES, logit_error

SINKS, WINDOW, TOKENS = 2, 6, 20
TOLERANCE = TOLERANCES[torch.float32].logits
# modernbert-decoder's eager attention adds a mask without asking whether there is one; gemma2's caps scores, gpt_oss's has learned sinks,
# which sdpa does not.
BOTH, EAGER = ["llama", "modernbert-decoder"], ["gemma2", "gpt_oss"]


def tokens() -> torch.Tensor:
    return torch.randint(4, 99, (1, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def fed(model: Any, size: int) -> torch.Tensor:
    cache, parts = None, []
    for piece in tokens().split(size, dim=1):
        out = model(input_ids=piece, use_cache=True, **{CACHE: cache})
        cache = cache_of(out)
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("family", "implementation"), [*((family, "eager") for family in BOTH + EAGER), *((family, "sdpa") for family in BOTH)]
)
def test_streaming_is_exact(family: str, implementation: str) -> None:
    plain = tiny_model(family, attn="eager")
    model = tiny_model(family, attn=implementation)
    expected = oracle_logits(plain, tokens(), SINKS, WINDOW)
    assert logit_error(fed(plain, TOKENS), expected) > TOLERANCE  # the window matters on this text
    patch_model(model, f"streaming(sinks={SINKS}, window={WINDOW})", verbose=False)
    for size in (1, 5, TOKENS):
        assert logit_error(fed(model, size), expected) <= TOLERANCE, size


@pytest.mark.parametrize("spec", ["streaming(sinks=2, window=6)", "linear(window=6)"])
def test_the_models_own_implementation_computes(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another that it supports too, which may round, cap or count differently."""
    called: list[str] = []

    def noted(implementation: str, module: Any) -> Any:
        called.append(implementation)
        return original_function(implementation, module)

    monkeypatch.setattr("patchkit.streaming.attention.original_function", noted)
    monkeypatch.setattr("patchkit.attention.original_function", noted)
    model = patch_model(tiny_model("llama", attn="eager"), spec, verbose=False)
    called.clear()
    fed(model, 5)
    fed(model, 1)
    assert set(called) == {"eager"}
