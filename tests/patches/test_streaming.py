"""StreamingLLM against the brute-force oracle, in every way of feeding tokens."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from oracle import OracleUnsupported, oracle_logits
from support import CACHE, FAMILIES_FAST, cache_of, cached, fast_first, feed, matrix
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from patchkit import StreamingLLM, patch_model, report, unpatch_model
from patchkit.errors import NothingMatched, StreamError, UnsupportedModel
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.rollback_log import ROLLBACK
from patchkit.testing import TOLERANCES, logit_error, tiny_model

SINKS, WINDOW, TOKENS = 2, 6, 30
LOGITS, DIFFERS = TOLERANCES[torch.float32].logits, TOLERANCES[torch.float32].differs

# One family per way in which positions, windows and caches differ.
EXACT = [
    "llama", "llama_yarn", "llama_llama3", "llama_dynamic", "llama_linear", "gpt_neox", "phi", "stablelm", "persimmon", "glm", "cohere",
    "cohere2", "smollm3", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "qwen3_moe", "qwen3", "deepseek_v3", "deepseek_v2", "bloom",
    "mpt", "nemotron_h", "qwen3_next", "lfm2",
]  # fmt: skip
# Their recurrent layers lose the padding when a row's pads come in more than one forward, unpatched too.
RECURRENT = {"nemotron_h", "qwen3_next", "lfm2"}
ONE_BIAS_FOR_ALL_ROWS = {"mpt"}
# Their forward takes no positions, so the oracle cannot give it true ones.
NO_TRUE_POSITIONS = {"bloom", "mpt"}


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_layer_llama(**options):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512
    )
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, initializer_range=0.2, **sizes, **options))
    return model.eval()


def close(actual, expected):
    assert logit_error(actual, expected) <= LOGITS


RULES = [
    (family, positions) for family in EXACT for positions in ("cache", "true") if positions == "cache" or family not in NO_TRUE_POSITIONS
]


@pytest.mark.parametrize(("family", "positions"), fast_first(RULES, lambda rule: rule[0] in FAMILIES_FAST))
def test_every_way_of_feeding_gives_the_oracles_logits(family, positions):
    model, ids = tiny_model(family), tokens()
    expected = oracle_logits(model, ids, SINKS, WINDOW, positions)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    assert (plain - expected)[:, -1].abs().max() > DIFFERS, "the window changes nothing on this input, so it discriminates nothing"
    patch_model(model, StreamingLLM(SINKS, WINDOW, positions))
    ways = {
        "1": [1] * 30,
        "5": [5] * 6,
        "7": [7, 7, 7, 7, 2],
        "whole": [30],
        "fill exactly": [8] + [1] * 22,
        "mixed": [12] + [1] * 6 + [3] + [1] * 9,
    }
    for way in ways.values():
        close(feed(model, ids, way)[0], expected)
    with torch.no_grad():
        close(model(input_ids=ids, use_cache=False).logits, expected)
    assert report(model).patches[0].hits["tokens evicted"] > 0


@pytest.mark.parametrize("family", sorted(NO_TRUE_POSITIONS))
def test_the_oracle_has_no_true_positions_for_alibi(family):
    with pytest.raises(OracleUnsupported, match="takes no position_ids"):
        oracle_logits(tiny_model(family), tokens(), SINKS, WINDOW, "true")


@pytest.mark.parametrize("family", fast_first(["llama", "gpt_neox", "deepseek_v3", "gemma3_text"], ["llama", "deepseek_v3"]))
def test_a_wrong_window_sink_or_position_would_be_seen(family):
    model, ids = tiny_model(family), tokens()
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    ours = feed(model, ids, [5] * 6)[0]
    unpatch_model(model)
    wrong = {"window": (SINKS, WINDOW + 1, "cache"), "sinks": (SINKS - 1, WINDOW, "cache"), "positions": (SINKS, WINDOW, "true")}
    for arguments in wrong.values():
        assert (oracle_logits(model, ids, *arguments) - ours).abs().max() > DIFFERS


@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
def test_longer_windows_and_chunks(chunk):
    model, ids = tiny_model("llama"), tokens(length=128)
    expected = oracle_logits(model, ids, 4, 28)
    patch_model(model, StreamingLLM(4, 28))
    close(feed(model, ids, [min(chunk, 128 - i) for i in range(0, 128, chunk)])[0], expected)


@pytest.mark.parametrize("family", fast_first(EXACT))
def test_a_text_that_fits_is_the_unpatched_model(family):
    model, ids = tiny_model(family), tokens(length=SINKS + WINDOW)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    for way in ([SINKS + WINDOW], [1] * (SINKS + WINDOW), [3, 5]):
        close(feed(model, ids, way)[0], plain)


@pytest.mark.parametrize("family", fast_first(family for family in EXACT if family not in ONE_BIAS_FOR_ALL_ROWS))
def test_each_row_of_a_left_padded_batch_equals_the_row_alone(family):
    model, ids = tiny_model(family), tokens()
    rows = [(0, ids), (1, tokens(seed=4)), (5, tokens(seed=5)), (11, tokens(seed=6))]
    alone = [oracle_logits(model, row[:, : TOKENS - pad], SINKS, WINDOW) for pad, row in rows]
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), row[:, : TOKENS - pad]], 1) for pad, row in rows])
    mask = torch.stack([(torch.arange(TOKENS) >= pad).long() for pad, _ in rows])
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    ways = [[TOKENS], [12] + [1] * 18] + ([] if family in RECURRENT else [[1] * TOKENS, [7, 7, 7, 7, 2], [3] * 10])
    for way in ways:
        logits = feed(model, batch, way, mask)[0]
        for i, (pad, _) in enumerate(rows):
            close(logits[i, pad:], alone[i][0])


def test_a_bias_shared_by_all_rows_refuses_left_padding():
    model = patch_model(tiny_model("mpt"), StreamingLLM(SINKS, WINDOW))
    with pytest.raises(StreamError, match="left-padded"):
        model(tokens(2), attention_mask=torch.tensor([[0] * 3 + [1] * 27, [1] * 30]))


def test_right_padding_is_ignored():
    model, ids = tiny_model("llama"), tokens(2)
    expected = oracle_logits(model, ids[:1, :20], SINKS, WINDOW)
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    close(logits[:1, :20], expected)


def test_going_on_after_right_padding_is_refused():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens(2)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    out = model(input_ids=ids, attention_mask=mask, use_cache=True)
    with pytest.raises(StreamError, match="between tokens"):
        model(input_ids=ids[:, :1], attention_mask=torch.cat([mask, torch.ones(2, 1)], 1), **cached(cache_of(out)))


def test_gradients_flow_in_evaluation_mode():
    model, ids = tiny_model("llama"), tokens()
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    whole = model(input_ids=ids).logits
    whole.sum().backward()
    cache, steps = None, []
    for i in range(TOKENS):
        out = model(input_ids=ids[:, i : i + 1], **cached(cache))
        cache = cache_of(out)
        steps.append(out.logits)
    close(torch.cat(steps, 1).detach(), whole.detach())


# -- rollback, batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "positions"),
    fast_first(
        itertools.product(["llama", "gpt_neox", "deepseek_v3", "gemma3_text", "bloom", "gpt_oss"], ["cache", "true"]),
        [("llama", "true"), ("deepseek_v3", "cache"), ("gemma3_text", "cache"), ("bloom", "cache")],
    ),
)
def test_rollback_before_at_and_after_the_window_fills(family, positions):
    model, ids = tiny_model(family), tokens(length=48)
    patch_model(model, StreamingLLM(SINKS, WINDOW, positions))
    expected = feed(model, ids, [48])[0]
    wrong = tokens(length=48, seed=9)
    for drafted in (1, 3, 5):
        cache = None
        with torch.no_grad():
            cache = cache_of(model(input_ids=ids[:, :3], use_cache=True))
            cache.activate_past_recording()
            position = 3
            while position + drafted + 1 < 48:
                # One right token, then wrong ones, rolled back.
                fed = torch.cat([ids[:, position : position + 1], wrong[:, position + 1 : position + 1 + drafted]], 1)
                out = model(input_ids=fed, **cached(cache), use_cache=True)
                close(out.logits[:, 0], expected[:, position])
                cache.crop(-drafted)
                position += 1
                assert cache.get_seq_length() == position


def test_rollback_over_several_single_steps():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens(length=40)
    expected = feed(model, ids, [40])[0]
    with torch.no_grad():
        cache = feed(model, ids[:, :5], [5])[1]
        cache.activate_past_recording()
        for start in range(5, 36):
            _, cache = feed(model, tokens(length=4, seed=start), [1] * 4, cache=cache)
            cache.crop(-4)
            out = model(input_ids=ids[:, start : start + 1], **cached(cache))
            close(out.logits[:, 0], expected[:, start])


@pytest.mark.parametrize("positions", ["cache", "true"])
def test_rollback_of_more_tokens_than_the_window_holds_and_across_a_rebase(positions):
    """Positions are bounded by 512 here: the first wrong tokens pass that, and are rolled back."""
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW, positions)), tokens(length=520)
    expected = feed(model, ids, [520])[0]
    cache = feed(model, ids[:, :480], [480])[1]
    cache.activate_past_recording()
    _, cache = feed(model, tokens(length=60, seed=9), [20] + [1] * 40, cache=cache)
    assert cache.stream.base.max() > 480
    cache.crop(-60)
    close(feed(model, ids[:, 480:], [1] * 20 + [20], cache=cache)[0], expected[:, 480:])


def test_rollback_of_what_was_not_recorded_is_refused_and_changes_nothing():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens(length=20)
    expected = feed(model, ids, [20])[0]
    _, cache = feed(model, ids[:, :15], [15])
    with pytest.raises(StreamError, match="activate_past_recording"):
        cache.crop(-3)
    close(feed(model, ids[:, 15:], [5], cache=cache)[0], expected[:, 15:])
    cache.activate_past_recording()
    _, cache = feed(model, tokens(length=ROLLBACK + 9), [ROLLBACK + 9], cache=cache)
    with pytest.raises(StreamError, match="at most"):
        cache.crop(-ROLLBACK - 1)
    cache.crop(-ROLLBACK)
    with pytest.raises(StreamError, match="at most"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="minus"):
        cache.crop(3)


def test_left_padded_rollback():
    model, ids = tiny_model("llama"), tokens(2, length=40)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    expected = feed(model, ids, [40], mask)[0]
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids[:, :6], attention_mask=mask[:, :6]))
        cache.activate_past_recording()
        for start in range(6, 36):
            fed = torch.cat([ids[:, start : start + 1], tokens(2, 3, seed=start)], 1)
            out = model(input_ids=fed, attention_mask=mask[:, : start + 4], **cached(cache))
            close(out.logits[:, 0], expected[:, start])
            cache.crop(-3)


def test_rows_can_be_selected_repeated_and_reordered():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens(3, length=24)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = feed(model, ids, [24], mask)[0]
    for start in (4, 8, 14):
        cache = feed(model, ids[:, :start], [start], mask)[1]
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        close(feed(model, ids[order, start:], [1] * (24 - start), cache=cache)[0], expected[order, start:])
        cache = feed(model, ids[:, :start], [1] * start, mask)[1]
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        close(feed(model, ids[[1, 1], start:], [1] * (24 - start), cache=cache)[0], expected[[1, 1], start:])


def test_reset_starts_over():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens()
    expected, cache = feed(model, ids, [TOKENS])
    cache.reset()
    assert cache.get_seq_length() == 0
    close(feed(model, ids, [4] + [1] * 26, cache=cache)[0], expected)


# -- memory and length ------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The largest tensor, in elements, that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_a_long_prompt_in_chunks_needs_memory_for_window_and_chunk_only():
    model = patch_model(tiny_model("llama"), StreamingLLM(4, 60))
    largest = {}
    for length in (512, 4096):
        cache = None
        with LargestTensor() as watch, torch.no_grad():
            for chunk in tokens(length=length).split(64, 1):
                cache = cache_of(model(input_ids=chunk, **cached(cache), use_cache=True, logits_to_keep=1))
        largest[length] = watch.elements
    # `ids` itself is the only thing that grows.
    assert largest[4096] <= max(largest[512], 4096)
    with LargestTensor() as watch, torch.no_grad():
        model(input_ids=tokens(length=8192), logits_to_keep=1)
    assert watch.elements < 8192 * 8192 // 8, "one whole forward must not make a matrix of all pairs"


def tensors_alive() -> int:
    """By type: to ask some of the objects of torch for their class is deprecated."""
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("steps", [10_000, matrix(100_000)])
def test_cache_bytes_stay_constant_over_many_steps(steps):
    model = patch_model(one_layer_llama(), StreamingLLM(2, 6))
    ids = tokens(length=64)
    with torch.inference_mode():
        _, cache = feed(model, ids, [1] * 64)
        layer = cache.own_layers[0]
        n_bytes, addresses = cache.n_bytes(), [t.data_ptr() for t in (layer.keys, layer.values, layer.unrotated.raw)]
        assert n_bytes == sum(t.numel() * 4 for t in (layer.keys, layer.values, *layer.unrotated))
        slot, cos, sin = cache.stream.fixed_tensors(layer.rule)
        gc.collect()
        alive = tensors_alive()
        for i in range(steps):
            # One attention layer alone, as a decoder would run it: the model's other layers have no state.
            cache.stream.begin(1, cache.own_layers, ids.device, in_place=True)
            layer.update(layer.keys[:, :, :1] * 0 + i % 7, layer.values[:, :, :1] * 0)
            cache.stream.commit()
        gc.collect()
        assert tensors_alive() <= alive + 2
    assert cache.n_bytes() == n_bytes
    assert addresses == [t.data_ptr() for t in (layer.keys, layer.values, layer.unrotated.raw)]
    assert (
        cache.stream.fixed_tensors(layer.rule)[0] is slot
        and cache.stream.fixed_tensors(layer.rule)[1] is cos
        and cache.stream.fixed_tensors(layer.rule)[2] is sin
    )
    assert cache.get_seq_length() == 64 + steps


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "length", "one_by_one"),
    [(DYNAMIC, 100_000, 1200), matrix({"rope_type": "default"}, 1_000_000, 8000), matrix(DYNAMIC, 1_000_000, 8000)],
)
def test_a_million_tokens_end_where_float64_ends(scaling, length, one_by_one):
    """Positions are bounded by 512, so the base moves several times in the single steps at the end; a tenth of it in the fast layer."""
    model = one_layer_llama(rope_parameters={"rope_theta": 10000.0, **scaling})
    ids = tokens(length=length)
    patch_model(model, StreamingLLM(4, 60))
    cache = None
    with torch.inference_mode():
        for chunk in ids[:, : length - one_by_one].split(8000, 1):
            cache = cache_of(model(input_ids=chunk, **cached(cache), use_cache=True, logits_to_keep=1))
        for start in range(length - one_by_one, length):
            out = model(input_ids=ids[:, start : start + 1], **cached(cache))
    assert cache.get_seq_length() == length
    unpatch_model(model)
    # With one layer, the last logits are those of the unpatched model on what is visible.
    with torch.no_grad():
        expected = model.double()(input_ids=torch.cat([ids[:, :4], ids[:, -60:]], 1)).logits[:, -1]
    assert (out.logits[:, -1] - expected).abs().max() < 1e-3


def test_shifting_all_positions_by_a_million_changes_nothing():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens()
    positions = torch.arange(TOKENS)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, position_ids=positions).logits
        shifted = model(input_ids=ids, position_ids=positions + 1_000_000).logits
    assert torch.equal(plain, shifted)


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "error", "reason"),
    [
        ("gpt2", UnsupportedModel, "positions are baked into"),
        ("opt", UnsupportedModel, "positions are baked into"),
        ("falcon", UnsupportedModel, "computes attention itself"),
        ("mamba", NothingMatched, "no attention layers"),
        ("mistral", NothingMatched, "already has its own window"),
    ],
)
def test_models_that_could_not_be_exact_are_refused_with_the_reason(family, error, reason):
    model = tiny_model(family)
    with pytest.raises(error, match=reason):
        patch_model(model, StreamingLLM(SINKS, WINDOW))
    with torch.no_grad():
        model(input_ids=tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(window=0), "window=0.*at least 1"),
        (dict(sinks=-1), "sinks=-1.*at least 0"),
        (dict(window=2.5), "window=2.5"),
        (dict(positions="absolute"), "positions='absolute'"),
        (dict(layers=()), "layers=()"),
    ],
)
def test_bad_options_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        StreamingLLM(**options)


def test_a_window_larger_than_the_model_can_use_is_refused_with_the_largest():
    model = tiny_model("llama")
    limit = model.config.max_position_embeddings
    with pytest.raises(UnsupportedModel, match=f"window={limit - 4} or less"):
        patch_model(model, StreamingLLM(4, limit))
    patch_model(model, StreamingLLM(4, limit - 4))


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(NothingMatched, match="layer 7 has no full attention"):
        patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW, layers=[0, 7]))


def test_foreign_caches_are_refused():
    model, ids = tiny_model("llama"), tokens()
    stock = cache_of(model(input_ids=ids, use_cache=True))
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    for cache in (stock, DynamicCache(config=model.config)):
        with pytest.raises(StreamError, match=f"Leave {CACHE} out"):
            model(input_ids=ids[:, :1], **cached(cache))
    ours = cache_of(model(input_ids=ids, use_cache=True))
    assert isinstance(ours, StreamingCache)
    other = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW))
    with pytest.raises(StreamError, match="another model"):
        other(input_ids=ids[:, :1], **cached(ours))
    unpatch_model(model)
    with pytest.raises(StreamError, match="not patched"):
        model(input_ids=ids[:, :1], **cached(ours))
    assert torch.isfinite(model(input_ids=ids).logits).all()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (dict(position_ids=torch.tensor([[*range(15), *range(15)]])), "packed"),
        (dict(attention_mask=torch.ones(1, 1, TOKENS, TOKENS)), "2-D"),
        (dict(attention_mask=torch.ones(1, 12)), "must cover all tokens"),
        (dict(attention_mask=torch.tensor([[1] * 9 + [0] + [1] * 20])), "zeros between tokens"),
        (dict(output_attentions=True), "output_attentions"),
    ],
)
def test_inputs_that_could_not_be_exact_are_refused(extra, message):
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW))
    with pytest.raises(StreamError, match=message):
        model(input_ids=tokens(), **extra)
    assert torch.isfinite(model(input_ids=tokens()).logits).all()


def test_a_forward_that_failed_half_way_leaves_a_cache_that_says_so():
    model, ids = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), tokens()
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
        original = model.model.layers[1].mlp.forward
        model.model.layers[1].mlp.forward = lambda x: (_ for _ in ()).throw(RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            model(input_ids=ids[:, :1], **cached(cache))
        model.model.layers[1].mlp.forward = original
        with pytest.raises(StreamError, match="failed half-way"):
            model(input_ids=ids[:, :1], **cached(cache))
        close(model(input_ids=ids).logits, feed(model, ids, [TOKENS])[0])


# -- layers= ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "cohere", "gemma3_text"])
def test_other_layers_keep_all_keys(family):
    model, ids = tiny_model(family), tokens()
    layer = {"gemma3_text": 1}.get(family, 0)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    patch_model(model, StreamingLLM(SINKS, WINDOW, layers=[layer]))
    whole = feed(model, ids, [TOKENS])[0]
    for way in ([1] * TOKENS, [7, 7, 7, 7, 2]):
        close(feed(model, ids, way)[0], whole)
    unpatch_model(model)
    if family == "gemma3_text":  # the other layer slides: the same as patching all
        close(whole, oracle_logits(model, ids, SINKS, WINDOW))
    else:
        close(whole, oracle_logits(model, ids, SINKS, WINDOW, layers=[layer]))
        assert (whole - plain).abs().max() > DIFFERS
