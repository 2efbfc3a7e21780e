"""Windows and slots in int8, against attention over keys and values that are rounded here, in float64.

A number between two codes may become either of them where the last bits of the model's dtype differ. So results are compared by what
rounding to int8 changes: a computation is right if it is ten times nearer to the definition than the unrounded one is.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools

import pytest
import torch
from oracle import oracle_logits
from support import cached, fast_first, feed, matrix
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit import PrefixCache, StreamingLLM, parse_spec, patch_model, report, unpatch_model
from patchkit.errors import StreamError, UnsupportedModel
from patchkit.patches.memory import Memory
from patchkit.prefix.written_state import read_into, written
from patchkit.streaming.runtime import runtime_of
from patchkit.testing import assert_restored, snapshot, tiny_model

SINKS, WINDOW, TOKENS = 2, 6, 40
WAYS = [[1] * TOKENS, [7] * 5 + [5], [13] + [1] * 5 + [20, 1, 1], [TOKENS]]
STREAMING = StreamingLLM(SINKS, WINDOW)
MEMORY = Memory(sinks=SINKS, window=8, slots=5, block=4, shared=2, budgets="equal")
BOTH = pytest.mark.parametrize("patch", [STREAMING, MEMORY], ids=lambda patch: patch.name)


def in_int8(patch):
    return dataclasses.replace(patch, kv="int8")


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def rounding(patch, family="llama"):
    return patch_model(tiny_model(family), in_int8(patch), verbose=False)


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


class Close:
    """Compare with logits that are right: ``size`` is the RMS of what rounding to int8 changes in them."""

    def __init__(self, size: float) -> None:
        assert size > 1e-4, "rounding changes nothing on this input, so it discriminates nothing"
        self.size = size

    def __call__(self, found: torch.Tensor, right: torch.Tensor) -> None:
        assert rms(found - right) <= self.size / 10


def close_to(patch, ids=None, family="llama") -> Close:
    ids = tokens() if ids is None else ids
    plain = patch_model(tiny_model(family), patch, verbose=False)
    way = [ids.shape[1]]
    return Close(rms(feed(plain, ids, way)[0] - feed(rounding(patch, family), ids, way)[0]))


# -- the definition -----------------------------------------------------------------------------------------------------------


def round_vectors(x, per="head", scales=torch.bfloat16, levels=127):
    """[..., heads, D] to the codes of its largest number, in float64."""
    wide = x.double()
    largest = wide.abs().amax({"head": -1, "token": (-1, -2)}[per], keepdim=True)
    scale = (largest / levels).to(scales).double()
    return ((wide / scale).round().clamp(-levels, levels) * scale).to(x.dtype)


def with_rounded_states(model, **options):
    """Hooks that round what the model computes as keys, before it rotates them, and as values. YaRN scales keys as it rotates them."""
    factor = getattr(getattr(model.model, "rotary_emb", None), "attention_scaling", 1.0)

    def hook(factor, module, args, out):
        heads = out if out.ndim == 4 else out.unflatten(-1, (-1, model.config.head_dim))
        return (round_vectors(heads * factor, **options) / factor).view(out.shape)

    for layer in model.model.layers:
        attention = layer.self_attn
        getattr(attention, "k_norm", attention.k_proj).register_forward_hook(functools.partial(hook, factor))
        attention.v_proj.register_forward_hook(functools.partial(hook, 1.0))
    return model


def definition(family, ids, patch, **options):
    model = with_rounded_states(tiny_model(family), **options)
    return oracle_logits(model, ids, patch.sinks, patch.window, patch.positions)


FAMILIES = ["llama", "qwen2", "glm", "gemma3_text", "gpt_oss", "qwen3", "cohere2", "llama_yarn", "llama_dynamic", "mixtral", "smollm3"]


FAST = [("llama", "cache"), ("glm", "true"), ("gemma3_text", "cache")]


@pytest.mark.parametrize(("family", "positions"), fast_first(itertools.product(FAMILIES, ["cache", "true"]), FAST))
def test_every_way_of_feeding_gives_the_logits_of_rounded_keys_and_values(family, positions):
    patch, ids = StreamingLLM(SINKS, WINDOW, positions), tokens()
    expected = definition(family, ids, patch)
    close = Close(rms(oracle_logits(tiny_model(family), ids, SINKS, WINDOW, positions) - expected))
    model = rounding(patch, family)
    for way in WAYS:
        close(feed(model, ids, way)[0], expected)
    with torch.no_grad():
        close(model(input_ids=ids, use_cache=False).logits, expected)


def test_another_rounding_would_be_seen():
    ids, close = tokens(), close_to(STREAMING)
    ours = feed(rounding(STREAMING), ids, [TOKENS])[0]
    for wrong in (dict(per="token"), dict(scales=torch.float32), dict(levels=126)):
        assert rms(definition("llama", ids, STREAMING, **wrong) - ours) > close.size / 5, wrong


@pytest.mark.parametrize("limit", [None, 64])
def test_slots_are_those_of_a_model_whose_keys_and_values_are_rounded(limit):
    """Memory itself is held to its definition by test_memory.py. Beyond 64 positions what is far moves closer."""
    length = 40 if limit is None else 110

    def limited(model):
        model.config.max_position_embeddings = limit or model.config.max_position_embeddings
        return model

    ids, close = tokens(length=length), close_to(MEMORY)
    expected = feed(patch_model(with_rounded_states(limited(tiny_model("llama"))), MEMORY, verbose=False), ids, [length])[0]
    model = patch_model(limited(tiny_model("llama")), in_int8(MEMORY), verbose=False)
    for way in ([length], [33] + [1] * (length - 33)):
        close(feed(model, ids, way)[0], expected)
    with torch.no_grad():
        close(model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, matrix(torch.float16)])
@pytest.mark.parametrize("patch", [STREAMING, matrix(MEMORY)], ids=lambda patch: patch.name)
def test_sixteen_bits(patch, dtype):
    """Of the same patched model in fp32, 16 bits are as far away in int8 as they are without: rounding to int8 adds its own noise."""
    ids = tokens()
    exact = feed(rounding(patch), ids, [TOKENS])[0]
    plain = [feed(patch_model(tiny_model("llama").to(kind), patch, verbose=False), ids, [TOKENS])[0] for kind in (dtype, torch.float32)]
    allowed = 2 * (rms(plain[0] - plain[1]) + rms(exact - plain[1]))
    model = patch_model(tiny_model("llama").to(dtype), in_int8(patch), verbose=False)
    for way in WAYS:
        logits, cache = feed(model, ids, way)
        assert logits.dtype == dtype and rms(logits - exact) <= allowed
        assert all(layer.keys.dtype == torch.int8 for layer in cache.own_layers)


# -- rows, copies, rollback -----------------------------------------------------------------------------------------------------


@BOTH
def test_each_row_of_a_left_padded_batch_equals_the_row_alone(patch):
    model, close = rounding(patch), close_to(patch)
    rows = [(0, tokens()), (1, tokens(seed=4)), (5, tokens(seed=5)), (11, tokens(seed=6))]
    alone = [feed(model, row[:, : TOKENS - pad], [TOKENS - pad])[0] for pad, row in rows]
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), row[:, : TOKENS - pad]], 1) for pad, row in rows])
    mask = torch.stack([(torch.arange(TOKENS) >= pad).long() for pad, _ in rows])
    for way in WAYS:
        logits = feed(model, batch, way, mask)[0]
        for i, (pad, _) in enumerate(rows):
            close(logits[i, pad:], alone[i][0])


@BOTH
def test_rows_are_selected_and_reordered_and_states_are_copied_and_written(patch):
    model, ids, close = rounding(patch), tokens(3), close_to(patch)
    expected, order = feed(model, ids, [TOKENS])[0], torch.tensor([2, 0, 1])
    for start in (5, 21):
        rest = [1] * (TOKENS - start)
        cache = feed(model, ids[:, :start], [start])[1]
        again = read_into(runtime_of(model.model).plan.new_cache(), written(copy.deepcopy(cache)))
        for other in (copy.deepcopy(cache), again):
            close(feed(model, ids[:, start:], [TOKENS - start], cache=other)[0], expected[:, start:])
        cache.reorder_cache(order)
        close(feed(model, ids[order, start:], rest, cache=cache)[0], expected[order, start:])
    cache.reset()
    close(feed(model, ids, [TOKENS], cache=cache)[0], expected)


@BOTH
def test_tokens_are_rolled_back_exactly(patch):
    model, ids, close = rounding(patch), tokens(2), close_to(patch)
    ids[0, :3] = 0
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    expected = feed(model, ids, [TOKENS], mask)[0]
    cache = feed(model, ids[:, :5], [5], mask[:, :5])[1]
    cache.activate_past_recording()
    for start in range(5, TOKENS - 10):
        fed = torch.cat([ids[:, start : start + 1], tokens(2, 9, seed=start)], 1)
        found, cache = feed(model, fed, [10] if start % 2 else [1] * 10, mask[:, : start + 10], cache)
        close(found[1:, 0], expected[1:, start])
        close(found[:1, 0], expected[:1, start])
        cache.crop(-9)


def test_a_base_that_moves_rounds_nothing_again():
    """Positions are bounded by 512 here. Wrong tokens pass that, and are rolled back; then 300 steps pass it again."""
    model, ids, close = rounding(STREAMING), tokens(length=800), close_to(STREAMING)
    expected = feed(model, ids, [800])[0]
    cache = feed(model, ids[:, :480], [480])[1]
    cache.activate_past_recording()
    cache = feed(model, tokens(length=60, seed=9), [20] + [1] * 40, cache=cache)[1]
    assert cache.stream.base.max() > 480
    cache.crop(-60)
    close(feed(model, ids[:, 480:], [1] * 300 + [20], cache=cache)[0], expected[:, 480:])


# -- bytes, and what it goes with ----------------------------------------------------------------------------------------------


def wide_model(dtype):
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=64, vocab_size=128)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).eval().to(dtype)


@pytest.mark.parametrize("patch", [StreamingLLM(4, 252), Memory(window=64, slots=192, budgets="equal")], ids=lambda patch: patch.name)
def test_bytes_are_half_of_sixteen_bits_and_a_quarter_of_fp32(patch):
    ids = tokens(length=300)
    for dtype, share in ((torch.float16, 0.55), (torch.bfloat16, 0.55), (torch.float32, 0.3)):
        kept = []
        for each in (patch, in_int8(patch)):
            cache = feed(patch_model(wide_model(dtype), each, verbose=False), ids, [280, 20])[1]
            kept.append(cache.n_bytes())
        assert kept[1] <= share * kept[0]
        assert all(layer.keys.shape[-1] == 64 + 2 for layer in cache.own_layers)


@pytest.mark.parametrize("patch", [STREAMING, matrix(MEMORY)], ids=lambda patch: patch.name)
def test_steps_are_one_graph_with_eager_logits(patch):
    plain, model = rounding(patch), patch_model(tiny_model("llama"), in_int8(patch), *parse_spec('compile(backend="eager")'), verbose=False)
    ids, close = tokens(2, length=60), close_to(patch)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    feed(model, ids[:, :4], [3, 1], mask[:, :4])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first in (3, 30):
            way = [first] + [1] * (60 - first)
            close(feed(model, ids, way, mask)[0], feed(plain, ids, way, mask)[0])
    assert report(model).patches[-1].hits["compiled steps"] > 80


@pytest.mark.parametrize("patch", [matrix(STREAMING, id="streaming"), matrix(MEMORY, id="memory")])
def test_compiled_code_rounds_as_eager_code_does(patch):
    """A compiler may leave out casts, and did: scales were not rounded, and every vector was wrong by up to half a per cent."""
    model, ids, close = patch_model(tiny_model("llama"), in_int8(patch), *parse_spec("compile"), verbose=False), tokens(), close_to(patch)
    close(feed(model, ids, [5] + [1] * 35)[0], feed(rounding(patch), ids, [TOKENS])[0])
    assert report(model).patches[-1].hits["compiled steps"] > 30


@BOTH
def test_texts_are_the_same_with_drafts_and_with_a_kept_prompt(patch, tmp_path):
    ids = tokens(length=20).repeat(1, 2)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=127, eos_token_id=None)
    plain = rounding(patch).generate(ids, **options)
    drafting = patch_model(tiny_model("llama"), in_int8(patch), *parse_spec("speculative(k=4, draft=prompt_lookup)"), verbose=False)
    assert torch.equal(drafting.generate(ids, **options), plain)
    kept = PrefixCache(block=8, disk=str(tmp_path))
    for reused in (0, 32):
        model = patch_model(tiny_model("llama"), in_int8(patch), kept, verbose=False)
        assert torch.equal(model.generate(ids, **options), plain)
        assert {each.name: each.hits for each in report(model).patches}["prefix_cache"]["reused tokens"] == reused


def test_beams_follow_their_own_window():
    model, ids = rounding(STREAMING), tokens(length=20)
    options = dict(num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=127, eos_token_id=None)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_inference_mode_and_autocast_may_begin_and_end_within_a_text():
    model, ids, close = rounding(STREAMING), tokens(), close_to(STREAMING)
    expected = feed(model, ids, [TOKENS])[0]
    with torch.inference_mode():
        cache = feed(model, ids[:, :20], [19, 1])[1]
    close(feed(model, ids[:, 20:30], [9, 1], cache=cache)[0], expected[:, 20:30])
    with torch.autocast("cpu", torch.bfloat16):
        cache = feed(model, ids[:, 30:35], [1] * 5, cache=cache)[1]
    assert feed(model, ids[:, 35:], [2, 1, 1, 1], cache=cache)[0].isfinite().all()


def test_unpatching_restores_the_model():
    model = tiny_model("llama")
    before = snapshot(model)
    for patch in (STREAMING, MEMORY):
        patch_model(model, in_int8(patch), verbose=False)
        feed(model, tokens(), [TOKENS])
        unpatch_model(model)
        assert_restored(before, model)


def test_what_it_cannot_do_is_refused():
    for patch in (StreamingLLM, Memory):
        with pytest.raises(ValueError, match=r"kv='int4': give 'model' .* or 'int8'"):
            patch(kv="int4")
    with pytest.raises(ValueError, match="kv='int8' with refresh=reencode"):
        parse_spec("streaming(kv=int8, refresh=reencode(every=4))")
    for family, said in (("bloom", "own function"), ("deepseek_v3", "latent attention")):
        with pytest.raises(UnsupportedModel, match=f'kv="int8" would not be exact.*{said}.*Leave kv out'):
            rounding(STREAMING, family)
    model = rounding(STREAMING)
    cache = feed(model, tokens(length=9), [9])[1]
    for again in ({}, cached(cache)):
        with pytest.raises(StreamError, match="no gradient"):
            model(input_ids=tokens(length=3), use_cache=bool(again), **again)
