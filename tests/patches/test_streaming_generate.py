"""StreamingLLM under everything that calls a model: generate, pipeline, beams, assistants, accelerate, tensor parallelism."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import oracle_logits
from support import cache_of, cached, fast_first
from transformers import TextStreamer, pipeline
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from patchkit import StreamingLLM, patch_model, report, unpatch_model
from patchkit.errors import StreamError
from patchkit.models import load_model
from patchkit.streaming.cache import StreamingCache
from patchkit.testing import assert_restored, snapshot, tiny_model

SINKS, WINDOW = 2, 6
FAMILIES = ["llama", "gpt_neox", "deepseek_v3", "gemma3_text", "gpt_oss", "bloom", "cohere2"]


def prompt(length: int = 5, seed: int = 1, rows: int = 1) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, tokens: int = 25, **options) -> torch.Tensor:
    # generate would take a pad token inside a text for padding, so none is ever chosen.
    options = {"pad_token_id": 127, "suppress_tokens": [127], "eos_token_id": None, "do_sample": False, **options}
    return model.generate(ids, max_new_tokens=tokens, **options)


def oracle_greedy(model, ids: torch.Tensor, tokens: int = 25) -> torch.Tensor:
    """Greedy continuation by the oracle alone: one token after the other, from logits over everything so far."""
    for _ in range(tokens):
        logits = oracle_logits(model, ids, SINKS, WINDOW)[:, -1:, :127]
        ids = torch.cat([ids, logits.argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(
    ("family", "length"),
    fast_first(itertools.product(["llama", "gemma3_text", "deepseek_v3"], [3, 20]), [("llama", 20), ("gemma3_text", 3)]),
)
def test_generate_gives_the_oracles_tokens(family, length):
    model, ids = tiny_model(family), prompt(length)
    expected, plain = oracle_greedy(model, ids), greedy(model, ids)
    assert not torch.equal(expected, plain), "the window changes no token on this input"
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    assert torch.equal(greedy(model, ids, 25), expected)
    assert torch.equal(greedy(model, ids, 25, use_cache=False), expected)
    assert torch.equal(greedy(model, ids, 25, prefill_chunk_size=4), expected)
    assert torch.equal(greedy(model, ids, 25, cache_implementation="static"), expected)
    assert report(model).patches[0].hits["tokens evicted"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_multi_turn_reuse_of_the_cache(family):
    model = patch_model(tiny_model(family), StreamingLLM(SINKS, WINDOW))
    out = greedy(model, prompt(), 12, return_dict_in_generate=True)
    assert isinstance(cache_of(out), StreamingCache)
    turn = torch.cat([out.sequences, prompt(4, seed=2)], 1)
    fresh = greedy(model, turn, 12)
    assert torch.equal(greedy(model, turn, 12, **cached(cache_of(out))), fresh)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_generate_what_they_generate_alone(family):
    model = patch_model(tiny_model(family), StreamingLLM(SINKS, WINDOW))
    rows = [prompt(5, seed=3), prompt(11, seed=4), prompt(9, seed=5)]
    alone = [greedy(model, row, 20)[:, row.shape[1] :] for row in rows]
    batch = torch.cat([torch.nn.functional.pad(row, (11 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (11 - row.shape[1], 0)) for row in rows])
    together = greedy(model, batch, 20, attention_mask=mask)[:, 11:]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "deepseek_v3", "gpt_oss"])
def test_beam_search_equals_beam_search_without_a_cache(family, monkeypatch):
    model = patch_model(tiny_model(family), StreamingLLM(SINKS, WINDOW))
    orders = []
    reorder = StreamingCache.reorder_cache
    monkeypatch.setattr(StreamingCache, "reorder_cache", lambda cache, order: (orders.append(order.tolist()), reorder(cache, order))[1])
    with_cache = greedy(model, prompt(7), 16, num_beams=3)
    assert any(order != [0, 1, 2] for order in orders), "no beam was reordered"
    assert torch.equal(with_cache, greedy(model, prompt(7), 16, num_beams=3, use_cache=False))


@pytest.mark.parametrize(
    ("family", "length"),
    fast_first(
        itertools.product(["llama", "gpt_neox", "deepseek_v3", "gemma3_text", "gpt_oss"], [3, 7, 20]),
        [("llama", 3), ("gpt_neox", 20), ("deepseek_v3", 7), ("gemma3_text", 20), ("gpt_oss", 7)],
    ),
)
def test_prompt_lookup_and_assistants_give_the_greedy_tokens(family, length):
    model = patch_model(tiny_model(family), StreamingLLM(SINKS, WINDOW))
    ids = prompt(length).repeat(1, 2)  # a text that repeats itself, so that lookups are found
    expected = greedy(model, ids, 30)
    before = report(model).patches[0].hits["forwards"]
    assert torch.equal(greedy(model, ids, 30, prompt_lookup_num_tokens=3), expected)
    assert report(model).patches[0].hits["forwards"] > before
    # Assistants: one that is always right and streams too, one that is often wrong.
    twin = patch_model(tiny_model(family), StreamingLLM(SINKS, WINDOW))
    assert torch.equal(greedy(model, ids, 30, assistant_model=twin), expected)
    stranger = tiny_model("llama", seed=5)
    assert torch.equal(greedy(model, ids, 30, assistant_model=stranger), expected)


def test_sampling_with_a_seed_is_the_same_with_and_without_cache():
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW))
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(greedy(model, prompt(), 30, do_sample=True, use_cache=use_cache))
    assert torch.equal(*texts)


def test_pipeline_and_streamer(capsys):
    model, tokenizer = load_model("stdlib-1m-draft")
    text = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return"
    ids = tokenizer(text, return_tensors="pt").input_ids
    patch_model(model, "streaming(sinks=2, window=10)")
    expected = tokenizer.decode(greedy(model, ids, 40)[0])
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert run(text, **options)[0]["generated_text"] == expected
    both = run([text, "import os\n" + text], batch_size=2, **options)
    assert both[0][0]["generated_text"] == expected
    greedy(model, ids, 40, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.rstrip("\n").endswith(expected.rstrip("\n")[-60:])


@pytest.mark.parametrize("implementation", ["quantized", "offloaded"])
def test_caches_that_would_replace_the_window_are_refused(implementation):
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW))
    with pytest.raises(StreamError, match=f"cache_implementation='{implementation}'"):
        greedy(model, prompt(), cache_implementation=implementation)
    assert torch.equal(greedy(model, prompt()), greedy(model, prompt(), use_cache=False))


def test_continuous_batching_is_refused():
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW))
    pages = PagedAttentionCache.__new__(PagedAttentionCache)  # its type is all that is looked at
    with pytest.raises(StreamError, match="continuous batching"):
        model(input_ids=prompt(), cache=pages)
    generate_batch = getattr(model, "generate_batch", None)
    if generate_batch is not None:
        with pytest.raises(Exception, match=r"(?i)attention|attn|streaming|paged"):
            generate_batch([[5, 6, 7]])


# -- training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_as_if_unpatched(checkpointing):
    ids = prompt(30)
    gradients = []
    for patch in (False, True):
        model = tiny_model("llama").train()
        if patch:
            patch_model(model, StreamingLLM(SINKS, WINDOW))
        if checkpointing:  # called activation checkpointing from transformers 5.24 on
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        packed = torch.tensor([[*range(15), *range(15)]])
        model(input_ids=ids, position_ids=packed, use_cache=False).logits.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with torch.no_grad():
        cache = cache_of(model.eval()(input_ids=ids))
    with pytest.raises(StreamError, match="training mode"):
        model.train()(input_ids=ids[:, :1], **cached(cache))


# -- copies and files -------------------------------------------------------------------------------------------------------


def test_a_copy_streams_and_is_unpatched_on_its_own():
    model = tiny_model("llama")
    before = snapshot(model)
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    expected = greedy(model, prompt())
    twin = copy.deepcopy(model)
    assert torch.equal(greedy(twin, prompt()), expected)
    unpatch_model(model)
    assert_restored(before, model)
    assert torch.equal(greedy(twin, prompt()), expected)
    unpatch_model(twin)
    assert torch.equal(greedy(twin, prompt()), greedy(model, prompt()))


def test_a_pickled_model_streams_in_a_process_that_patched_nothing(tmp_path):
    model = patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW))
    torch.save(model, tmp_path / "model.pt")
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
ids = torch.tensor([[int(i) for i in sys.argv[2].split(",")]])
print(model.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=127, suppress_tokens=[127], eos_token_id=None).tolist())
"""
    ids = ",".join(map(str, prompt()[0].tolist()))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt"), ids]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert json.loads(done.stdout) == greedy(model, prompt()).tolist()


