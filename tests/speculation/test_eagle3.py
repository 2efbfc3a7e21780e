"""Heads that read the outputs of three decoder layers (EAGLE-3) get, while generating, what they were trained on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit import Speculative, patched
from patchkit.speculation import Chain, Eagle, Medusa, PromptLookup, statistics_of
from patchkit.speculation.eagle_chain import EagleChain
from patchkit.speculation.heads import EagleHead, MedusaHeads
from patchkit.training.heads import three_layers, train_heads
from patchkit.training.heads_loss import hidden_states

PROMPT = torch.arange(3, 15)[None]


def small() -> Any:
    """A random Llama of four layers whose greedy text is soon foreseen."""
    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained() -> tuple[Any, EagleHead]:
    model = small()
    texts = (torch.randint(61, (64, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(24)) % 61 + 3
    heads: Any = train_heads(model, texts, "eagle3", steps=60, depth=2, batch=16, length=24, on_policy=0.5, progress=False)
    return model, heads


def written(model: Any, ids: torch.Tensor = PROMPT, **options: Any) -> torch.Tensor:
    given = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(ids))
    return model.generate(ids, **given | options)


def test_layers_of_small_and_large_models() -> None:
    def of(depth: int) -> tuple[int, ...]:
        model = small()
        model.model.layers = torch.nn.ModuleList(list(model.model.layers[:1]) * depth)
        model.config.num_hidden_layers = depth
        return three_layers(model)

    assert [of(depth) for depth in (1, 2, 4, 30)] == [(0,), (0, 1), (1, 2, 3), (2, 15, 27)]


@pytest.mark.parametrize(
    "patches", ["", "streaming(sinks=2, window=60)", "compile", pytest.param("gemv", marks=pytest.mark.filterwarnings("ignore"))]
)
def test_features_are_those_of_the_sequence(patches: str, trained: tuple[Any, EagleHead], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of a call a session holds what one forward over the whole text gives, through the head's own map."""
    model, head = trained
    plain = written(model)
    sessions: list[EagleChain] = []
    begun = EagleChain.__init__

    def keep(self: EagleChain, *args: Any) -> None:
        begun(self, *args)
        sessions.append(self)

    monkeypatch.setattr(EagleChain, "__init__", keep)
    given = [Speculative(draft=Eagle(head), k=3)]
    with patched(model, *([patches] if patches else []), *given, verbose=False):
        assert torch.equal(written(model), plain)
        accepted = statistics_of(model).acceptance_rate
    session = sessions[-1]
    known = session.known[0]
    with torch.no_grad():
        wanted = head.features(hidden_states(model, plain[:, :known], head.layers))
        wrong = head.features(hidden_states(model, plain[:, :known], (0, 2, 3)))
    assert session.features is not None and known > 30 and accepted
    torch.testing.assert_close(session.features[:, :known], wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(session.features[:, :known], wrong, rtol=1e-2, atol=1e-2)


def test_in_batches_chains_and_copies(trained: tuple[Any, EagleHead]) -> None:
    model, head = trained
    ids = torch.cat([PROMPT, PROMPT + 9, PROMPT + 30])
    plain = written(model, ids)
    drafts = Chain((PromptLookup(min_ngram=4), Medusa(MedusaHeads.start(model, 2)), Eagle(head, tree="chain")))
    for draft in (Eagle(head), Chain((Eagle(head), Medusa(MedusaHeads.start(model, 2)))), drafts):
        with patched(model, Speculative(draft=draft, k=3), verbose=False):
            assert torch.equal(written(model, ids), plain)
            assert statistics_of(model).accepted > 0
            copied = copy.deepcopy(model)
        assert torch.equal(written(copied, ids), plain)
        assert statistics_of(copied).accepted > 0
