"""The patch `linear` against a naive oracle, in every way of feeding tokens, and with other patches."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from support import cache_of, cached, fast_first, feed, matrix
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from patchkit import Compile, LinearAttention, patch_model, patched, report, unpatch_model
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, PatchConflict, PatchError, SpecError, StreamError, UnsupportedModel
from patchkit.linear.state import LinearState
from patchkit.patches.speculative import Speculative
from patchkit.speculation.drafters.self_draft import SelfDraft
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.rollback_log import ROLLBACK
from patchkit.streaming.runtime import runtime_of
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model
from patchkit.views import cache_bytes

WINDOW, TOKENS = 6, 30
LOGITS, DIFFERS = TOLERANCES[torch.float32].logits, TOLERANCES[torch.float32].differs
# One family per way in which positions enter, keys are shared, and other layers stand beside those that change.
FAMILIES = ["llama", "llama_yarn", "gpt_neox", "gpt2", "glm", "cohere", "cohere2", "gemma3_text", "smollm3", "falcon_h1", "qwen3_next"]
# Their recurrent layers lose the padding when a row's pads come in more than one forward, unpatched too.
RECURRENT = {"falcon_h1", "qwen3_next"}
# Feature map, window, sinks, horizon, and min_length of the patch.
RULES = {
    "plain": ("elu1", WINDOW, 0, None, 0),
    "sinks": ("relu", WINDOW, 2, None, 0),
    "router": ("hedgehog", WINDOW, 1, 4, 14),
}
WAYS = ([TOKENS], [1] * TOKENS, [5] * 6, [7, 7, 7, 7, 2], [13] + [1] * 6 + [3] + [1] * 8)


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    assert logit_error(actual, expected) <= LOGITS


def greedy(model, ids, new=25, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new, pad_token_id=127, suppress_tokens=[127], eos_token_id=None, do_sample=False, **options)


def trained(model, rule: str, layers: list[int] | None = None, lora: bool = False) -> LinearState:
    """A state with random numbers in all its places."""
    feature_map, window, sinks, horizon, _ = RULES[rule]
    target = Target(model)
    chosen = [layer.index for layer in target.attention_layers if layer.kind == "full"] if layers is None else layers
    state = LinearState.start(target, feature_map, window, sinks, horizon, chosen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in state.parts.values():
            part.add_readout()
            for parameter in part.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            part.factor.add_(1)
    if lora:
        module = target.attention_layers[0].module
        projection = "q_proj" if hasattr(module, "q_proj") else "c_attn"
        weight = getattr(module, projection).weight
        inputs, outputs = weight.shape if projection == "c_attn" else weight.shape[::-1]
        a, b = (torch.randn(size, generator=generator) / 8 for size in ((2, inputs), (outputs, 2)))
        state.lora[f"{target.attention_layers[0].name}.{projection}"] = a, b
    return state


# -- the oracle -------------------------------------------------------------------------------------------------------------


class Oracle:
    """A model whose full-attention layers compute the definition, token by token and head by head, in float64.

    Queries and keys without their rotation are had by running the attention module once more with the rotary embedding of position 0.
    """

    def __init__(self, model, state: LinearState, min_length: int, **wrong) -> None:
        self.model, self.state, self.min_length, self.wrong = model, state, min_length, wrong
        self.layers = {layer.module: layer.index for layer in Target(model).attention_layers if layer.index in state.parts}
        self.arguments: tuple = ()
        self.plain: tuple | None = None
        self.capturing = False

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        AttentionInterface.register("naive_hybrid", self.attend)
        AttentionMaskInterface.register("naive_hybrid", sdpa_mask)
        before = self.model.config._attn_implementation
        hooks = [module.register_forward_pre_hook(self.note, with_kwargs=True) for module in self.layers]
        self.model.config._attn_implementation = "naive_hybrid"
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.model.config._attn_implementation = before
            for hook in hooks:
                hook.remove()

    def note(self, module, args, kwargs):
        if not self.capturing:
            self.arguments = args, kwargs

    def attend(self, module, q, k, v, mask, scaling=None, **kwargs):
        if module not in self.layers:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, scaling=scaling, **kwargs)
        if self.capturing:
            self.plain = q, k
            return torch.zeros(len(q), q.shape[2], q.shape[1], v.shape[-1]), None
        args, given = self.arguments
        turn = given.get("position_embeddings")
        self.plain = q, k
        if turn is not None:
            self.capturing = True
            module(*args, **{**given, "position_embeddings": tuple(x[:, :1].expand_as(x) for x in turn)})
            self.capturing = False
        out = self.definition(self.state.parts[self.layers[module]], q, k, v, *self.plain, scaling or q.shape[-1] ** -0.5)
        return out.transpose(1, 2).to(q.dtype), None

    def definition(self, part, q, k, v, plain_q, plain_k, scaling):
        window, sinks, horizon = self.state.window, self.state.sinks, self.state.horizon
        q, k, v, plain_q, plain_k = (x.double() for x in (q, k, v, plain_q, plain_k))
        heads, tokens = q.shape[1:3]
        shared = heads // k.shape[1]
        fq, fk = self.features(part.query_map, plain_q), self.features(part.key_map, plain_k)
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
        for h in range(heads):
            g = h // shared
            for i in range(tokens):
                seen = [j for j in range(i + 1) if i < self.min_length or j < sinks or j > i - window]
                old = [j for j in range(i + 1) if j not in seen and j <= i - window - self.wrong.get("delay", 0)]
                scores = torch.stack([scaling * q[0, h, i] @ k[0, g, j] for j in seen])
                weights = (scores - scores.max()).exp()
                numerator, denominator = weights @ v[0, g, seen], weights.sum()
                share = part.factor[h].double().exp()
                if horizon is not None and "horizon" not in self.wrong:
                    share = share * min(1, horizon / max(len(old), 1))
                for j in old:
                    weight = share * (fq[0, h, i] @ fk[0, g, j])
                    numerator, denominator = numerator + weight * v[0, g, j], denominator + weight
                out[0, h, i] = numerator / denominator
                if i >= self.min_length and "readout" not in self.wrong:
                    out[0, h, i] = out[0, h, i] @ part.readout[h].double()
        return out

    def features(self, feature_map, x):
        if self.state.feature_map == "relu":
            return x.clamp(min=0)
        if self.state.feature_map == "hedgehog":
            mapped = torch.einsum("bhtk,hok->bhto", x, feature_map.weight.double())
            return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", fast_first(FAMILIES))
def test_every_way_of_feeding_gives_the_oracles_logits(family, rule):
    model, ids, min_length = tiny_model(family), tokens(), RULES[rule][-1]
    state = trained(model, rule)
    expected = Oracle(model, state, min_length).logits(ids)
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected)[:, -1].abs().max() > DIFFERS
    patch_model(model, LinearAttention(state_dict=state.state_dict(), min_length=min_length))
    for way in WAYS:
        close(feed(model, ids, way)[0], expected)
    with torch.no_grad():
        close(model(input_ids=ids, use_cache=False).logits, expected)
    assert report(model).patches[0].hits["tokens taken into the state"] > 0


@pytest.mark.parametrize(
    "wrong", [{"delay": 1}, {"horizon": None}, {"readout": None}, {"sinks": 2}, {"window": 7}, {"min_length": 13}], ids=str
)
def test_a_wrong_rule_would_be_seen(wrong):
    model, ids = tiny_model("llama"), tokens()
    state = trained(model, "router")
    with patched(model, LinearAttention(state_dict=state, min_length=14)):
        ours = feed(model, ids, [5] * 6)[0]
    for name in {"sinks", "window"} & wrong.keys():
        setattr(state, name, wrong[name])
    other = Oracle(
        model, state, wrong.get("min_length", 14), **{name: wrong[name] for name in wrong if name in ("delay", "horizon", "readout")}
    )
    assert (other.logits(ids) - ours).abs().max() > DIFFERS


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_text_that_fits_is_the_unpatched_model(family):
    model, ids = tiny_model(family), tokens(length=14)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
    for patch in (LinearAttention(window=14), LinearAttention(window=12, sinks=2), LinearAttention(window=3, min_length=14)):
        with patched(model, patch):
            for way in ([14], [1] * 14, [3, 5, 6]):
                close(feed(model, ids, way)[0], plain)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_next"])
def test_each_row_of_a_left_padded_batch_equals_the_row_alone(family, rule):
    model = tiny_model(family)
    patch_model(model, LinearAttention(state_dict=trained(model, rule), min_length=RULES[rule][-1]))
    rows = [(pad, tokens(seed=3 + pad)[:, : TOKENS - pad]) for pad in (0, 1, 5, 11)]
    alone = [feed(model, row, [TOKENS - pad])[0] for pad, row in rows]
    batch = torch.cat([torch.cat([torch.zeros(1, pad, dtype=torch.long), row], 1) for pad, row in rows])
    mask = torch.stack([(torch.arange(TOKENS) >= pad).long() for pad, _ in rows])
    for way in ([TOKENS], [12] + [1] * 18) if family in RECURRENT else WAYS:
        logits = feed(model, batch, way, mask)[0]
        for i, (pad, _) in enumerate(rows):
            close(logits[i, pad:], alone[i][0])
    with torch.no_grad():
        logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    close(logits[3, 11:], alone[3][0])


def test_values_may_be_wider_than_keys():
    """No family has such values behind transformers' interface without latent attention: the layer's own functions are called."""
    from patchkit.linear.hybrid import HybridAttention, hybrid_attention

    generator = torch.Generator().manual_seed(0)
    part = HybridAttention("elu1", 4, 2, 8, 12)
    q, k, v = (torch.randn(size, generator=generator) for size in ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 12)))
    state = type("State", (), dict(window=5, sinks=0, horizon=None, feature_map="elu1"))
    naive = Oracle.__new__(Oracle)
    naive.state, naive.min_length, naive.wrong = state, 0, {"readout": None}
    with torch.no_grad():
        close(hybrid_attention(part, q, k, v, q, k, 5, 0.3).double(), naive.definition(part, q, k, v, q, k, 0.3))


def test_gradients_flow_in_evaluation_mode():
    model, ids = tiny_model("llama"), tokens()
    patch_model(model, LinearAttention(window=WINDOW, sinks=1))
    whole = model(input_ids=ids).logits
    whole.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0
    cache, steps = None, []
    for i in range(TOKENS):
        out = model(input_ids=ids[:, i : i + 1], **cached(cache))
        cache = cache_of(out)
        steps.append(out.logits)
    close(torch.cat(steps, 1).detach(), whole.detach())


def test_training_mode_runs_unpatched():
    model, ids = tiny_model("llama"), tokens()
    expected = model(input_ids=ids).logits
    patch_model(model, LinearAttention(window=WINDOW))
    assert torch.equal(model.train()(input_ids=ids).logits, expected)


# -- min_length -------------------------------------------------------------------------------------------------------------


def test_each_sequence_switches_once():
    model, ids = patch_model(tiny_model("llama"), LinearAttention(window=WINDOW, min_length=12)), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cache = feed(model, ids[:, :12], [12], mask[:, :12])[1]
    hits = report(model).patches[0].hits
    assert "switched to linear" not in hits
    for end, switched in ((13, 1), (14, 1), (15, 1), (16, 2), (17, 2)):
        feed_one = dict(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], **cached(cache))
        with torch.no_grad():
            model(**feed_one)
        assert report(model).patches[0].hits["switched to linear"] == switched
    cache.activate_past_recording()
    feed(model, ids, [TOKENS], mask)
    assert report(model).patches[0].hits["switched to linear"] == 4


# -- rollback, batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "rule"),
    fast_first(
        itertools.product(["llama", "gpt2", "gemma3_text"], RULES), [("llama", "router"), ("gpt2", "plain"), ("gemma3_text", "sinks")]
    ),
)
def test_rollback_before_at_and_after_tokens_become_old(family, rule):
    model, ids, wrong = tiny_model(family), tokens(length=40), tokens(length=40, seed=9)
    patch_model(model, LinearAttention(state_dict=trained(model, rule), min_length=RULES[rule][-1]))
    expected = feed(model, ids, [40])[0]
    for drafted in (1, 5):
        cache = feed(model, ids[:, :3], [3])[1]
        cache.activate_past_recording()
        for position in range(3, 40 - drafted - 1):
            fed = torch.cat([ids[:, position : position + 1], wrong[:, position + 1 : position + 1 + drafted]], 1)
            close(feed(model, fed, [1 + drafted] if position % 3 else [1] * (1 + drafted), cache=cache)[0][:, 0], expected[:, position])
            cache.crop(-drafted)


@pytest.mark.parametrize("before", [0, 20, 480])
def test_rollback_as_far_as_it_is_recorded(before):
    """Through forwards longer and shorter than what is recorded, several times, and with a whole prompt on record."""
    model = tiny_model("llama")
    patch_model(model, LinearAttention(state_dict=trained(model, "sinks")))
    ids = tokens(length=560)
    expected = feed(model, ids, [560])[0]
    cache = feed(model, ids[:, :before], [before])[1] if before else StreamingCache(runtime_of(model.model).plan)
    cache.activate_past_recording()
    feed(model, ids[:, before:500], [500 - before], cache=cache)
    for wrong in ([ROLLBACK], [100, 1, 1, 1, 150], [1] * 30 + [226], [1]):
        feed(model, tokens(length=sum(wrong), seed=sum(wrong)), wrong, cache=cache)
        cache.crop(-sum(wrong))
    close(feed(model, ids[:, 500:], [1] * 30 + [30], cache=cache)[0], expected[:, 500:])


def test_rollback_of_what_was_not_recorded_is_refused_and_changes_nothing():
    model, ids = patch_model(tiny_model("llama"), LinearAttention(window=WINDOW, min_length=20)), tokens(length=28)
    expected = feed(model, ids, [28])[0]
    for seen in (15, 23):  # all keys are kept, and not
        cache = feed(model, ids[:, :seen], [seen])[1]
        with pytest.raises(StreamError, match="activate_past_recording"):
            cache.crop(-3)
        close(feed(model, ids[:, seen:], [28 - seen], cache=cache)[0], expected[:, seen:])


def test_rows_can_be_selected_repeated_and_reordered_also_on_record():
    model = tiny_model("llama")
    patch_model(model, LinearAttention(state_dict=trained(model, "router"), min_length=14))
    ids = tokens(3, length=24)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = feed(model, ids, [24], mask)[0]
    for start in (4, 9, 18):
        order = torch.tensor([2, 0, 1])
        cache = feed(model, ids[:, :start], [start], mask)[1]
        cache.activate_past_recording()
        feed(model, tokens(3, 3, seed=8), [1, 2], cache=cache)
        cache.reorder_cache(order)
        cache.crop(-3)
        close(feed(model, ids[order, start:], [1] * (24 - start), cache=cache)[0], expected[order, start:])
        cache = feed(model, ids[:, :start], [1] * start, mask)[1]
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        close(feed(model, ids[[1, 1], start:], [1] * (24 - start), cache=cache)[0], expected[[1, 1], start:])
        cache.reset()
        close(feed(model, ids, [7, 17], mask, cache=cache)[0], expected)


def test_generate_by_beams_and_in_turns():
    model, ids = patch_model(tiny_model("llama"), LinearAttention(window=WINDOW)), tokens(2, 9)
    texts = greedy(model, ids, return_dict_in_generate=True)
    logits = feed(model, texts.sequences, [texts.sequences.shape[1]])[0]
    logits[..., 127] = -torch.inf
    assert torch.equal(logits[:, 8:-1].argmax(-1), texts.sequences[:, 9:])
    beams = greedy(model, ids, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    scores = model.compute_transition_scores(beams.sequences, beams.scores, beams.beam_indices, normalize_logits=False).sum(1)
    logits = feed(model, beams.sequences, [beams.sequences.shape[1]])[0]
    chosen = logits[:, 8:-1].log_softmax(-1).gather(-1, beams.sequences[:, 9:, None]).sum((1, 2))
    close(chosen, scores)
    more = torch.cat([texts.sequences, tokens(2, 4)], 1)
    assert torch.equal(greedy(model, more, **cached(cache_of(texts))), greedy(model, more))


# -- memory and length ------------------------------------------------------------------------------------------------------


def test_bytes_and_the_work_of_a_step_do_not_depend_on_the_length():
    model = patch_model(tiny_model("llama"), LinearAttention(window=WINDOW))
    n_bytes, operations = {}, {}
    for length in (1000, 8000):
        cache = feed(model, tokens(length=length), [length // 4] * 4)[1]
        with torch.profiler.profile(record_shapes=True) as profile:
            feed(model, tokens(length=2), [1, 1], cache=cache)
        n_bytes[length] = cache.n_bytes(), cache_bytes(cache)
        operations[length] = sorted((event.name, str(event.input_shapes)) for event in profile.events())
    assert n_bytes[1000] == n_bytes[8000]
    assert operations[1000] == operations[8000]


def test_a_long_stream_is_as_exact_as_a_short_one():
    """Across several moves of the context, steps and chunks agree; a horizon keeps old tokens from outweighing the window."""
    model = patch_model(tiny_model("llama"), LinearAttention(window=40, sinks=2, horizon=100))
    ids = tokens(length=2600)
    whole = feed(model, ids, [2600])[0]
    logits, cache = feed(model, ids, [700, 500] + [1] * 700 + [700])
    assert cache.stream.base.max() > 0
    close(logits, whole)


# -- states -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapted_weights_come_go_and_are_not_saved(family, tmp_path):
    model, ids = tiny_model(family), tokens()
    before = snapshot(model)
    state = trained(model, "plain", lora=True)
    ((name, (a, b)),) = state.lora.items()
    weight = model.get_submodule(name).weight
    change = b @ a if isinstance(model.get_submodule(name), torch.nn.Linear) else (b @ a).T
    expected = weight.detach() + change
    patch_model(model, LinearAttention(state_dict=state))
    assert torch.equal(model.get_submodule(name).weight, expected)
    assert report(model).patches[0].changed["adapted projections"] == 1
    assert torch.equal(model.state_dict()[f"{name}.weight"], weight)
    ours = feed(model, ids, [TOKENS])[0]
    copy.deepcopy(model).save_pretrained(tmp_path)  # saving writes into the config
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.get_submodule(name).weight, weight)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(feed(twin, ids, [TOKENS])[0], ours)
        assert torch.equal(unpatch_model(twin).get_submodule(name).weight, weight)
    unpatch_model(model)
    assert model.get_submodule(name).weight is weight
    assert_restored(before, model)


def test_adapted_weights_are_not_loaded_over_and_follow_the_model():
    model = tiny_model("llama")
    state = trained(model, "plain", lora=True)
    ((name, _),) = state.lora.items()
    patch_model(model, LinearAttention(state_dict=state))
    weight = model.get_submodule(name).weight.clone()
    with pytest.raises(PatchConflict, match=f"{name}.weight is adapted by the patch linear"):
        model.load_state_dict(model.state_dict())
    assert torch.equal(model.get_submodule(name).weight, weight)
    model.to(torch.bfloat16)
    unpatch_model(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model(tokens())
    model.load_state_dict(model.state_dict())


def test_layers_left_alone_keep_their_projections():
    model = tiny_model("llama")
    state = trained(model, "plain", lora=True)
    ((name, _),) = state.lora.items()
    weight = model.get_submodule(name).weight
    with patched(model, LinearAttention(state_dict=state, layers=[1]), verbose=False):
        assert model.get_submodule(name).weight is weight
        assert "adapted projections" not in report(model).patches[0].changed


def test_a_state_says_the_options_and_others_are_refused():
    model = tiny_model("llama")
    state = trained(model, "router")
    patch_model(model, LinearAttention(state_dict=state, window=WINDOW, layers=[1]))
    facts = report(model).patches[0]
    assert facts.changed == {"attention layers": 1} and not any("conversion" in warning for warning in facts.warnings)
    assert facts.spec == "linear(window=6, layers=(1,), state_dict=<LinearState>)"
    assert "<state dict>" in LinearAttention(state_dict=state.state_dict()).spec
    unpatch_model(model)
    before = snapshot(model)
    for options, message in (
        (dict(window=7), "window=7, but state_dict was converted with 6"),
        (dict(sinks=3), "sinks=3"),
        (dict(feature_map="relu"), "feature_map='relu'"),
        (dict(horizon=9), "horizon=9"),
        (dict(layers=[2]), "layer 2 has no full attention"),
    ):
        with pytest.raises(PatchError, match=message):
            patch_model(model, LinearAttention(state_dict=state, **options))
    one_layer = trained(model, "router", layers=[0])
    with pytest.raises(NothingMatched, match=r"converted layers \[0\] only"):
        patch_model(model, LinearAttention(state_dict=one_layer, layers=[0, 1]))
    with pytest.raises(UnsupportedModel, match="another LM head"):
        patch_model(model, LinearAttention(state_dict=trained(tiny_model("llama", seed=1), "plain")))
    assert_restored(before, model)


def test_without_a_state_the_report_says_what_that_means():
    model = patch_model(tiny_model("llama"), LinearAttention(window=WINDOW))
    (warning,) = report(model).patches[0].warnings
    assert "patchkit linearize" in warning


# -- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feature_map="cosine"), "feature_map='cosine' is unknown: give one of elu1"),
        (dict(window=0), "window=0.*at least 1, because"),
        (dict(window=-3), "window=-3"),
        (dict(sinks=-1), "sinks=-1"),
        (dict(min_length=True), "min_length=True"),
        (dict(horizon=0), "horizon=0"),
        (dict(layers=()), "layers=()"),
        (dict(layers="some"), "layers='some'"),
    ],
)
def test_bad_options_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(**options)


@pytest.mark.parametrize(
    ("family", "error", "message"),
    [
        ("gemma2", UnsupportedModel, "`softcap`"),
        ("gpt_oss", UnsupportedModel, "`s_aux`"),
        ("bloom", UnsupportedModel, "ALiBi"),
        ("deepseek_v3", UnsupportedModel, "latent attention"),
        ("falcon", UnsupportedModel, "computes attention itself"),
        ("hunyuan_v1_dense", UnsupportedModel, "positions are baked into"),
        ("mistral", NothingMatched, "already has its own window"),
        ("mamba", NothingMatched, "no attention layers"),
    ],
)
def test_models_that_cannot_be_served_are_refused_by_name(family, error, message):
    model = tiny_model(family)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch_model(model, LinearAttention(window=WINDOW))
    assert_restored(before, model)


@pytest.mark.parametrize("model_type", ["diffllama", "hrm_text", "inkling_text", "kimi_linear"])
def test_rarer_anatomies_are_refused_by_name(model_type):
    import tiny_configs
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    messages = {"diffllama": "2 times", "hrm_text": "6 times", "inkling_text": "in layer 0", "kimi_linear": "latent attention"}
    with pytest.raises(UnsupportedModel, match=messages[model_type]):
        patch_model(tiny_configs.tiny_model(model_type, attn="sdpa"), LinearAttention(window=WINDOW))


def test_lengths_beyond_the_models_positions_are_refused():
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModel, match="min_length=513 is more than the 512"):
        patch_model(model, LinearAttention(min_length=513))
    with pytest.raises(UnsupportedModel, match="window=508 or less"):
        patch_model(model, LinearAttention(window=512, sinks=4))
    with pytest.raises(NothingMatched, match="layer 7 has no full attention"):
        patch_model(model, LinearAttention(layers=[0, 7]))


def test_arguments_that_come_with_a_call_are_refused():
    model = patch_model(tiny_model("llama"), LinearAttention(window=WINDOW))
    with pytest.raises(StreamError, match="softcap"):
        model(tokens(), softcap=30.0)
    with pytest.raises(StreamError, match="2-D"):
        model(tokens(), attention_mask=torch.ones(1, 1, TOKENS, TOKENS))


# -- with other patches -----------------------------------------------------------------------------------------------------


def test_linear_twice_is_refused():
    with pytest.raises((PatchConflict, SpecError), match="linear"):
        patch_model(tiny_model("llama"), "linear(window=6, layers=[0])", "linear(window=8, layers=[1])")


@pytest.mark.parametrize("rotated", [False, True])
def test_streaming_and_linear_in_layers_of_their_own(rotated):
    """Each layer follows its rule: the oracle's hybrid over a model whose other layer streams."""
    model, ids = tiny_model("llama"), tokens()
    before, state = snapshot(model), trained(model, "sinks", [1])
    patches = ["streaming(sinks=2, window=6, layers=[0])", LinearAttention(state_dict=state)]
    patch_model(model, *(patches[::-1] if rotated else patches))
    whole = feed(model, ids, [TOKENS])[0]
    for way in WAYS:
        close(feed(model, ids, way)[0], whole)
    specs = {facts.name: facts.hits for facts in report(model).patches}
    assert specs["streaming"]["tokens evicted"] > 0 and specs["linear"]["tokens taken into the state"] > 0
    # With the streaming window as wide as the text, layer 0 is as unpatched, and layer 1 is the oracle's.
    unpatch_model(model)
    assert_restored(before, model)
    expected = Oracle(model, state, 0).logits(ids)
    patch_model(model, "streaming(sinks=2, window=40, layers=[0])", patches[1])
    close(feed(model, ids, [7, 7, 7, 7, 2])[0], expected)
    assert (whole - expected).abs().max() > DIFFERS


