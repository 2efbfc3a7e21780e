"""One token after another through a model of the shape of Pythia-2.8b: times and greedy tokens of patched views."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from evals.gpu.rows import Cases, NotMeasured, Row
from evals.gpu.sizes import Sizes
from evals.gpu.timing import copy_bandwidth, synchronize
from patchkit import _compat, patch_model, report
from patchkit.int8.weight import Int8Weight
from patchkit.measure.latency import DecodeStream, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.testing import TOLERANCES, logit_error
from patchkit.views import twin

SINKS = 4
UNPATCHED, STREAMING = "unpatched", "streaming"
COMPILED, INT8_COMPILED = "streaming + compile + cudagraphs", "streaming + int8 + compile + cudagraphs"


def decode(sizes: Sizes, device: torch.device) -> Cases:
    """Cases of every view: its time and, of compiled ones, its tokens."""
    bench = Decode(sizes, device)
    for name in bench.specs:
        yield f"{name}: ms per token", functools.partial(bench.time, name)
        if name in bench.eager:
            yield f"{name}: greedy tokens", functools.partial(bench.compare, name)


class Decode:
    """Views of one model over the same weights, each with its own patches, made when first needed."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.context = SINKS + sizes.window
        streaming, int8 = f"streaming(sinks={SINKS}, window={sizes.window})", "mlp_int8(mode=weight_only)"
        compiled, graphed = (f"compile({', '.join([*options, *sizes.compiler])})" for options in ((), ("cudagraphs=True",)))
        # The most important first, in case the time runs out.
        self.specs = {
            UNPATCHED: "",
            STREAMING: streaming,
            COMPILED: f"{streaming} + {graphed}",
            "streaming + int8": f"{streaming} + {int8}",
            INT8_COMPILED: f"{streaming} + {int8} + {graphed}",
            "streaming + compile": f"{streaming} + {compiled}",
        }
        # Compiled views, each with the eager view that it must agree with.
        self.eager = {COMPILED: STREAMING, INT8_COMPILED: "streaming + int8", "streaming + compile": STREAMING}
        self.streams: dict[str, DecodeStream] = {}

    @functools.cached_property
    def model(self) -> Any:
        """Model with random weights, initialised on the device."""
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(GPTNeoXConfig(rope_parameters=rope, **self.sizes.model), dtype=self.dtype).eval()

    def stream(self, name: str) -> DecodeStream:
        """View with a full cache."""
        if "cudagraphs=True" in self.specs[name] and self.device.type != "cuda":
            raise NotMeasured("CUDA graphs need a GPU")
        if name == UNPATCHED:  # its context grows by a token per step: begin as far below the others' as it will end above
            return DecodeStream(self.model, filled_cache(self.model, self.context - self.sizes.rounds // 2))
        if name not in self.streams:
            view = patch_model(twin(self.model), self.specs[name], verbose=False)
            self.streams[name] = DecodeStream(view, self.full_cache(view))
        return self.streams[name]

    def full_cache(self, view: Any) -> Any:
        """Cache after a few more tokens than the view keeps; the tokens are equal for all views."""
        torch.manual_seed(1)
        return prefilled_cache(view, self.context + 8)

    def time(self, name: str) -> Row:
        """Milliseconds per token, interleaved with every view measured so far."""
        stream = self.stream(name)
        streams = {UNPATCHED: self.stream(UNPATCHED), **self.streams}
        timings = decode_latency(streams, rounds=self.sizes.rounds, warmup=8)
        limit_ms = self.bytes_read(stream.model) / copy_bandwidth(self.sizes, self.device) * 1e3
        row: Row = {"spec": self.specs[name], "ms": median_ms(timings, name), "limit_ms": limit_ms}
        row["share"] = limit_ms / row["ms"]
        row["back_to_back_ms"] = self.back_to_back(stream)
        row["other_over_this"] = {other: paired_ratio(timings, other, name) for other in streams if other != name}
        for patch in [] if name == UNPATCHED else report(stream.model).patches:
            row |= {key.replace(" ", "_"): patch.hits[key] for key in ("graphs compiled", "compile milliseconds") if key in patch.hits}
        return row

    @torch.no_grad()
    def back_to_back(self, stream: DecodeStream) -> float:
        """Milliseconds per token without a synchronisation between tokens."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.sizes.rounds):
            stream.cache = _compat.cache_of(stream.model(input_ids=token, use_cache=True, **{_compat.CACHE: stream.cache}))
        synchronize(self.device)
        return 1000 * (time.perf_counter() - started) / self.sizes.rounds

    def bytes_read(self, view: Any) -> int:
        """Bytes that one token reads: the weights without the embedding, of which it reads one row, and all keys and values."""
        embedding = view.get_input_embeddings().weight
        held = [weight for weight in view.parameters() if weight is not embedding]
        weights = sum(weight.stored_bytes() if isinstance(weight, Int8Weight) else weight.nbytes for weight in held)
        config = view.config
        return weights + 2 * config.num_hidden_layers * self.context * config.hidden_size * self.dtype.itemsize

    @torch.no_grad()
    def compare(self, name: str) -> Row:
        """Greedy tokens of a compiled view compared with the eager one's, which both are fed.

        A different token is a near tie where the eager logits of the two tokens differ by no more than rounding may change them.
        """
        views = [self.stream(self.eager[name]).model, self.stream(name).model]
        caches = [self.full_cache(view) for view in views]
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        allowed, near_ties, worst, wrong = TOLERANCES[self.dtype].logits, 0, 0.0, []
        for index in range(self.sizes.greedy_tokens):
            expected, found = (
                view(input_ids=token, use_cache=True, **{_compat.CACHE: cache}).logits[0, -1].double()
                for view, cache in zip(views, caches, strict=True)
            )
            worst = max(worst, logit_error(found, expected))
            token = expected.argmax().view(1, 1)
            gap = float(expected.max() - expected[found.argmax()])
            if gap > 2 * allowed * max(1.0, float(expected.abs().max()) / 10) or not found.isfinite().all():
                wrong.append(index)
            elif gap > 0:
                near_ties += 1
        row: Row = {"tokens": self.sizes.greedy_tokens, "near_ties": near_ties, "largest_logit_error": worst}
        return {**row, "message": f"tokens {wrong} differ from the eager ones, and are no near ties"} if wrong else row