# -- spread over devices and processes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["patch first", "dispatch first"])
def test_disk_offload_in_both_orders(order, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    expected = greedy(patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), prompt())
    if order == "patch first":
        patch_model(model, StreamingLLM(SINKS, WINDOW))
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    if order == "dispatch first":
        patch_model(model, StreamingLLM(SINKS, WINDOW))
    assert torch.equal(greedy(model, prompt()), expected)
    unpatch_model(model)
    assert torch.equal(greedy(model, prompt()), greedy(tiny_model("llama"), prompt()))


def test_device_map_with_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = greedy(patch_model(tiny_model("llama"), StreamingLLM(SINKS, WINDOW)), prompt())
    model = tiny_model("llama")
    modules = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
    }
    accelerate.dispatch_model(model, {**modules, "lm_head": "disk"}, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    patch_model(model, StreamingLLM(SINKS, WINDOW))
    assert torch.equal(greedy(model, prompt()), expected)


TENSOR_PARALLEL = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
from patchkit import StreamingLLM, patch_model
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], tp_plan="auto", dtype=torch.float32).eval()
patch_model(model, StreamingLLM(2, 6))
ids = torch.randint(4, 100, (1, 20), generator=torch.Generator().manual_seed(1))
heads = model.model.layers[0].self_attn.q_proj.weight
heads = heads.to_local() if hasattr(heads, "to_local") else heads
tokens = model.generate(ids, max_new_tokens=25, do_sample=False, pad_token_id=0, eos_token_id=None)
if dist.get_rank() == 0:
    print("ROWS", heads.shape[0], "TOKENS", tokens.tolist())
dist.destroy_process_group()
"""


@pytest.mark.matrix
def test_tensor_parallel_gives_the_tokens_of_one_process(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tmp_path / "run.py"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROWS"))
    rows, tokens = line.removeprefix("ROWS ").split(" TOKENS ")
    assert int(rows) * 2 == model.model.layers[0].self_attn.q_proj.weight.shape[0], "the model was not split"
    patch_model(model, StreamingLLM(2, 6))
    assert json.loads(tokens) == greedy(model, prompt(20), 25).tolist()
