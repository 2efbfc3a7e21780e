"""Dtypes that change under a patched model: the default one, autocast's, the model's own."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from support import CACHE, cache_of, cached

from patchkit import patch_model
from patchkit.patches.speculative import Speculative
from patchkit.testing import tiny_model

IDS = torch.arange(60)[None] * 7 % 120 + 4
STREAMS = ["streaming(sinks=2, window=60)", "linear(window=60, sinks=2)"]
IN_PLACE = [
    *STREAMS,
    "streaming(sinks=2, window=12)",
    "streaming(sinks=4, window=12, refresh=dynamic_sinks(n=2, every=4))",
    "compile(backend=eager)",
]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = """
import sys, torch
from patchkit import patch_model
from patchkit.kernels import available_ops
from patchkit.testing import tiny_model
spec, dtype = sys.argv[1], getattr(torch, sys.argv[2])
model, plain = tiny_model("llama"), tiny_model("llama")
ids = torch.arange(24)[None] * 5 % 100 + 4
patch_model(model, spec, verbose=False)
wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
torch.set_default_dtype(dtype)
for _ in range(3):
    other = patch_model(tiny_model("llama"), spec, verbose=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
    other.generate(ids, max_new_tokens=6, do_sample=True)
for op in available_ops().values():
    for name, args in op.sample_inputs(torch.device("cpu")):
        for backend, reason in op.explain(*args).items():
            if reason is None:
                op.results(op.backends[backend].run, *args)
print("alive")
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("spec", ["mlp_int8", "linear(window=8)", "speculative(k=4)"])
def test_another_default_dtype_neither_kills_the_process_nor_changes_a_text(spec, dtype):
    done = subprocess.run([sys.executable, "-c", DEFAULTS, spec, dtype], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr[-2000:]


def test_sampled_drafts_are_drawn_in_float32_whatever_the_default_dtype():
    draft = tiny_model("llama", seed=3)
    model = patch_model(tiny_model("llama"), Speculative(draft, k=3), verbose=False)
    with default_dtype(torch.bfloat16):
        assert model.generate(IDS[:, :10].repeat(2, 1), max_new_tokens=10, min_new_tokens=10, do_sample=True).shape == (2, 20)


@pytest.mark.parametrize("spec", IN_PLACE)
def test_a_prompt_read_in_inference_mode_goes_on_outside_of_it(spec):
    model = patch_model(tiny_model("llama"), spec, verbose=False)
    with torch.no_grad():
        cache = cache_of(model(IDS[:, :40], use_cache=True))
        wanted = [model(IDS[:, i : i + 1], use_cache=True, **cached(cache)).logits for i in range(40, 50)]
    with torch.inference_mode():
        cache = cache_of(model(IDS[:, :40], use_cache=True))
        found = [model(IDS[:, i : i + 1], use_cache=True, **cached(cache)).logits for i in range(40, 44)]
    with torch.no_grad():
        found += [model(IDS[:, i : i + 1], use_cache=True, **cached(cache)).logits for i in range(44, 47)]
    with torch.inference_mode():
        found += [model(IDS[:, 47:48], use_cache=True, **cached(cache)).logits]
    with torch.no_grad():
        found += [model(IDS[:, i : i + 1], use_cache=True, **cached(cache)).logits for i in range(48, 50)]
    assert torch.equal(torch.cat(found), torch.cat(wanted))


@pytest.mark.parametrize("spec", IN_PLACE)
@pytest.mark.parametrize("first", [True, False])
def test_autocast_may_begin_or_end_within_a_text(spec, first):
    """Against the unpatched model where nothing is evicted; elsewhere against the text in which autocast is on throughout."""

    def fed(model, switches):
        cache, logits = None, []
        with torch.no_grad():
            for piece, on in zip(IDS[:, :50].split([40, *[1] * 10], 1), switches, strict=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=on):
                    out = model(piece, use_cache=True, **({} if cache is None else cached(cache)))
                cache = cache_of(out)
                logits.append(out.logits.float())
        return torch.cat(logits, 1)

    switches = [first] + [not first] * 5 + [first] * 5
    model, plain = patch_model(tiny_model("llama"), spec, verbose=False), tiny_model("llama")
    found = fed(model, switches)
    wanted = fed(plain, switches) if "window=12" not in spec else fed(model, [True] * 11)
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("spec", ["streaming(sinks=4, window=50)", "linear(sinks=4, window=50)"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_model_cast_after_it_was_patched_turns_as_one_cast_before(spec, family):
    ids = torch.randint(3, 120, (1, 900), generator=torch.Generator().manual_seed(1))
    late, early = patch_model(tiny_model(family), spec, verbose=False), tiny_model(family)
    late.to(torch.bfloat16).float()
    patch_model(early.to(torch.bfloat16).float(), spec, verbose=False)
    caches = [None, None]
    with torch.no_grad():
        for piece in ids.split(60, 1):
            outs = [m(piece, use_cache=True, **({} if c is None else {CACHE: c})) for m, c in zip((late, early), caches, strict=True)]
            caches = [cache_of(out) for out in outs]
            assert torch.equal(outs[0].logits, outs[1].logits)
    assert copy.deepcopy(late) is not late