def test_streaming_and_linear_in_the_same_layers_are_refused():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(PatchConflict, match=r"attention layers 1: give each its own layers"):
        patch_model(model, "streaming(window=8, layers=[1])", "linear(window=6)")
    assert_restored(before, model)


def test_int8_weights_beside_linear_attention():
    model, ids = tiny_model("llama"), tokens()
    with patched(model, "mlp_int8(mode=weight_only)"):
        alone = feed(model, ids, [TOKENS])[0]
    patch_model(model, "linear(window=6) + mlp_int8(mode=weight_only)")
    whole = feed(model, ids, [TOKENS])[0]
    close(feed(model, ids, [5] * 6)[0], whole)
    assert (whole - alone).abs().max() > DIFFERS


@pytest.mark.parametrize(("rule", "length"), [("router", 150), matrix("router", 1100), ("sinks", 90), matrix("plain", 90)])
def test_a_thousand_compiled_steps_are_one_graph(rule, length):
    plain, model = tiny_model("llama"), tiny_model("llama")
    patch = LinearAttention(state_dict=trained(plain, rule), min_length=RULES[rule][-1])
    patch_model(plain, patch)
    patch_model(model, patch, Compile(backend="eager"))
    ids = tokens(length=length)
    whole = feed(plain, ids, [length])[0]
    counters.clear()
    feed(model, ids[:, :4], [2, 1, 1])
    with torch._dynamo.config.patch(error_on_recompile=True):
        logits = feed(model, ids, [2] + [1] * (length - 2))[0]
        for prompt in (5, 9, 40):
            close(feed(model, ids[:, :60], [prompt] + [1] * (60 - prompt))[0], whole[:, :60])
    close(logits, whole)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert report(model).patches[1].hits["graphs compiled"] == 1


