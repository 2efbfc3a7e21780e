"""Measurement of patched views of one model: time per token, perplexity, and which patches acted."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from patchkit.anatomy.target import Target
from patchkit.api import patch_model, report, unpatch_model
from patchkit.errors import UnsupportedModel
from patchkit.measure.calls import GenerateCalls, cache_of, run_within_positions
from patchkit.measure.latency import DecodeStream, decode_latency
from patchkit.measure.paired import Interval, mean_difference
from patchkit.measure.perplexity import perplexity_of, stream_nll
from patchkit.patch import NO_PATCH, Patch, available_patches
from patchkit.search.budget import at_most
from patchkit.search.candidate import specs_of
from patchkit.views import twin

Objective = Literal["decode", "generate"]


# Rounds of a candidate's first timing and of its warm-up; a round of "decode" is one token, a round of "generate" a whole call.
_ROUNDS: dict[Objective, int] = {"decode": 40, "generate": 6}


_WARMUP: dict[Objective, int] = {"decode": 5, "generate": 1}


_LEAST_ROUNDS = 2


# Largest share of the time for patching and warming up one candidate.
_SETUP = 0.2


class ModelMeasurer:
    """`Measurer` of patched views of a model, which share its weights; the model itself is not touched. Views are kept until `drop`.

    Args:
        texts: token ids [T] of each document; their first ``context`` tokens are the prompts of "generate".
        context: tokens before the timed ones.
        seconds: time after which measurements are cut off, where signals can do that (in the main thread; not on Windows).

    Attributes:
        reference: description of the model that perplexity is compared with.

    Raises:
        PatchError: the model is no causal LM, is patched, or cannot run at this length.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[torch.Tensor], context: int, objective: Objective, seconds: float) -> None:
        self.base = model
        self.plain = unpatch_model(patch_model(twin(model).eval(), NO_PATCH, verbose=False))
        self.target = Target(self.plain)
        self.texts, self.context, self.objective = texts, context, objective
        self.documents, self.rounds = len(texts), _ROUNDS[objective]
        self.setup_s, self.deadline = _SETUP * seconds, time.monotonic() + seconds
        length = max(len(text) for text in texts) - 1
        self.block = min(self.target.position_limit or length, length)
        self.reference = "the unpatched model"
        if self.block < length:
            self.reference += f", restarted every {self.block} tokens, the positions that it was made for"
        # By specs, because not every option can be hashed.
        self.views: dict[tuple[str, ...], PreTrainedModel] = {}
        self.reference_nll: list[float] = []
        self.nll: dict[tuple[str, ...], list[float]] = {}
        run_within_positions(self.stream(()).step)

    def time(self, patches: tuple[Patch, ...], rounds: int, seconds: float) -> tuple[list[float], list[float]]:
        """Milliseconds per token, unpatched and patched, of each round; both are timed interleaved, on fresh caches."""
        fresh = specs_of(patches) not in self.views
        timings: dict[str, list[float]] = {"unpatched": [], "patched": []}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with self._at_most(self.setup_s, "patching and warming up"):
                streams = {"unpatched": self.stream(()), "patched": self.stream(patches)}
                # Single steps use a new cache each time; calls of generate make their own.
                if fresh or self.objective == "decode":
                    run_within_positions(decode_latency, streams, 0, _WARMUP[self.objective])
            until = time.monotonic() + seconds
            with self._at_most(math.inf, "timing"):
                while len(timings["patched"]) < rounds and (len(timings["patched"]) < _LEAST_ROUNDS or time.monotonic() < until):
                    for name, times in run_within_positions(decode_latency, streams, len(streams), 0).items():
                        timings[name] += times
        return timings["unpatched"], timings["patched"]

    def increase(self, patches: tuple[Patch, ...], documents: int) -> Interval:
        """Perplexity / the reference's, minus 1, with its interval over documents.

        Patches that promise the same logits are not run: they cannot change it.
        """
        changing: tuple[str, ...] = ()
        for patch in patches:
            promised = patch.promises(self.target)
            if promised.same_logits and not promised.same_tokens:
                raise UnsupportedModel(f"{patch.spec} changes what generate writes, which perplexity does not show: tune without it")
            if not promised.same_logits:
                changing += (patch.spec,)
        texts = self.texts[:documents]
        with self._at_most(math.inf, "scoring"):
            for text in texts[len(self.reference_nll) :]:
                pieces = [stream_nll(self.plain, text[at : at + self.block + 1]) for at in range(0, len(text) - 1, self.block)]
                self.reference_nll.append(_mean(pieces))
            own = self.nll.setdefault(changing, [])
            for text in texts[len(own) :]:
                own.append(_mean([stream_nll(self._view(patches) if changing else self.plain, text)]))
        tokens = [len(text) - 1 for text in texts]
        difference = mean_difference(own[:documents], self.reference_nll[:documents], tokens)
        return Interval(*(perplexity_of(nats) - 1 for nats in (difference.value, difference.low, difference.high)))

    def stream(self, patches: tuple[Patch, ...]) -> DecodeStream:
        """Stream to time: single steps after ``context`` tokens, or calls of `generate` on the beginnings of the texts."""
        view = self._view(patches) if patches else self.plain
        if self.objective == "generate":
            return GenerateCalls(view, None, [text[: self.context] for text in self.texts])
        return DecodeStream(view, run_within_positions(cache_of, view, self.context))

    def idle(self, patches: tuple[Patch, ...]) -> list[str]:
        """Names of the patches whose counters have not moved in any measurement so far."""
        found = []
        for entry in report(self._view(patches)).patches:
            counters = available_patches()[entry.name].acts or tuple(entry.hits)
            if not any(entry.hits.get(counter) for counter in counters):
                found.append(entry.name)
        return found

    def drop(self, patches: tuple[Patch, ...]) -> None:
        """Free the view with these patches."""
        self.views.pop(specs_of(patches), None)

    def _view(self, patches: tuple[Patch, ...]) -> PreTrainedModel:
        if specs_of(patches) not in self.views:
            self.views[specs_of(patches)] = patch_model(twin(self.base).eval(), *patches, verbose=False)
        return self.views[specs_of(patches)]

    def _at_most(self, seconds: float, what: str) -> contextlib.AbstractContextManager[None]:
        left = self.deadline - time.monotonic()
        return at_most(min(seconds, left), f"{what} took over {seconds:.0f} s" if seconds < left else f"the time was over while {what}")


def _mean(pieces: list[torch.Tensor]) -> float:
    return torch.cat(pieces).double().mean().item()
