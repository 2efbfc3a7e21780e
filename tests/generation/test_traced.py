"""Forwards as traces: what they give, and when none is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from speculation import plain_text, text_of
from support import cached
from torch import nn

from patchkit import patched
from patchkit.cache.ragged import RaggedCache
from patchkit.generation.drafters.draft_model import DraftModel
from patchkit.generation.traced import Traced, _traces
from patchkit.patches.speculative import Speculative
from patchkit.testing import TOLERANCES, logit_error, tiny_model


def filled(model: Any, lengths: list[int]) -> tuple[RaggedCache, torch.Tensor]:
    ids = torch.randint(3, 128, (len(lengths), 20), generator=torch.Generator().manual_seed(0))
    cache = RaggedCache(model.config.num_hidden_layers)
    model(input_ids=ids[:, : max(lengths)], **cached(cache), use_cache=True)
    cache.keep(max(lengths), lengths)
    return cache, ids


@torch.no_grad()
@pytest.mark.parametrize("lengths", ([9], [9, 9], [9, 6]))
@pytest.mark.parametrize("family", ("llama", "gpt_neox", "qwen3", "mixtral", "opt"))
def test_a_trace_gives_what_the_model_gives(family: str, lengths: list[int]) -> None:
    model = tiny_model(family)
    cache, ids = filled(model, lengths)
    traced = Traced(model, cache, [0] * len(lengths), verifies=False)
    for tokens in (1, 3, 1):  # one after the other, each behind what the one before has fed
        starts = cache.offsets.tolist() if cache.offsets is not None else [cache.layers[0].seen] * len(lengths)
        fed = torch.stack([ids[row, start : start + tokens] for row, start in enumerate(starts)])
        result = traced.forward(fed)
        assert result is not None
        for row, start in enumerate(starts):
            wanted = model(ids[row : row + 1, : start + tokens]).logits[:, -tokens:]
            assert logit_error(result[0][row : row + 1], wanted) <= TOLERANCES[torch.float32].logits
        if cache.offsets is None:
            cache.keep(tokens, [tokens] * len(lengths))


class Peeking(nn.Module):
    """A feed-forward block that looks into its input to decide what to do, and lies about where it comes from."""

    __module__ = "transformers.models.peeking"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if float(x.abs().sum()) < 1e9 else -self.inner(x)


def test_a_model_that_looks_into_tensors_verifies_untraced() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp = Peeking(model.model.layers[0].mlp)
    wanted = text_of(model, 1, 60)
    with patched(model, Speculative(draft=DraftModel(tiny_model("llama")), k=2), verbose=False):
        assert torch.equal(text_of(model, 1, 60), wanted)
        assert serves(model) and verifying(model) is None


def test_hooks_and_foreign_modules_are_not_traced_away() -> None:
    model, calls = tiny_model("llama"), []
    with patched(model, Speculative(draft=DraftModel(tiny_model("llama")), k=2), verbose=False):
        assert serves(model) and verifying(model) is not None
        hook = model.model.layers[1].register_forward_hook(lambda *args: calls.append(1))
        assert not serves(model)
        assert torch.equal(text_of(model, 1, 40), plain_text("llama", 1)[:, :52])
        hook.remove()
        assert calls
    with patched(model, "mlp_int8(mode=weight_only)", Speculative(draft="prompt_lookup"), verbose=False):
        assert not serves(model)


@torch.no_grad()
def test_one_trace_serves_every_shape_at_which_the_model_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_model("llama"), []
    make = Traced._make
    monkeypatch.setattr(Traced, "_make", lambda self, arguments: made.append(1) or make(self, arguments))
    for lengths in ([9, 6, 8], [9, 7]):
        for tokens in (2, 5, 3, 4):
            cache, ids = filled(model, lengths)
            result = Traced(model, cache, [0] * len(lengths), verifies=True).forward(
                torch.stack([ids[row, n : n + tokens] for row, n in enumerate(lengths)])
            )
            assert result is not None
            for row, n in enumerate(lengths):
                wanted = model(ids[row : row + 1, : n + tokens]).logits[:, -tokens:]
                assert logit_error(result[0][row : row + 1], wanted) <= TOLERANCES[torch.float32].logits
    assert len(made) == 1


class Counting(nn.Module):
    """A feed-forward block that does something else with three tokens."""

    __module__ = "transformers.models.counting"

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.inner(x) if x.shape[1] == 3 else self.inner(x)


@torch.no_grad()
def test_a_shape_at_which_the_model_does_something_else_is_not_traced() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp = Counting(model.model.layers[0].mlp)
    results = {}
    for tokens in (3, 5, 2, 4, 3):
        cache, ids = filled(model, [9])
        results[tokens] = Traced(model, cache, [0], verifies=True).forward(ids[:, 9 : 9 + tokens])
    assert results[3] is not None and all(results[tokens] is None for tokens in (5, 2, 4))


@torch.no_grad()
def test_changed_weights_of_a_draft_are_noticed() -> None:
    model = tiny_model("llama")
    for factor in (1.0, -2.0):
        model.lm_head.weight.mul_(factor)
        cache, ids = filled(model, [9])
        result = Traced(model, cache, [0], verifies=False).forward(ids[:, 9:12])
        assert result is not None and logit_error(result[0], model(ids[:, :12]).logits[:, -3:]) <= TOLERANCES[torch.float32].logits


def _faster_rotation(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 5


def _other_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 5.0


def _other_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Tanh()


@pytest.mark.parametrize("change", (_faster_rotation, _other_scaling, _other_activation))
def test_a_model_that_was_changed_between_texts_is_traced_anew(change: Any) -> None:
    model = tiny_model("llama")
    with patched(model, Speculative(draft=DraftModel(tiny_model("llama")), k=3), verbose=False):
        before = text_of(model, 2, 40)
        change(model)
        after = text_of(model, 2, 40)
        assert serves(model) and verifying(model) is not None
    assert torch.equal(text_of(model, 2, 40), after) and not torch.equal(before, after)


def test_a_hook_on_all_modules_is_not_traced_away() -> None:
    model = tiny_model("llama")
    with patched(model, Speculative(draft="prompt_lookup"), verbose=False):
        hook = nn.modules.module.register_module_forward_hook(lambda *args: None)
        try:
            assert not serves(model)
        finally:
            hook.remove()
        assert serves(model)


@torch.no_grad()
def test_traces_of_weights_that_were_changed_are_dropped() -> None:
    model = tiny_model("llama")
    for _ in range(3):
        model.lm_head.weight.mul_(0.9)
        cache, ids = filled(model, [9])
        Traced(model, cache, [0], verifies=False).forward(ids[:, 9:12])
    assert len(_traces[model]) == 1


def serves(model: Any) -> bool:
    return Traced.serves(model, RaggedCache(model.config.num_hidden_layers), verifies=True)


@torch.no_grad()
def verifying(model: Any) -> Any:
    cache, ids = filled(model, [9])
    return Traced(model, cache, [0], verifies=True).forward(ids[:, 9:12])