@pytest.mark.parametrize(
    ("family", "scope"),
    fast_first(itertools.product(["gpt2", "gemma3_text"], ["model", "layers"]), [("gpt2", "layers"), ("gemma3_text", "model")]),
)
def test_compiled_steps_of_padded_rows_with_rollback(family, scope):
    model = tiny_model(family)
    patch_model(model, LinearAttention(state_dict=trained(model, "router"), min_length=14), Compile(backend="eager", scope=scope))
    ids = tokens(2)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = feed(model, ids, [TOKENS], mask)[0]
    cache = feed(model, ids[:, :6], [6], mask)[1]
    cache.activate_past_recording()
    for start in range(6, TOKENS - 4):
        fed = torch.cat([ids[:, start : start + 1], tokens(2, 3, seed=start)], 1)
        logits = torch.cat([feed(model, fed[:, i : i + 1], [1], mask[:, : start + i + 1], cache)[0] for i in range(4)], 1)
        close(logits[:, 0], expected[:, start])
        cache.crop(-3)
    assert report(model).patches[1].hits["graphs compiled"] <= 2


@pytest.mark.matrix
def test_inductor_gives_the_eager_logits():
    plain, model, ids = tiny_model("llama"), tiny_model("llama"), tokens()
    patch = LinearAttention(state_dict=trained(plain, "sinks"))
    patch_model(plain, patch)
    patch_model(model, patch, Compile(scope="layers"))
    close(feed(model, ids, [3] + [1] * 27)[0], feed(plain, ids, [TOKENS])[0])
    assert report(model).patches[1].hits["compiled steps"] == 27


