"""RefreshLite: re-encoding against the oracle of streaming, dynamic sinks against a decoder written out here, in every way of feeding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from oracle import oracle_logits
from support import cache_of, cached, fast_first, feed

from patchkit import StreamingLLM, parse_spec, patch_model, report, unpatch_model
from patchkit.anatomy.target import Target
from patchkit.errors import PatchConflict, SpecError, StreamError, UnsupportedModel
from patchkit.search.sweep import TailInsert
from patchkit.streaming.heavy_hitters import DynamicSinks
from patchkit.streaming.reencode import Reencode
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model

SINKS, WINDOW, EVERY, KEPT, TOKENS = 2, 6, 4, 3, 28
LOGITS, DIFFERS = TOLERANCES[torch.float32].logits, TOLERANCES[torch.float32].differs
WAYS = [[1] * 28, [7, 7, 7, 7], [28], [12] + [1] * 6 + [9, 1]]
FORMS = [Reencode(EVERY), DynamicSinks(KEPT, EVERY)]


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def refreshed(refresh, family="llama", window=WINDOW):
    return patch_model(tiny_model(family), StreamingLLM(SINKS, window, refresh=refresh), verbose=False)


def greedy(model, ids, new=25, **options):
    options = {"pad_token_id": 127, "suppress_tokens": [127], "eos_token_id": None, "do_sample": False, **options}
    return model.generate(ids, max_new_tokens=new, **options)


def reencoded_by_definition(model, ids, every=EVERY, window=WINDOW, sinks=SINKS):
    """Every ``every`` tokens a new text begins: the sinks, the window, and what comes after."""
    size = sinks + window
    logits = [oracle_logits(model, ids[:, : size + every], sinks, window)]
    for i in range(size + every, ids.shape[1], every):
        text = torch.cat([ids[:, :sinks], ids[:, i - window : i + every]], 1)
        logits.append(oracle_logits(model, text, sinks, window)[:, size:])
    return torch.cat(logits, 1)


@torch.no_grad()
def dynamic_by_definition(model, ids, kept=KEPT, every=EVERY, window=WINDOW, sinks=SINKS, at_tail=False, fair=True):
    """A Llama written out, token by token, with lists of what each kv head sees: no cache, no mask, no ring."""
    config, size = model.config, sinks + kept + window
    dim, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim)

    def rotated(x, position):
        angle = (position * frequencies).repeat(2)
        return x * angle.cos() + torch.cat([-x[dim // 2 :], x[: dim // 2]]) * angle.sin()

    kinds = ("first", "chosen", "near", "gone")
    state = [[{**{kind: [] for kind in kinds}, "mass": {}} for _ in range(groups)] for _ in model.model.layers]
    logits = []
    for t, token in enumerate(ids[0]):
        hidden = model.model.embed_tokens(token)
        for layer, per_group in zip(model.model.layers, state, strict=True):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q = attention.q_proj(x).view(heads, dim).double()
            k, v = (p(x).view(groups, dim).double() for p in (attention.k_proj, attention.v_proj))
            mixed = []
            for group, held in enumerate(per_group):
                if t >= size + every and (t - size) % every == 0:
                    for item in held["chosen"]:
                        held["mass"][item[0]] *= window / (window + every) if fair else 1
                    ranked = sorted(held["chosen"] + held["gone"], key=lambda item: -held["mass"][item[0]])
                    held["chosen"], held["gone"] = sorted(ranked[:kept], key=lambda item: item[0]), []
                kind = "first" if t < sinks else "chosen" if t < sinks + kept else "near"
                held[kind].append((t, k[group], v[group]))
                if len(held["near"]) > window:
                    held["gone"].append(held["near"].pop(0))
                seen = held["first"] + held["chosen"] + held["near"]
                places = list(range(len(seen)))
                if at_tail and t >= size + every:
                    places[sinks : sinks + kept] = range(size - kept, size)
                keys = torch.stack([rotated(key, place) for (_, key, _), place in zip(seen, places, strict=True)])
                values = torch.stack([value for _, _, value in seen])
                held["mass"][t] = 0.0
                for head in range(group * heads // groups, (group + 1) * heads // groups):
                    weights = (keys @ rotated(q[head], len(seen) - 1) * dim**-0.5).softmax(0)
                    for (j, _, _), weight in zip(seen, weights.tolist(), strict=True):
                        held["mass"][j] += weight
                    mixed.append(weights @ values)
            hidden = hidden + attention.o_proj(torch.cat(mixed).float())
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.stack(logits)[None]


# -- what it computes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    fast_first(["llama", "gpt_neox", "deepseek_v3", "bloom", "llama_dynamic", "gpt_oss"], ["llama", "deepseek_v3", "llama_dynamic"]),
)
def test_reencoding_is_streaming_over_a_text_that_begins_anew(family):
    model, ids = tiny_model(family), tokens()
    window = 8 if family == "gpt_oss" else WINDOW  # its sliding layers see 8 tokens
    expected = reencoded_by_definition(model, ids, window=window)
    plain = oracle_logits(model, ids, SINKS, window)
    assert (plain - expected)[:, SINKS + window + EVERY :].abs().max() > DIFFERS, "re-encoding changes nothing here"
    patch_model(model, StreamingLLM(SINKS, window, refresh=Reencode(EVERY)), verbose=False)
    for way in WAYS:
        assert logit_error(feed(model, ids, way)[0], expected) <= LOGITS
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False)
    assert logit_error(out.logits, expected) <= LOGITS and cache_of(out) is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dynamic_sinks_are_the_tokens_with_the_most_attention(family):
    model, ids = tiny_model(family), tokens()
    if family == "llama":
        assert model.config.num_key_value_heads < model.config.num_attention_heads
    expected = dynamic_by_definition(model, ids)
    patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=DynamicSinks(KEPT, EVERY)), verbose=False)
    for way in WAYS:
        assert logit_error(feed(model, ids, way)[0], expected) <= LOGITS
    with torch.no_grad():
        assert logit_error(model(input_ids=ids, use_cache=False).logits, expected) <= LOGITS


def test_wrong_times_tokens_and_places_would_be_seen():
    model, ids = tiny_model("llama"), tokens()
    ours = feed(refreshed(Reencode(EVERY)), ids, [TOKENS])[0]
    for wrong in (dict(every=EVERY + 1), dict(window=WINDOW - 1), dict(sinks=SINKS + 1)):
        assert (reencoded_by_definition(model, ids, **wrong) - ours).abs().max() > DIFFERS
    ours = feed(refreshed(DynamicSinks(KEPT, EVERY)), ids, [TOKENS])[0]
    for wrong in (dict(every=EVERY + 1), dict(kept=KEPT + 1), dict(fair=False), dict(at_tail=True)):
        assert (dynamic_by_definition(model, ids, **wrong) - ours).abs().max() > DIFFERS


def test_the_control_puts_evicted_tokens_at_the_end():
    model, ids = tiny_model("llama"), tokens()
    expected = dynamic_by_definition(model, ids, at_tail=True)
    patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=TailInsert(KEPT, EVERY)), verbose=False)
    for way in WAYS:
        assert logit_error(feed(model, ids, way)[0], expected) <= LOGITS


FED = [
    (family, form)
    for family in ("gpt_neox", "deepseek_v3", "glm", "cohere2", "gemma3_text", "qwen3_next", "smollm3")
    for form in FORMS
    if (family, form.name) != ("qwen3_next", "reencode")
]


@pytest.mark.parametrize(
    ("family", "refresh"),
    fast_first(FED, lambda case: case[0] in ("gemma3_text", "deepseek_v3", "qwen3_next")),
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_logits_do_not_depend_on_how_tokens_are_fed(family, refresh):
    ids, model = tokens(), refreshed(refresh, family, window=8)
    whole = feed(model, ids, [TOKENS])[0]
    for way in WAYS[:2] + WAYS[3:]:
        assert logit_error(feed(model, ids, way)[0], whole) <= LOGITS
    assert report(model).patches[0].hits["refreshes"] > 0


@pytest.mark.parametrize("refresh", [Reencode(100), DynamicSinks(KEPT, 100)], ids=lambda form: form.name)
def test_before_the_first_refresh_it_is_streaming(refresh):
    model, ids = refreshed(refresh), tokens()
    sinks = SINKS + getattr(refresh, "n", 0)
    assert logit_error(feed(model, ids, [TOKENS])[0], oracle_logits(tiny_model("llama"), ids, sinks, WINDOW)) <= LOGITS
    assert report(model).patches[0].hits.get("refreshes", 0) == 0


def test_every_token_may_be_a_refresh():
    model, ids = tiny_model("llama"), tokens(length=14)
    expected = reencoded_by_definition(model, ids, every=1)
    patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=Reencode(1)), verbose=False)
    for way in ([14], [1] * 14, [3, 7, 4]):
        assert logit_error(feed(model, ids, way)[0], expected) <= LOGITS


def test_what_is_promised_by_definition_is_what_happens():
    model, ids, patch = tiny_model("llama"), tokens(), StreamingLLM(SINKS, WINDOW, refresh=Reencode(EVERY))
    promises = patch.promises(Target(model))
    assert promises.definition is not None and promises.same_up_to == SINKS + WINDOW
    with torch.no_grad():
        expected = promises.definition(model, ids, None)
    assert logit_error(feed(patch_model(model, patch, verbose=False), ids, [TOKENS])[0], expected) <= LOGITS
    dynamic = StreamingLLM(SINKS, WINDOW, refresh=DynamicSinks(KEPT, EVERY)).promises(Target(tiny_model("llama")))
    assert dynamic.definition is None and dynamic.same_up_to == SINKS + KEPT + WINDOW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_sixteen_bits(refresh, dtype):
    ids = tokens()
    model = patch_model(tiny_model("llama", dtype=dtype), StreamingLLM(SINKS, WINDOW, refresh=refresh), verbose=False)
    expected, close = feed(refreshed(refresh), ids, [TOKENS])[0], TOLERANCES[dtype].logits
    for way in WAYS[2:]:
        logits, cache = feed(model, ids, way)
        assert cache.own_layers[0].keys.dtype == dtype and report(model).patches[0].hits["refreshes"] > 0
        if refresh.name == "reencode":  # which tokens are kept is a matter of rounding
            assert logit_error(logits.float(), expected) <= close


def test_the_report_counts_refreshes_and_only_the_texts_tokens():
    for refresh in FORMS:
        model = refreshed(refresh)
        feed(model, tokens(), [1] * TOKENS)
        hits = report(model).patches[0].hits
        size = SINKS + WINDOW + getattr(refresh, "n", 0)
        assert hits["refreshes"] == (TOKENS - 1 - size) // EVERY and hits["tokens"] == TOKENS and hits["tokens evicted"] == TOKENS - size


# -- rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_each_row_of_a_left_padded_batch_equals_the_row_alone(family, refresh):
    model = refreshed(refresh, family)
    rows = [(0, tokens()), (1, tokens(seed=4)), (5, tokens(seed=5)), (15, tokens(seed=6))]
    alone = [feed(model, row[:, : TOKENS - pad], [TOKENS - pad])[0] for pad, row in rows]
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), row[:, : TOKENS - pad]], 1) for pad, row in rows])
    mask = torch.stack([(torch.arange(TOKENS) >= pad).long() for pad, _ in rows])
    for way in WAYS:
        logits = feed(model, batch, way, mask)[0]
        for i, (pad, _) in enumerate(rows):
            assert logit_error(logits[i, pad:], alone[i][0]) <= LOGITS


@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_rows_can_be_selected_repeated_and_reordered(refresh):
    model, ids = refreshed(refresh), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = feed(model, ids, [TOKENS], mask)[0]
    order = torch.tensor([2, 1, 1])
    for start in (9, 21, 27):
        cache = feed(model, ids[:, :start], [start], mask)[1]
        cache.reorder_cache(order)
        logits, _ = feed(model, ids[order, start:], [1] * (TOKENS - start), cache=cache)
        assert logit_error(logits, expected[order, start:]) <= LOGITS
        cache = feed(model, ids[:, :start], [1] * start, mask)[1]
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        logits, _ = feed(model, ids[[1, 1], start:], [TOKENS - start], mask[[1, 1]], cache)
        assert logit_error(logits, expected[[1, 1], start:]) <= LOGITS


@pytest.mark.parametrize("refresh", [None, *FORMS], ids=lambda form: "none" if form is None else form.name)
def test_a_prompt_is_read_once_and_copies_of_its_cache_go_on(refresh):
    model, ids = refreshed(refresh), tokens()
    expected = feed(model, ids, [TOKENS])[0]
    prompt = feed(model, ids[:, :17], [17])[1]
    for way in ([TOKENS - 17], [1] * (TOKENS - 17)):
        assert logit_error(feed(model, ids[:, 17:], way, cache=copy.deepcopy(prompt))[0], expected[:, 17:]) <= LOGITS
    assert prompt.get_seq_length() == 17
    both = copy.deepcopy((model, prompt))
    assert logit_error(feed(both[0], ids[:, 17:], [TOKENS - 17], cache=both[1])[0], expected[:, 17:]) <= LOGITS


@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_reset_starts_over_and_memory_stays(refresh):
    model, ids = refreshed(refresh), tokens(length=90)
    expected, cache = feed(model, ids, [30] * 3)
    assert cache.get_seq_length() == 90
    grown = cache.n_bytes()
    for i in range(6):
        cache = feed(model, tokens(length=EVERY, seed=i), [EVERY], cache=cache)[1]
    assert cache.n_bytes() == grown
    cache.reset()
    assert logit_error(feed(model, ids, [90], cache=cache)[0], expected) <= LOGITS


# -- rollback ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("every", [1, 4])
def test_tokens_are_taken_back_across_refreshes(family, every):
    model, ids, wrong = refreshed(Reencode(every), family, window=8), tokens(), tokens(seed=9)
    expected = feed(model, ids, [TOKENS])[0]
    with torch.no_grad():
        for drafted in (3, 6):
            cache = cache_of(model(input_ids=ids[:, :3], use_cache=True))
            cache.activate_past_recording()
            for position in range(3, TOKENS - drafted - 1):
                fed = torch.cat([ids[:, position : position + 1], wrong[:, position + 1 : position + 1 + drafted]], 1)
                out = model(input_ids=fed, **cached(cache), use_cache=True)
                assert logit_error(out.logits[:, 0], expected[:, position]) <= LOGITS
                cache.crop(-drafted)
                assert cache.get_seq_length() == position + 1


def test_padded_rows_are_taken_back_across_refreshes():
    model, ids = refreshed(Reencode(EVERY)), tokens(2)
    ids[0, :5] = 0
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = feed(model, ids, [TOKENS], mask)[0]
    cache = feed(model, ids[:, :14], [14], mask)[1]
    cache.activate_past_recording()
    for start in range(14, 22):
        fed = torch.cat([ids[:, start : start + 1], tokens(2, 5, seed=start)], 1)
        with torch.no_grad():
            out = model(input_ids=fed, attention_mask=mask[:, : start + 6], **cached(cache))
        assert logit_error(out.logits[:, 0], expected[:, start]) <= LOGITS
        cache.crop(-5)


def test_a_rollback_that_is_refused_changes_nothing():
    model, ids = refreshed(Reencode(EVERY)), tokens(length=30)
    expected = feed(model, ids, [30])[0]
    cache = feed(model, ids[:, :21], [21])[1]
    with pytest.raises(StreamError, match="activate_past_recording"):
        cache.crop(-6)
    assert logit_error(feed(model, ids[:, 21:], [9], cache=cache)[0], expected[:, 21:]) <= LOGITS
    cache = feed(refreshed(DynamicSinks(KEPT, EVERY)), ids, [30])[1]
    cache.activate_past_recording()
    cache.crop(0)
    with pytest.raises(StreamError, match=r"dynamic_sinks\(n=3, every=4\) has counted the attention"):
        cache.crop(-1)


# -- who calls the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_generate_beams_and_turns(refresh):
    model, ids = refreshed(refresh), tokens(length=9, seed=1)
    expected = greedy(model, ids, use_cache=False)
    assert not torch.equal(expected, greedy(refreshed(None), ids)), "the refresh changes no token on this input"
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=4), expected)
    assert torch.equal(greedy(model, ids, 16, num_beams=3), greedy(model, ids, 16, num_beams=3, use_cache=False))
    out = greedy(model, ids, 12, return_dict_in_generate=True)
    turn = torch.cat([out.sequences, tokens(length=4, seed=2)], 1)
    assert torch.equal(greedy(model, turn, 12, **cached(cache_of(out))), greedy(model, turn, 12))


def test_hidden_states_of_a_forward_that_was_cut_are_whole():
    model, ids = refreshed(Reencode(EVERY)), tokens()
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        listed = model(input_ids=ids, return_dict=False)
        assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits) and torch.equal(listed[0], out.logits)
        assert all(states.shape == (1, TOKENS, 64) for states in out.hidden_states)
        assert logit_error(model(input_ids=ids, logits_to_keep=2).logits, out.logits[:, -2:]) <= LOGITS


def test_assistants_and_prompt_lookup_take_back_reencoded_tokens():
    model, ids = refreshed(Reencode(EVERY)), tokens(length=7, seed=1).repeat(1, 2)
    expected = greedy(model, ids, 30)
    assert torch.equal(greedy(model, ids, 30, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(greedy(model, ids, 30, assistant_model=refreshed(Reencode(EVERY))), expected)


@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_with_int8(refresh):
    ids = tokens(length=12, seed=1)
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW, refresh=refresh), "mlp_int8(mode=weight_only)", verbose=False)
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


@pytest.mark.parametrize("draft", ["prompt_lookup", "model"])
def test_speculation_gives_the_text_of_reencoding_alone(draft):
    from patchkit import Speculative

    ids = tokens(length=7, seed=1).repeat(1, 2)
    expected = greedy(refreshed(Reencode(EVERY)), ids, 40)
    speculative = Speculative(draft="prompt_lookup" if draft == "prompt_lookup" else tiny_model("llama"), k=3)
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW, refresh=Reencode(EVERY)), speculative, verbose=False)
    assert torch.equal(greedy(model, ids, 40), expected)
    assert report(model).patches[0].hits["refreshes"] > 0 and report(model).patches[1].hits["proposed"] > 0


def test_lossless_drafts_may_be_reencoded_and_not_dynamic():
    ids, model = tokens(length=12, seed=1), tiny_model("llama")
    expected = greedy(model, ids, 30)
    patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=Reencode(EVERY)), lossless=True, verbose=False)
    assert torch.equal(greedy(model, ids, 30), expected)
    unpatch_model(model)
    with pytest.raises(UnsupportedModel, match=r"cannot draft: .* cannot roll tokens back"):
        patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=DynamicSinks(KEPT, EVERY)), lossless=True)


def test_reencoded_steps_run_compiled():
    model, ids = tiny_model("llama"), tokens()
    expected = reencoded_by_definition(model, ids)
    patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=Reencode(EVERY)), "compile(backend=eager)", verbose=False)
    for way in ([3] + [1] * 25, WAYS[3]):
        assert logit_error(feed(model, ids, way)[0], expected) <= LOGITS
    hits = report(model).patches[1].hits
    assert hits["compiled steps"] == 25 + 7 and hits["graphs compiled"] == 1
    cache = feed(model, ids[:, :20], [20])[1]
    cache.activate_past_recording()
    feed(model, tokens(length=6, seed=8), [1] * 6, cache=cache)
    cache.crop(-6)
    assert logit_error(feed(model, ids[:, 20:], [1] * 8, cache=cache)[0], expected[:, 20:]) <= LOGITS


@pytest.mark.parametrize("other", ["compile", "speculative"])
def test_what_hides_or_takes_back_attention_is_refused_before_anything_is_touched(other):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(PatchConflict, match=f"dynamic_sinks.*{other} would roll back or hide"):
        patch_model(model, f"streaming(sinks=2, window=6, refresh=dynamic_sinks(n=3, every=4)) + {other}")
    assert_restored(before, model)


# -- comes and goes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_gone_when_removed_copied_pickled_and_saved(refresh, tmp_path):
    model, ids = tiny_model("llama"), tokens()
    model.save_pretrained(tmp_path)  # sets fields of the config
    before = snapshot(model)
    patch_model(model, StreamingLLM(SINKS, WINDOW, refresh=refresh), verbose=False)
    expected = feed(model, ids, [TOKENS])[0]
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    stock = (tmp_path / "config.json").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == stock
    unpatch_model(model)
    assert_restored(before, model)
    for twin in twins:
        assert torch.equal(feed(twin, ids, [TOKENS])[0], expected)
        assert report(twin).patches[0].hits["refreshes"] > 0
        unpatch_model(twin)
        assert torch.equal(feed(twin, ids, [TOKENS])[0], feed(model, ids, [TOKENS])[0])


@pytest.mark.parametrize("refresh", FORMS, ids=lambda form: form.name)
def test_a_forward_that_fails_in_a_piece_leaves_a_cache_that_says_so(refresh):
    model, ids = refreshed(refresh), tokens()
    expected = feed(model, ids, [TOKENS])[0]
    _, cache = feed(model, ids[:, :10], [10])
    mlp = model.model.layers[1].mlp
    forward, calls = mlp.forward, []

    def failing(x):
        calls.append(len(calls))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(x)

    mlp.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        feed(model, ids[:, 10:], [TOKENS - 10], cache=cache)
    del mlp.forward
    with pytest.raises(StreamError, match="failed half-way"):
        feed(model, ids[:, 10:11], [1], cache=cache)
    assert torch.equal(feed(model, ids, [TOKENS])[0], expected)


def test_training_runs_unpatched():
    model, ids = refreshed(Reencode(EVERY)).train(), tokens()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, tiny_model("llama").train()(input_ids=ids).logits)


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reencode(0), "every=0.*at least 1"),
        (lambda: Reencode(2.5), "every=2.5"),
        (lambda: DynamicSinks(0), "n=0.*at least 1"),
        (lambda: DynamicSinks(4, every=True), "every=True"),
        (lambda: StreamingLLM(refresh="reencode"), "refresh='reencode': give Reencode"),
        (lambda: StreamingLLM(refresh=64), "refresh=64"),
        (lambda: StreamingLLM(positions="true", refresh=Reencode()), "needs positions='cache'"),
    ],
)
def test_bad_options_name_the_value_and_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", dict(refresh=Reencode(4), layers=[0]), "keep all keys"),
        ("llama", dict(refresh=DynamicSinks(3, 4), layers=[0]), "keep all keys"),
        ("gemma3_text", dict(refresh=Reencode(4), window=6), "their own window, of 8 tokens, which cannot be encoded from 6"),
        ("jamba", dict(refresh=Reencode(4)), "recurrent"),
        ("qwen3_next", dict(refresh=Reencode(4)), "recurrent"),
        ("falcon_h1", dict(refresh=DynamicSinks(3, 4)), "recurrent"),
        ("bloom", dict(refresh=DynamicSinks(3, 4)), "its own attention function"),
        ("gemma2", dict(refresh=DynamicSinks(3, 4)), "softcap"),
        ("gpt_oss", dict(refresh=DynamicSinks(3, 4)), "s_aux"),
        ("llama", dict(refresh=DynamicSinks(600, 4)), "more than the 512 positions"),
    ],
)
def test_models_that_cannot_be_refreshed_are_refused_with_the_reason(family, options, reason):
    model = tiny_model(family)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=reason):
        patch_model(model, StreamingLLM(**{"sinks": SINKS, "window": 8, **options}))
    assert_restored(before, model)


def test_embeddings_and_gradients_are_refused():
    model, ids = refreshed(Reencode(EVERY)), tokens()
    with torch.no_grad(), pytest.raises(StreamError, match="input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(StreamError, match="no_grad"):
        model(input_ids=ids)
    with torch.no_grad():
        embedded = refreshed(DynamicSinks(KEPT, EVERY))
        logits = embedded(inputs_embeds=embedded.get_input_embeddings()(ids)).logits
    assert logit_error(logits, feed(embedded, ids, [TOKENS])[0]) <= LOGITS


# -- spec strings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [None, Reencode(), Reencode(32), DynamicSinks(), DynamicSinks(8, every=16)])
def test_the_spec_string_reads_back(refresh):
    patch = StreamingLLM(window=252, refresh=refresh)
    assert parse_spec(patch.spec) == [patch]


def test_the_spec_string_is_short_and_typos_are_answered():
    assert StreamingLLM(window=252, refresh=Reencode(32)).spec == "streaming(window=252, refresh=reencode(every=32))"
    assert parse_spec("streaming(refresh=dynamic_sinks)")[0] == StreamingLLM(refresh=DynamicSinks())
    for wrong, message in {
        "reencod(every=4)": "refresh of streaming 'reencod', did you mean 'reencode'",
        "reencode(evry=4)": "option of reencode 'evry', did you mean 'every'",
        "reencode(every=0)": "every=0",
        "reencode(4)": "without its option's name",
        "64": "refresh=64",
    }.items():
        with pytest.raises(SpecError, match=message):
            parse_spec(f"streaming(refresh={wrong})")
