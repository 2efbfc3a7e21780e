"""Memory against a decoder written out here, in every way of feeding tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cache_of, cached, fast_first, feed

from patchkit import parse_spec, patch_model, report, unpatch_model
from patchkit.errors import StreamError
from patchkit.patches.memory import Memory
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model

SINKS, WINDOW, SLOTS, BLOCK, TOKENS = 2, 8, 5, 4, 60
LOGITS, DIFFERS = TOLERANCES[torch.float32].logits, TOLERANCES[torch.float32].differs
WAYS = [[1] * TOKENS, [7] * 8 + [4], [13] + [1] * 5 + [30, 11, 1], [TOKENS]]


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def memory(shared=2, **options) -> Memory:
    return Memory(**{**dict(sinks=SINKS, window=WINDOW, slots=SLOTS, block=BLOCK, shared=shared, budgets="equal"), **options})


def remembering(family="llama", **options):
    return patch_model(tiny_model(family), memory(**options), verbose=False)


def close(actual, expected):
    assert logit_error(actual, expected) <= LOGITS


@torch.no_grad()
def by_definition(model, ids, sinks=SINKS, window=WINDOW, slots=SLOTS, block=BLOCK, shared=2, rotated=False, limit=512):
    """A Llama written out, token by token, with lists of what each kv head keeps: no cache, no mask, no ring."""
    config = model.config
    dim, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim)

    def turned(x, position):
        angle = (position * frequencies).repeat(2)
        return x * angle.cos() + torch.cat([-x[dim // 2 :], x[: dim // 2]]) * angle.sin()

    def distance(t, j):
        turn = limit // 8 // block * block
        return t - j - turn * sum(border - j > limit - turn for border in range(turn, t + 1, turn))

    layers = [dict(k=[], v=[], kept=[[] for _ in range(groups // shared)]) for _ in model.model.layers]
    logits = []
    for t, token in enumerate(ids[0]):
        hidden = model.model.embed_tokens(token)
        for number, (layer, held) in enumerate(zip(model.model.layers, layers, strict=True)):
            if t and t % block == 0:
                keys = torch.stack(
                    [torch.stack([turned(k[g], j) if rotated else k[g] for g in range(groups)]) for j, k in enumerate(held["k"])]
                )
                for pool, kept in enumerate(held["kept"]):
                    for j in range(max(sinks, t - window), t - window + block):
                        for g in range(pool * shared, (pool + 1) * shared):
                            cosine = torch.cosine_similarity(keys[j, g], keys[:, g].mean(0), dim=0)
                            kept.append((-round(cosine.item() * 4096), j, g))
                    kept.sort(key=lambda item: (-item[0], *item[1:]))
                    del kept[(slots if isinstance(slots, int) else slots[number]) * shared :]
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q = attention.q_proj(x).view(heads, dim).double()
            k, v = (p(x).view(groups, dim).double() for p in (attention.k_proj, attention.v_proj))
            held["k"].append(k)
            held["v"].append(v)
            mixed = []
            for head in range(heads):
                g = head // (heads // groups)
                seen = {j: t - j for j in range(max(0, t - window + 1), t + 1)}
                seen |= {j: distance(t, j) for _, j, its in held["kept"][g // shared] if its == g and j <= t - window}
                seen |= {j: min(t, limit - 1) - j for j in range(min(sinks, t + 1))}
                scores = torch.stack([held["k"][j][g] @ turned(q[head], distance) for j, distance in seen.items()])
                mixed.append((scores * dim**-0.5).softmax(0) @ torch.stack([held["v"][j][g] for j in seen]))
            hidden = hidden + attention.o_proj(torch.cat(mixed).float())
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.stack(logits)[None]


# -- what it computes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"shared": 1}, {"slots": 1, "block": 6}, {"slots": (2, 7)}], ids=str)
def test_every_way_of_feeding_gives_the_logits_of_the_definition(family, options):
    model, ids = tiny_model(family), tokens()
    expected = by_definition(model, ids, **options)
    window = by_definition(model, ids, slots=0)
    assert (window - expected)[:, SINKS + WINDOW :].abs().max() > DIFFERS, "the slots change nothing here"
    if isinstance(options.get("slots"), tuple):
        options = {"budgets": options["slots"]}
    patch_model(model, memory(**options), verbose=False)
    for way in WAYS:
        close(feed(model, ids, way)[0], expected)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False)
    close(out.logits, expected)
    assert cache_of(out) is None


def short_positions(limit=64):
    model = tiny_model("llama")
    model.config.max_position_embeddings = limit
    return model


def test_what_is_far_stays_at_distances_that_the_model_knows():
    ids, options = tokens(length=150), dict(slots=12)
    expected = by_definition(short_positions(), ids, limit=64, **options)
    assert (by_definition(short_positions(), ids, **options) - expected).abs().max() > DIFFERS, "nothing is far here"
    model = patch_model(short_positions(), memory(**options), verbose=False)
    for way in ([150], [1] * 150, [7] * 21 + [3]):
        close(feed(model, ids, way)[0], expected)
    cache = feed(model, ids[:, :60], [60])[1]
    cache.activate_past_recording()
    for start in range(60, 130):
        cache = feed(model, torch.cat([ids[:, start : start + 1], tokens(length=9, seed=start)], 1), [10], cache=cache)[1]
        cache.crop(-9)
    close(feed(model, ids[:, 130:], [20], cache=cache)[0], expected[:, 130:])


def test_a_wrong_block_budget_or_rotation_would_be_seen():
    model, ids = tiny_model("llama"), tokens()
    ours = feed(remembering(), ids, [TOKENS])[0]
    for wrong in (
        dict(block=BLOCK + 1),
        dict(slots=SLOTS + 1),
        dict(shared=1),
        dict(rotated=True),
        dict(window=WINDOW - 1),
        dict(sinks=SINKS + 1),
    ):
        assert (by_definition(model, ids, **wrong) - ours).abs().max() > DIFFERS, wrong


FED = ["gpt_neox", "glm", "cohere2", "gemma3_text", "gemma2", "gpt_oss", "qwen3_next", "smollm3", "stablelm", "mixtral", "llama_dynamic"]


@pytest.mark.parametrize("family", fast_first(FED, ["gemma3_text", "gpt_oss", "qwen3_next"]))
def test_logits_do_not_depend_on_how_tokens_are_fed(family):
    ids, model = tokens(), remembering(family, shared=1)
    whole = feed(model, ids, [TOKENS])[0]
    for way in WAYS[:3]:
        close(feed(model, ids, way)[0], whole)
    assert report(model).patches[0].hits["tokens offered to the slots"] > 0


def test_a_text_that_fits_is_the_unpatched_model():
    model, ids = tiny_model("llama"), tokens(length=SINKS + WINDOW)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    patch_model(model, memory(), verbose=False)
    for way in ([SINKS + WINDOW], [1] * (SINKS + WINDOW), [3, 7]):
        close(feed(model, ids, way)[0], plain)


def test_with_room_for_all_it_is_the_unpatched_model():
    model, ids = tiny_model("llama"), tokens()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    patch_model(model, memory(slots=TOKENS), verbose=False)
    for way in WAYS:
        close(feed(model, ids, way)[0], plain)


# -- rows -------------------------------------------------------------------------------------------------------------------


def test_each_row_of_a_left_padded_batch_equals_the_row_alone():
    model = remembering()
    rows = [(0, tokens()), (1, tokens(seed=4)), (5, tokens(seed=5)), (15, tokens(seed=6))]
    alone = [feed(model, row[:, : TOKENS - pad], [TOKENS - pad])[0] for pad, row in rows]
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), row[:, : TOKENS - pad]], 1) for pad, row in rows])
    mask = torch.stack([(torch.arange(TOKENS) >= pad).long() for pad, _ in rows])
    for way in WAYS:
        logits = feed(model, batch, way, mask)[0]
        for i, (pad, _) in enumerate(rows):
            close(logits[i, pad:], alone[i][0])


def test_rows_can_be_selected_repeated_and_reordered():
    model, ids = remembering(), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = feed(model, ids, [TOKENS], mask)[0]
    order = torch.tensor([2, 1, 1])
    for start in (9, 21, 40):
        cache = feed(model, ids[:, :start], [start], mask)[1]
        cache.reorder_cache(order)
        close(feed(model, ids[order, start:], [1] * (TOKENS - start), cache=cache)[0], expected[order, start:])
        cache = feed(model, ids[:, :start], [1] * start, mask)[1]
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        close(feed(model, ids[[1, 1], start:], [TOKENS - start], mask[[1, 1]], cache)[0], expected[[1, 1], start:])


def test_a_prompt_is_read_once_and_copies_of_its_cache_go_on():
    model, ids = remembering(), tokens()
    expected = feed(model, ids, [TOKENS])[0]
    prompt = feed(model, ids[:, :33], [33])[1]
    for way in ([TOKENS - 33], [1] * (TOKENS - 33)):
        close(feed(model, ids[:, 33:], way, cache=copy.deepcopy(prompt))[0], expected[:, 33:])
    assert prompt.get_seq_length() == 33
    both = copy.deepcopy((model, prompt))
    close(feed(both[0], ids[:, 33:], [TOKENS - 33], cache=both[1])[0], expected[:, 33:])


def test_beams_follow_their_own_slots():
    model, ids = remembering(), tokens(length=30)
    options = dict(num_beams=3, max_new_tokens=20, do_sample=False, pad_token_id=127, eos_token_id=None)
    beams = model.generate(ids, **options)
    assert torch.equal(beams, model.generate(ids, use_cache=False, **options))


# -- bytes, reset, undo -----------------------------------------------------------------------------------------------------


def test_bytes_stay_constant_and_reset_starts_over():
    model, ids = remembering(), tokens(length=90)
    expected, cache = feed(model, ids, [30] * 3)
    kept = cache.n_bytes()
    for i in range(20):
        cache = feed(model, tokens(length=BLOCK + i, seed=i), [1] * i + [BLOCK], cache=cache)[1]
    assert cache.n_bytes() == kept
    cache.reset()
    close(feed(model, ids, [90], cache=cache)[0], expected)


def test_unpatching_restores_the_model():
    model = tiny_model("llama")
    before = snapshot(model)
    patch_model(model, memory(), verbose=False)
    feed(model, tokens(), [TOKENS])
    unpatch_model(model)
    assert_restored(before, model)


def test_gradients_reach_what_the_slots_hold():
    model, ids = remembering(), tokens()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, use_cache=False).logits[:, -1].sum().backward()
    # The last query sees nothing of the first half but through slots, in both layers or through the window of the first.
    assert embedded.grad is not None and embedded.grad[:, SINKS : TOKENS // 2].abs().max() > 0


# -- rollback ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("drafted", [3, 9, 20])
def test_tokens_are_taken_back_across_borders(family, drafted):
    model, ids, wrong = remembering(family, shared=1), tokens(), tokens(length=TOKENS + 20, seed=9)
    expected = feed(model, ids, [TOKENS])[0]
    cache = feed(model, ids[:, :3], [3])[1]
    cache.activate_past_recording()
    for position in range(3, TOKENS - 1):
        fed = torch.cat([ids[:, position : position + 1], wrong[:, position + 1 : position + 1 + drafted]], 1)
        logits, cache = feed(model, fed, [drafted + 1] if position % 2 else [1] * (drafted + 1), cache=cache)
        close(logits[:, 0], expected[:, position])
        cache.crop(-drafted)
        assert cache.get_seq_length() == position + 1


def test_padded_rows_are_taken_back_across_borders():
    model, ids = remembering(), tokens(2)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = feed(model, ids, [TOKENS], mask)[0]
    cache = feed(model, ids[:, :14], [14], mask)[1]
    cache.activate_past_recording()
    for start in range(14, 50):
        fed = torch.cat([ids[:, start : start + 1], tokens(2, 5, seed=start)], 1)
        with torch.no_grad():
            out = model(input_ids=fed, attention_mask=mask[:, : start + 6], **cached(cache))
        close(out.logits[:, 0], expected[:, start])
        cache.crop(-5)


def test_a_rollback_that_was_not_recorded_is_refused_and_changes_nothing():
    model, ids = remembering(), tokens()
    expected = feed(model, ids, [TOKENS])[0]
    for start, count in ((40, 6), (9, 3)):  # of the second, only a border was not recorded
        cache = feed(model, ids[:, :start], [start])[1]
        with pytest.raises(StreamError, match="activate_past_recording"):
            cache.crop(-count)
        close(feed(model, ids[:, start:], [TOKENS - start], cache=cache)[0], expected[:, start:])


def test_rollback_across_a_rebase():
    """Positions are bounded by 512 here: the first wrong tokens pass that, and are rolled back."""
    model, ids = remembering(), tokens(length=520)
    expected = feed(model, ids, [520])[0]
    cache = feed(model, ids[:, :480], [480])[1]
    cache.activate_past_recording()
    _, cache = feed(model, tokens(length=60, seed=9), [20] + [1] * 40, cache=cache)
    assert cache.stream.base.max() > 480
    cache.crop(-60)
    close(feed(model, ids[:, 480:], [1] * 20 + [20], cache=cache)[0], expected[:, 480:])


# -- with other patches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["prompt_lookup", "suffix"])
def test_speculation_writes_the_same_text(draft):
    ids = tokens(length=40).repeat(1, 2)
    options = dict(max_new_tokens=40, do_sample=False, pad_token_id=127, eos_token_id=None)
    plain = remembering().generate(ids, **options)
    both = patch_model(tiny_model("llama"), memory(), *parse_spec(f"speculative(k=4, draft={draft})"), verbose=False)
    assert torch.equal(both.generate(ids, **options), plain)


def test_steps_are_one_graph_with_eager_logits():
    compiling = 'compile(backend="eager")'
    plain, model = remembering(), patch_model(tiny_model("llama"), memory(), *parse_spec(compiling), verbose=False)
    ids = tokens(2, length=90)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    feed(model, ids[:, :4], [3, 1], mask[:, :4])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for first in (3, 9, 30):
            way = [first] + [1] * (90 - first)
            close(feed(model, ids, way, mask)[0], feed(plain, ids, way, mask)[0])
    assert report(model).patches[-1].hits["compiled steps"] > 200


def test_options_out_of_range_are_refused():
    for wrong, said in ((dict(slots=0), "slots=0"), (dict(block=9), "block=9"), (dict(sinks=-1), "sinks=-1"), (dict(shared=3), "shared=3")):
        with pytest.raises(ValueError, match=said):
            patch_model(tiny_model("llama"), memory(**wrong), verbose=False)