def test_compiled_steps_of_streaming_and_linear_layers():
    plain, model, ids = tiny_model("llama"), tiny_model("llama"), tokens()
    patches = ["streaming(sinks=2, window=6, layers=[0])", "linear(window=6, layers=[1])"]
    patch_model(plain, *patches)
    patch_model(model, *patches, Compile(backend="eager"))
    close(feed(model, ids, [3] + [1] * 27)[0], feed(plain, ids, [TOKENS])[0])
    assert report(model).patches[2].hits["graphs compiled"] == 1


@pytest.mark.parametrize("draft", ["prompt_lookup", SelfDraft("streaming(sinks=2, window=6)")], ids=["lookup", "self"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_speculation_gives_the_text_of_linear_alone(family, draft):
    model = tiny_model(family)
    linear = LinearAttention(state_dict=trained(model, "plain"))
    ids = tokens(length=12).repeat(1, 2)
    with patched(model, linear):
        expected = greedy(model, ids, 50)
    patch_model(model, linear, Speculative(draft=draft, k=3))
    assert torch.equal(greedy(model, ids, 50), expected)
    assert report(model).patches[1].hits.get("stock calls", 0) == 0


def test_a_lossless_draft():
    model, ids = tiny_model("llama"), tokens(length=12)
    expected = greedy(model, ids, 40)
    patch_model(model, LinearAttention(window=WINDOW), lossless=True)
    assert torch.equal(greedy(model, ids, 40), expected)
