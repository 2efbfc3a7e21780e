"""torch.compile: the tokens of eager decoding, one graph for every step, nothing left behind."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import pickle
import weakref
from collections import Counter

import pytest
import torch
from refusals import is_refused, refusal
from support import CACHE, cache_of, cached, fast_first, matrix
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from patchkit import Compile, _compat, patch_model, patched, report, unpatch_model
from patchkit.compiled.options import compiler_options
from patchkit.errors import StreamError, UnsupportedModel
from patchkit.static_step import LEAST_ROOM, FixedCache
from patchkit.testing import TOLERANCES, assert_restored, families, logit_error, snapshot, tiny_model

# Inductor imports old code of torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
CLOSE = TOLERANCES[torch.float32].logits
STREAMING = "streaming(sinks=2, window=6)"
EAGER_BACKEND = Compile(backend="eager")  # traced by dynamo like any other, and quick
LAYERS = Compile(backend="eager", scope="layers")
SERVED_STREAMS = ["llama", "gpt_neox", "deepseek_v3", "gemma3_text", "gpt_oss", "cohere2", "mixtral", "smollm3"]


def tokens(rows: int = 1, length: int = 40, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(len(lengths), max(lengths), seed=5)
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths])
    return ids, mask


def greedy(model, ids, new=25, **options) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new, **{"pad_token_id": 127, "suppress_tokens": [127], "eos_token_id": None, **options})


@torch.no_grad()
def decoded(model, ids, prompt: int = 5, mask=None, cache=None) -> torch.Tensor:
    """Logits of a prompt and then of one token after the other."""
    logits, start = [], 0
    for end in range(prompt, ids.shape[1] + 1):
        out = model(ids[:, start:end], **cached(cache), attention_mask=None if mask is None else mask[:, :end], use_cache=True)
        logits.append(out.logits)
        cache, start = cache_of(out), end
    return torch.cat(logits, 1)


def hits(model) -> dict[str, int]:
    return report(model).patches[-1].hits


def pair(family: str, *patches):
    """A model patched without and with compile."""
    plain, compiled = tiny_model(family), tiny_model(family)
    if len(patches) > 1:
        patch_model(plain, *patches[:-1])
    return plain, patch_model(compiled, *patches)


# -- the same logits, the same tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "generated", "fed"),
    [
        ([EAGER_BACKEND], 60, 250),
        ([STREAMING, EAGER_BACKEND], 60, 250),
        matrix(["compile"], 300, 450),
        matrix([STREAMING, "compile"], 300, 2900),
    ],
    ids=["plain", "streaming", "plain, inductor", "streaming, inductor"],
)
def test_thousands_of_steps_are_one_graph(patches, generated, fed):
    """No graph break and one compilation over several prompt lengths, generate calls and bare loops; the bar is 10,000 steps."""
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4096
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = patch_model(LlamaForCausalLM(config).eval(), *patches)
    counters.clear()
    greedy(model, tokens(length=9), 3)
    assert counters["stats"]["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for length in (3, 5, 9, 17, 60):
            greedy(model, tokens(length=length), generated, prefill_chunk_size=7)
        for length in (2, 11, 40):
            out = model(tokens(length=length), use_cache=True)
            for _ in range(fed):
                out = model(out.logits[:, -1:].argmax(-1), **cached(cache_of(out)))
    assert hits(model)["compiled steps"] >= 5 * (generated - 1) + 3 * fed
    assert hits(model)["graphs compiled"] == 1 and hits(model)["compile milliseconds"] > 0
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("patches", [["compile"], [STREAMING, "compile"]], ids=str)
def test_inductor_gives_eager_tokens_and_logits(patches, caplog):
    plain, model = pair("llama", *patches)
    with caplog.at_level(logging.INFO, "patchkit"):
        greedy(model, tokens(length=3), 2)
    assert any(f"kept in {_compat.inductor_cache()} for later runs" in record.getMessage() for record in caplog.records)
    for length in (3, 7, 20):
        assert torch.equal(greedy(model, tokens(length=length)), greedy(plain, tokens(length=length)))
    ids, mask = left_padded([4, 11, 9])
    assert torch.equal(greedy(model, ids, attention_mask=mask), greedy(plain, ids, attention_mask=mask))
    assert logit_error(decoded(model, tokens()), decoded(plain, tokens())) <= CLOSE
    assert hits(model)["graphs compiled"] == 2  # a batch of one row, one of three


def assert_steps_are_exact(family, compiling):
    plain, model = pair(family, compiling)
    ids = tokens(length=12)
    assert logit_error(decoded(model, ids), decoded(plain, ids)) <= CLOSE  # past the tiny models' own windows of 8
    assert hits(model)["compiled steps"] == 7 and hits(model)["eager forwards"] == 1


@pytest.mark.parametrize("family", fast_first(family for family in families() if not is_refused("compile", family)))
def test_steps_of_every_family(family):
    assert_steps_are_exact(family, EAGER_BACKEND)


@pytest.mark.parametrize("compiling", [EAGER_BACKEND, LAYERS], ids=["model", "layers"])
@pytest.mark.parametrize("family", [family for family in families() if is_refused("compile", family)])
def test_families_that_are_refused(family, compiling):
    with refusal("compile", family):
        patch_model(tiny_model(family), compiling)


@pytest.mark.parametrize("family", fast_first(["llama", "gemma2", "gpt_oss", "deepseek_v3", "bloom"], ["gpt_oss", "deepseek_v3"]))
def test_steps_layer_by_layer(family):
    assert_steps_are_exact(family, LAYERS)


@pytest.mark.parametrize(
    ("family", "compiling"),
    fast_first(
        [(family, EAGER_BACKEND) for family in SERVED_STREAMS] + [(family, LAYERS) for family in ("llama", "gemma3_text", "deepseek_v3")],
        [("llama", EAGER_BACKEND), ("gemma3_text", EAGER_BACKEND), ("gpt_oss", EAGER_BACKEND), ("deepseek_v3", LAYERS)],
    ),
    ids=lambda value: value if isinstance(value, str) else value.scope,
)
def test_steps_of_streams(family, compiling):
    plain, model = pair(family, STREAMING, compiling)
    ids, mask = left_padded([30, 24])
    # Prompts shorter and longer than the window; the steps go past both, and past the turn of padded rows' sinks.
    for prompt in (7, 12):
        assert logit_error(decoded(model, ids, prompt, mask), decoded(plain, ids, prompt, mask)) <= CLOSE
    assert hits(model)["compiled steps"] == 23 + 18


@pytest.mark.parametrize("patches", [[EAGER_BACKEND], [STREAMING, EAGER_BACKEND]], ids=["plain", "streaming"])
def test_beams_assistants_and_more_turns(patches):
    plain, model = pair("llama", *patches)
    ids = tokens(length=7).repeat(1, 2)  # a text that repeats itself, so that lookups are found
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(model, ids, **options), greedy(plain, ids, **options))
    turn = greedy(model, ids, 12, return_dict_in_generate=True)
    more = torch.cat([turn.sequences, tokens(length=4)], 1)
    assert torch.equal(greedy(model, more, 12, **cached(cache_of(turn))), greedy(plain, more, 12))


@torch.no_grad()
def rolled_back(model, seen: int, kept: int):
    """A cache that saw ``seen`` tokens, all but the first in steps, and took back all but ``kept``."""
    cache = cache_of(model(tokens(length=1), use_cache=True))
    cache.activate_past_recording()
    decoded(model, tokens(length=seen)[:, 1:], 1, cache=cache)
    cache.crop(kept - seen)
    return cache


@pytest.mark.parametrize("compiling", [EAGER_BACKEND, LAYERS], ids=["model", "layers"])
def test_rollback(compiling):
    """Take back steps before, at and after the window fills, down to fewer tokens than there are sinks, and feed others."""
    plain, model = pair("llama", STREAMING, compiling)
    other = tokens(length=24, seed=8)
    for seen, kept in ((6, 4), (10, 6), (20, 15), (12, 1)):
        fresh = decoded(plain, torch.cat([tokens(length=seen)[:, :kept], other], 1), 1)[:, kept:]
        assert logit_error(decoded(model, other, 1, cache=rolled_back(model, seen, kept)), fresh) <= CLOSE
    assert hits(model)["graphs compiled"] == 1


def test_steps_across_a_rebase():
    """Frame positions are bounded by 512 here: the ring is turned several times, between steps of the one graph."""
    plain, model = pair("llama", "streaming(sinks=2, window=300)", EAGER_BACKEND)
    ids = tokens(2, 780)
    with torch.no_grad():
        caches = [cache_of(one(ids[:, :500], use_cache=True)) for one in (plain, model)]
    expected, actual = (decoded(one, ids[:, 500:], 1, cache=cache) for one, cache in zip((plain, model), caches, strict=True))
    assert caches[1].stream.base.max() > 0
    assert logit_error(actual, expected) <= CLOSE
    assert hits(model)["graphs compiled"] == 1


def test_a_fixed_cache_grows_to_the_next_power_of_two():
    plain, model = pair("llama", EAGER_BACKEND)
    ids = tokens(length=LEAST_ROOM + 4) % 60 + 4
    start = LEAST_ROOM - 4
    with torch.no_grad():
        caches = [cache_of(one(ids[:, :start], use_cache=True)) for one in (plain, model)]
    assert caches[1].room == LEAST_ROOM
    expected, actual = (decoded(one, ids[:, start:], 1, cache=cache) for one, cache in zip((plain, model), caches, strict=True))
    assert logit_error(actual, expected) <= CLOSE
    assert caches[1].room == 2 * LEAST_ROOM and caches[1].get_seq_length() == ids.shape[1]
    assert hits(model)["graphs compiled"] == 2
    with pytest.raises(ValueError, match="crop"):
        caches[1].crop(-10_000)


# -- which forwards are compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [[EAGER_BACKEND], [STREAMING, EAGER_BACKEND]], ids=["plain", "streaming"])
def test_prompts_and_chunks_run_eagerly_and_are_counted(patches):
    model = patch_model(tiny_model("llama"), *patches)
    with torch.no_grad():
        cache = cache_of(model(tokens(length=9), use_cache=True))
        model(tokens(length=4), **cached(cache))
        assert "compiled steps" not in hits(model) and hits(model)["eager forwards"] == 2
        model(tokens(length=1), **cached(cache))
        assert hits(model)["compiled steps"] == 1 and hits(model)["eager forwards"] == 2
        asked = model(tokens(length=1), **cached(cache), output_hidden_states=True)
    assert len(asked.hidden_states) == 3
    assert hits(model)["compiled steps"] == 1 and hits(model)["eager forwards"] == 3


def test_a_stream_shorter_than_its_sinks_runs_eagerly():
    model = patch_model(tiny_model("llama"), "streaming(sinks=4, window=6)", EAGER_BACKEND)
    decoded(model, tokens(length=9), 1)
    assert hits(model)["eager forwards"] == 4 and hits(model)["compiled steps"] == 5


def test_what_runs_eagerly_against_expectation_is_logged_once(caplog):
    plain, model = pair("llama", EAGER_BACKEND)
    with caplog.at_level(logging.WARNING, "patchkit"):
        given = decoded(model, tokens(), cache=DynamicCache(config=model.config))
    assert torch.equal(given, decoded(plain, tokens()))
    assert [record.getMessage() for record in caplog.records if "DynamicCache" in record.getMessage()] == [
        f"patchkit: steps of this model run uncompiled: they are given a DynamicCache, leave {CACHE} out of the first call"
    ]
    cache = cache_of(model(tokens()))  # gradients are enabled: the model's own cache
    assert not isinstance(cache, FixedCache) and "compiled steps" not in hits(model)


def test_training_and_gradients_are_as_without():
    plain, model = pair("llama", EAGER_BACKEND)
    losses = [one.train()(tokens(), labels=tokens()).loss for one in (plain, model)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


# -- undo, copies, failures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patches", [[EAGER_BACKEND], [STREAMING, LAYERS]], ids=["plain", "streaming"])
def test_unpatching_leaves_no_compiled_callable(patches):
    model = tiny_model("llama")
    before, expected = snapshot(model), decoded(model, tokens())
    patch_model(model, *patches)
    decoded(model, tokens())
    assert hits(model)["compiled steps"] > 0
    steps = model.model._compiled_call_impl.args[0]
    functions = [weakref.ref(compiled) for compiled in steps.compiled.values()]
    state = weakref.ref(steps)
    assert functions
    del steps
    unpatch_model(model)
    gc.collect()
    assert state() is None and all(function() is None for function in functions)
    assert_restored(before, model)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert torch.equal(decoded(model, tokens()), expected)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("patches", "copied"),
    [
        ([EAGER_BACKEND], copy.deepcopy),
        matrix([STREAMING, LAYERS], copy.deepcopy),
        matrix([EAGER_BACKEND], pickled),
        ([STREAMING, LAYERS], pickled),
    ],
    ids=["plain, deepcopy", "streaming, deepcopy", "plain, pickle", "streaming, pickle"],
)
def test_a_copy_compiles_for_itself_and_is_unpatched_alone(patches, copied):
    model = patch_model(tiny_model("llama"), *patches)
    expected = decoded(model, tokens())
    twin = copied(model)
    graphs, steps = hits(twin)["graphs compiled"], hits(twin)["compiled steps"]
    assert logit_error(decoded(twin, tokens()), expected) <= CLOSE  # weights lie elsewhere, so the last bits may differ
    assert hits(twin)["graphs compiled"] > graphs and hits(twin)["compiled steps"] == 2 * steps
    unpatch_model(twin)
    assert all(module._compiled_call_impl is None for module in twin.modules())
    assert logit_error(decoded(twin, tokens()), decoded(tiny_model("llama"), tokens())) <= CLOSE
    assert torch.equal(decoded(model, tokens()), expected)
    assert hits(model)["compiled steps"] == 2 * steps


def look(module, args):
    """A hook that compiled code cannot follow: it chooses by the numbers in a tensor."""
    if args[0].sum() > 0:
        return (args[0] * 1.0,)
    return None


def test_a_step_that_does_not_compile_is_an_error_and_graph_breaks_are_allowed_by_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_pre_hook(look)
    expected = decoded(model, tokens(length=8))
    with patched(model, STREAMING, EAGER_BACKEND), torch.no_grad():
        cache = cache_of(model(tokens(length=9), use_cache=True))
        with pytest.raises(UnsupportedModel, match=r"(?s)does not compile.*fullgraph=False"):
            model(tokens(length=1), **cached(cache))
        with pytest.raises(StreamError, match="failed half-way"):
            model(tokens(length=1), **cached(cache))
    assert "forward" not in vars(model.model)
    with patched(model, Compile(backend="eager", fullgraph=False)):
        assert logit_error(decoded(model, tokens(length=8)), expected) <= CLOSE


def add_one(seen, module, args, output):
    seen["calls"] += 1
    output.last_hidden_state = output.last_hidden_state + 1
    return output


def test_hooks_on_the_decoder_stay_outside_the_graph():
    model, seen = patch_model(tiny_model("llama"), EAGER_BACKEND), Counter()
    with torch.no_grad():
        cache = cache_of(model(tokens(length=9), use_cache=True))
        model(tokens(length=1), **cached(cache))
        compiled, hook = hits(model)["graphs compiled"], model.model.register_forward_hook(lambda *call: add_one(seen, *call))
        model(tokens(length=1), **cached(cache))
        hook.remove()
    assert seen["calls"] == 1 and hits(model)["graphs compiled"] == compiled and hits(model)["compiled steps"] == 2


# -- options and refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="fast"), "mode='fast': give one of 'default'"),
        (dict(scope="block"), "scope='block'"),
        (dict(fullgraph=1), "fullgraph=1: give True or False"),
        (dict(cudagraphs="yes"), "cudagraphs='yes'"),
        (dict(backend=None), "backend=None"),
    ],
)
def test_bad_options_name_the_value_and_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        Compile(**options)


@pytest.mark.parametrize(
    ("family", "patches", "message"),
    [
        ("llama", ["compile(cudagraphs=True)"], "needs a CUDA device"),
        ("llama", ["compile(backend=inducter)"], "not known to torch.compile"),
        ("llama", ["streaming(sinks=2, window=6, layers=[0])", "compile"], "caches that grow"),
        ("bloom", [STREAMING, "compile"], "ALiBi"),
        ("mpt", ["compile"], "ALiBi"),
        ("qwen3_next", ["compile"], "cache layers of type"),
        ("mamba", ["compile"], "cache layers of type"),
        ("llama_dynamic", ["compile"], "rope_type 'dynamic'"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_left_behind(family, patches, message):
    model = tiny_model(family)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=message):
        patch_model(model, *patches)
    assert_restored(before, model)


def test_a_forward_of_its_own_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].forward = functools.partial(type(model.model.layers[0]).forward, model.model.layers[0])
    with pytest.raises(UnsupportedModel, match="have their own forward"):
        patch_model(model, EAGER_BACKEND)


def test_a_forward_that_comes_later_is_refused_and_kept():
    model = patch_model(tiny_model("llama"), EAGER_BACKEND)
    own = functools.partial(type(model.model).forward, model.model)
    model.model.forward = own
    with pytest.raises(UnsupportedModel, match="after it was patched"):
        model(tokens())
    assert vars(model.model)["forward"] is own


def test_a_generous_limit_costs_no_memory():
    model = patch_model(tiny_model("llama"), EAGER_BACKEND)
    out = model.generate(tokens(length=9), max_length=200_000, stop_strings=None, max_time=1e-9, return_dict_in_generate=True)
    assert cache_of(out).room == 4096


def test_a_cache_of_inference_mode_goes_on_without_it():
    plain, model = pair("llama", EAGER_BACKEND)
    ids = tokens(length=12)
    with torch.inference_mode():
        cache = cache_of(model(ids[:, :8], use_cache=True))
    assert logit_error(decoded(model, ids[:, 8:], prompt=1, cache=cache), decoded(plain, ids)[:, 8:]) <= CLOSE


def test_modes_choose_inductors_options(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: (seen.append(options), function)[1])
    for compiling in (Compile(), Compile(mode="reduce-overhead"), Compile(mode="max-autotune"), Compile(fullgraph=False), EAGER_BACKEND):
        decoded(patch_model(tiny_model("llama"), compiling), tokens(length=7))
    options = [call["options"] for call in seen]
    assert [bool(o.get("cpp_wrapper")) for o in options] == [False, True, False, False, False]
    assert [bool(o.get("max_autotune")) for o in options] == [False, False, True, False, False]
    assert not any(o.get("triton.cudagraphs") for o in options)
    assert [call["fullgraph"] for call in seen] == [True, True, True, False, True]
    assert [call["backend"] for call in seen] == ["inductor"] * 4 + ["eager"]
    on_gpu = torch.nn.Linear(1, 1, device="meta")
    on_gpu.device = torch.device("cuda")
    assert all(
        compiler_options(compiling, on_gpu)["triton.cudagraphs"] for compiling in (Compile(cudagraphs=True), Compile("reduce-overhead"))
    )
    assert not compiler_options(Compile("max-autotune"), on_gpu)["triton.cudagraphs"]
