"""How timing is set up. Nothing here looks at a clock's reading."""

from __future__ import annotations

import pytest
import torch
from support import cached

from patchkit import StreamingLLM, patch_model
from patchkit.measure.latency import DecodeStream, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.testing import assert_restored, snapshot, tiny_model
from patchkit.views import cache_bytes, twin


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_twin_shares_every_tensor_and_no_module(family: str) -> None:
    model = tiny_model(family)
    other = twin(model)
    assert {p.data_ptr() for p in other.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}
    assert other.config is not model.config


def test_patching_a_twin_leaves_the_model_alone() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    other = patch_model(twin(model), StreamingLLM(sinks=1, window=4), verbose=False)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert not torch.equal(other(input_ids=ids, use_cache=True).logits, model(input_ids=ids, use_cache=True).logits)
    assert_restored(before, model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "deepseek_v3"])
@pytest.mark.parametrize("context", [1, 2, 37])
def test_a_filled_cache_looks_like_a_real_one(family: str, context: int) -> None:
    model = tiny_model(family)
    filled, real = filled_cache(model, context), prefilled_cache(model, context, chunk=16)
    assert filled.get_seq_length() == real.get_seq_length() == context
    for one, other in zip(filled.layers, real.layers, strict=True):
        assert one.keys.shape == other.keys.shape and one.values.shape == other.values.shape
        assert one.keys.dtype == other.keys.dtype
    assert torch.isfinite(model(input_ids=torch.tensor([[5]]), **cached(filled), use_cache=True).logits).all()


def test_a_filled_cache_needs_a_token() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        filled_cache(tiny_model("llama"), 0)


def test_prefill_goes_on_where_it_stopped() -> None:
    model = tiny_model("llama")
    seen: list[int] = []
    cache = prefilled_cache(model, 20, chunk=16, progress=seen.append)
    cache = prefilled_cache(model, 5, chunk=16, cache=cache, progress=seen.append)
    assert cache.get_seq_length() == 25 and seen == [16, 4, 5]


def test_streams_are_stepped_in_turns() -> None:
    model = tiny_model("llama")
    order: list[str] = []

    class Spy(DecodeStream):
        def step(self) -> float:
            order.append(self.cache)
            return 2.0 if self.cache == "a" else 1.0

    timings = decode_latency({"a": Spy(model, "a"), "b": Spy(model, "b")}, rounds=4, warmup=1)
    assert sorted(order[:2]) == ["a", "b"] and len(order) == 10
    assert order[2:6] in (["a", "b", "b", "a"], ["b", "a", "a", "b"])
    assert {name: len(times) for name, times in timings.items()} == {"a": 4, "b": 4}
    assert paired_ratio(timings, "a", "b") == 2.0 and median_ms(timings, "b") == 1.0


def test_a_step_lengthens_the_cache_by_one() -> None:
    model = tiny_model("llama")
    stream = DecodeStream(model, filled_cache(model, 10))
    assert stream.step() > 0
    assert stream.cache.get_seq_length() == 11


def test_cache_bytes_counts_storage_once() -> None:
    model = tiny_model("llama")
    cache = filled_cache(model, 100)
    keys = cache.layers[0].keys
    assert cache_bytes(cache) == 2 * len(cache.layers) * keys.numel() * keys.element_size()
    view = {"a": keys, "b": [keys[:, :, :10]], "model": model}
    assert cache_bytes(view) == keys.numel() * keys.element_size()


def test_a_streaming_cache_does_not_grow() -> None:
    model = patch_model(tiny_model("llama"), StreamingLLM(sinks=2, window=30), verbose=False)
    stream = DecodeStream(model, prefilled_cache(model, 40, chunk=16))
    stream.step()
    before = cache_bytes(stream.cache)
    for _ in range(50):
        stream.step()
    assert cache_bytes(stream.cache) == before
