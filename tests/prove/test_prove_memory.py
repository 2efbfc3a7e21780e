"""`prove` never has the logits of a long text in memory, however large the vocabulary is."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from support import matrix
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.prove.checks import compare, feeding
from patchkit.prove.checks.compare import difference
from patchkit.prove.proof import Proof
from patchkit.prove.prove import prove
from patchkit.spec import parse_spec
from patchkit.testing import logit_error

VOCABULARY = 20_011
# Logits of 131 positions; the longest text has 1,032.
MOST_BYTES = 10 << 20


class Logits(TorchDispatchMode):
    """Counts bytes of tensors whose last dimension is the vocabulary, other than weights.

    Attributes:
        largest: bytes of the largest.
        alive: the most bytes of all that were alive at once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {parameter.data_ptr() for parameter in model.parameters()}
        self.largest = self.alive = 0
        self._known: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [each for each in tree_leaves(out) if torch.is_tensor(each) and each.ndim > 1 and each.shape[-1] == VOCABULARY]
        found = [each for each in found if each.data_ptr() not in self.weights]
        if found:
            self._known = [known for known in self._known if known() is not None] + [weakref.ref(each) for each in found]
            alive = {
                each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for known in self._known if (each := known()) is not None
            }
            self.largest, self.alive = max(self.largest, *(each.nbytes for each in found)), max(self.alive, sum(alive.values()))
        return out


def measured(spec: str, only: list[str] | None = None) -> Logits:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config).eval()
    documents = [torch.randint(3, VOCABULARY, (530,)) for _ in range(2)]
    proof = Proof(spec, "float32")
    with Logits(model) as logits:
        prove(proof, model, parse_spec(spec), documents, passkeys=lambda distance, trial: (list(range(distance)), 4), fast=True, only=only)
    assert proof.passed, [f"{check.promise}: {check.detail}" for check in proof.broken]
    return logits


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "MOST_BYTES", MOST_BYTES)
    monkeypatch.setattr(compare, "_AT_ONCE", 1 << 20)


@pytest.mark.parametrize("spec", [matrix("streaming(window=508)"), "mlp_int8"])
def test_logits_of_a_long_text_are_never_in_memory(spec: str, little_memory: None) -> None:
    found = measured(spec)
    assert found.largest <= MOST_BYTES
    # One side that is held, one forward of the other, and what is worked out on the way.
    assert found.alive <= 5 * MOST_BYTES


def test_whole_logits_would_be_seen() -> None:
    """With room for all of them the same run has them in memory, and the counter says so."""
    found = measured("streaming(window=508)", only=["any chunking gives the same logits"])
    assert found.largest > 7 * MOST_BYTES


# -- in pieces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 43], [20, 20, 10]])
def test_differences_do_not_depend_on_the_pieces(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_AT_ONCE", 4096)
    generator = torch.Generator().manual_seed(0)
    expected = 30 * torch.randn(2, 50, 130, generator=generator)
    actual = expected + 1e-3 * torch.randn(expected.shape, generator=generator)
    found = difference(actual.split(sizes, 1), expected.split([13, 37], 1))
    assert found.largest == pytest.approx(logit_error(actual, expected), rel=1e-6)
    worst = (actual.double() - expected.double()).square().mean(-1).sqrt().max().item()
    assert found.position == pytest.approx(worst, rel=1e-5)


@pytest.mark.parametrize(
    ("actual", "expected", "infinite"), [(-torch.inf, -torch.inf, False), (-torch.inf, 1.0, True), (torch.nan, 1.0, True)]
)
def test_infinities_count_unless_both_sides_have_them(actual: float, expected: float, infinite: bool) -> None:
    left, right = torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)
    left[0, 1, 2], right[0, 1, 2] = actual, expected
    assert (difference([left], [right]).largest == torch.inf) is infinite
    assert difference([left], [right]).largest == logit_error(left, right)


def test_texts_of_different_lengths_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        difference([torch.zeros(1, 3, 5)], [torch.zeros(1, 4, 5)])
    with pytest.raises(ValueError, match="shape"):
        difference([torch.zeros(1, 3, 5)], [torch.zeros(1, 3, 6)])


@pytest.mark.parametrize("length", [1, 8, 40, 160, 161, 552, 2056])
@pytest.mark.parametrize("thorough", [True, False])
def test_every_way_of_feeding_feeds_the_whole_text(length: int, thorough: bool) -> None:
    for way in (feeding.in_chunks(length, [28, 1024, 2048], thorough), feeding.one_by_one(length, 28)):
        assert sum(way) == length and all(size > 0 for size in way)


def test_single_tokens_are_fed_where_positions_begin_anew() -> None:
    """In a text of 2,056 tokens of a model that keeps 28 of them and counts to 1,024."""
    for thorough in (True, False):
        ends, alone = 0, set()
        for size in feeding.in_chunks(2056, [28, 1024, 2048], thorough):
            ends += size
            alone |= {ends - 1} if size == 1 else set()
        assert thorough or alone >= {28, 1024, 2048}


def test_positions_that_are_watched_hold_the_places_where_something_happens() -> None:
    assert feeding.watched(100, bytes_of_one=1000) is None
    found = feeding.watched(2056, 4 * 152_000, [28, 1024, 2048])
    assert found is not None and found.tolist() == sorted(set(found.tolist())) and found.numel() <= feeding.that_fit(4 * 152_000)
    assert {0, 2055, *range(1020, 1030), *range(24, 34)} <= set(found.tolist())
