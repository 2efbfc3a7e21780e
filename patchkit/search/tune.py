"""The fastest spec of a model on this machine that keeps its perplexity within a bound, found by
`patchkit.search.halving`.

Speed is the median ratio of an unpatched and a patched run in the same round; quality the perplexity of documents streamed through one
cache, over that of the unpatched model within the positions that it was made for. Both have intervals, and a spec is within the bound
only if its interval's upper end is. No patch is a candidate too.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.anatomy.target import Target
from patchkit.api import patch_model, report, unpatch_model
from patchkit.errors import PatchError, SpecError, UnsupportedModel
from patchkit.measure.calls import Calls, cache_of, within
from patchkit.measure.environment import environment
from patchkit.measure.latency import DecodeStream, decode_latency
from patchkit.measure.paired import Interval, mean_difference
from patchkit.measure.perplexity import TextError, encode, perplexity_of, read_text, stream_nll
from patchkit.patch import NO_PATCH, Patch, Stage, available_patches
from patchkit.search.halving import Search
from patchkit.search.rows import LEAST_DOCUMENTS, Candidate, OutOfTime, percent, specs_of
from patchkit.search.sweep import documents as library_documents
from patchkit.spec import parse_spec
from patchkit.views import twin

Objective = Literal["decode", "generate"]
_MOST_DOCUMENTS, _MOST_TOKENS = 16, 32768
_MOST_CONTEXT, _NEW_TOKENS = 1024, 64
# Rounds in which a candidate is first timed, and that warm it up; a round of "decode" is one token, one of "generate" a whole text.
_ROUNDS: dict[Objective, int] = {"decode": 40, "generate": 6}
_WARMUP: dict[Objective, int] = {"decode": 5, "generate": 1}
_LEAST_ROUNDS = 2
# Share of the time that patching and warming up one candidate may take.
_SETUP = 0.2


class ModelMeasurer:
    """Measures patched views of a model, which share its weights; the model itself is not touched. Views are kept until `drop`.

    Args:
        texts: documents, ids [T] each; their first ``context`` tokens are the prompts of "generate".
        context: tokens before the timed ones.
        seconds: after which measurements are cut off, where signals can do that (in the main thread; not on Windows).

    Attributes:
        reference: what perplexity is compared with, in words.

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
            self.reference += f", started anew every {self.block} tokens, the positions that it was made for"
        # By spec, as not every option can be hashed.
        self.views: dict[tuple[str, ...], PreTrainedModel] = {}
        self.reference_nll: list[float] = []
        self.nll: dict[tuple[str, ...], list[float]] = {}
        within(self.way(()).step)

    def time(self, patches: tuple[Patch, ...], rounds: int, seconds: float) -> tuple[list[float], list[float]]:
        """See `Measurer`."""
        fresh = specs_of(patches) not in self.views
        timings: dict[str, list[float]] = {"unpatched": [], "patched": []}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with self._at_most(self.setup_s, "patching and warming up"):
                ways = {"unpatched": self.way(()), "patched": self.way(patches)}
                # A cache is new each time, and calls of generate make their own.
                if fresh or self.objective == "decode":
                    within(decode_latency, ways, 0, _WARMUP[self.objective])
            until = time.monotonic() + seconds
            with self._at_most(math.inf, "timing"):
                while len(timings["patched"]) < rounds and (len(timings["patched"]) < _LEAST_ROUNDS or time.monotonic() < until):
                    for name, times in within(decode_latency, ways, len(ways), 0).items():
                        timings[name] += times
        return timings["unpatched"], timings["patched"]

    def increase(self, patches: tuple[Patch, ...], documents: int) -> Interval:
        """See `Measurer`. Patches that promise the same logits need no view: the others' perplexity stands."""
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

    def way(self, patches: tuple[Patch, ...]) -> DecodeStream:
        """What is timed: steps after ``context`` tokens, or calls of `generate` on the texts' beginnings."""
        view = self._view(patches) if patches else self.plain
        if self.objective == "generate":
            return Calls(view, None, [text[: self.context] for text in self.texts])
        return DecodeStream(view, within(cache_of, view, self.context))

    def idle(self, patches: tuple[Patch, ...]) -> list[str]:
        """See `Measurer`."""
        found = []
        for entry in report(self._view(patches)).patches:
            counters = available_patches()[entry.name].acts or tuple(entry.hits)
            if not any(entry.hits.get(counter) for counter in counters):
                found.append(entry.name)
        return found

    def drop(self, patches: tuple[Patch, ...]) -> None:
        """See `Measurer`."""
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


@contextlib.contextmanager
def at_most(seconds: float, message: str) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds, where signals can: in the main thread, not on Windows."""
    if seconds <= 0:
        raise OutOfTime(message)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(message)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        # Again after a while, because one that is raised in a destructor is lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # once more: the alarm may have come before the line above
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        best: the chosen row; without patches where nothing pays.
        rows: all candidates, the fastest first, then those that were not timed.
        untried: patches of which nothing was tried, and why.
        settings: objective, context, bound, reference and so on, and the machine.
        seconds: how long the search took.
        stopped: by Ctrl-C, before the time was over.
    """

    best: Candidate
    rows: list[Candidate]
    untried: dict[str, str]
    settings: dict[str, Any]
    seconds: float
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON once infinities are taken out."""
        return {
            **self.settings,
            "best": self.best.to_dict(),
            "rows": [row.to_dict() for row in self.rows],
            "untried": self.untried,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    @property
    def summary(self) -> str:
        """The choice in a sentence."""
        bound = f"{self.settings['max_ppl_increase']:.3g}"
        untimed = [row for row in self.rows if len(row.patches) == 1 and row.lost and row.lost.kind == "no time"]
        if not self.best.patches and untimed:
            singles = sum(len(row.patches) == 1 for row in self.rows)
            return (
                f"the time ran out: of {singles} options {len(untimed)} were not measured, and no other was shown to be faster than no "
                f"patch with a perplexity increase of at most {bound}. Give more --minutes, or leave patches out (--without)"
            )
        if not self.best.patches:
            assert self.best.increase is not None
            if self.best.increase.high <= self.settings["max_ppl_increase"]:
                return f"nothing pays: no spec was shown to be faster than no patch with a perplexity increase of at most {bound}"
            own = percent(self.best.increase)
            return f"nothing that was measured has a perplexity increase of at most {bound}, no patch included ({own})"
        facts = f"{self.best.speedup} times the unpatched speed ({self.settings['objective']} at context {self.settings['context']})"
        quality = f"perplexity increase {percent(self.best.increase)} on {self.best.documents} documents"
        idle = "".join(f"; {name} never acted at this length" for name in self.best.idle)
        return f"{self.best.spec}: {facts}, {quality}{idle}"

    def write(self, path: Path) -> None:
        """Write the chosen spec to a file that `patch_model` reads, with where it comes from as comments."""
        machine = self.settings["environment"]
        lines = [
            f"# patchkit tune, {self.settings['model']}: {self.summary}",
            f"# {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
            self.best.spec,
        ]
        path.write_text("\n".join(" ".join(line.split()) for line in lines) + "\n", encoding="utf-8")


def documents(tokenizer: PreTrainedTokenizerBase, source: str, context: int) -> list[torch.Tensor]:
    """Documents of ``context`` + 64 predictions each, ids [T]: pieces of a text file, or held-out library files for "stdlib".

    Raises:
        TextError: the file cannot be read, or there is too little text for four documents.
    """
    length = context + _NEW_TOKENS
    most = max(LEAST_DOCUMENTS, min(_MOST_DOCUMENTS, _MOST_TOKENS // length))
    if source == "stdlib":
        try:
            found = [torch.tensor(document.ids) for document in library_documents(tokenizer, [], length, most)]
        except TextError as error:
            raise TextError(f"no held-out library file has {length} tokens: give a longer --text, or a smaller --context") from error
    else:
        ids = torch.tensor(encode(tokenizer, read_text(source)))
        starts = range(0, len(ids) - length, length)
        # Spread over the text, if it has more.
        found = [ids[start : start + length + 1] for start in starts]
        found = [found[index * len(found) // min(most, len(found))] for index in range(min(most, len(found)))]
    if len(found) < LEAST_DOCUMENTS:
        raise TextError(
            f"{source} has {len(found)} documents of {length + 1} tokens, and an interval needs {LEAST_DOCUMENTS}: "
            "give a longer text, or a smaller --context"
        )
    return found


def candidates(
    target: Target, objective: Objective, also: Sequence[Patch] = (), without: Sequence[str] = (), tokens: int | None = None
) -> tuple[list[Patch], dict[str, str]]:
    """What to try alone: first options first, of these what is exact and cheap to try before the rest, and compilation last; and why
    there is nothing to try of a patch, by name.

    Args:
        tokens: of the longest text that is timed; options that cannot act in it (a window that holds it all) are left out.

    Raises:
        SpecError: a name in ``without`` is no patch, or a patch in ``also`` cannot be written in a spec file.
    """
    known = available_patches()
    for name in without:
        if name not in known:
            raise SpecError(f"unknown patch {name!r}: available: {', '.join(known)}")
    for patch in also:
        try:
            same = parse_spec(patch.spec) == [patch]
        except SpecError:
            same = False
        if not same:
            raise SpecError(f"{patch.spec} cannot be written in a spec file: give names and paths in the place of objects")
    ranked: list[tuple[int, Patch]] = []
    untried = {}
    for name, kind in known.items():
        given = {patch.spec: patch for patch in [*kind.candidates(target), *also] if patch.name == name}
        options = {spec: patch for spec, patch in given.items() if tokens is None or _reach(patch, target) < tokens}
        if name in without:
            untried[name] = "left out (--without)"
        elif objective == "decode" and kind.stage is Stage.GENERATION:
            untried[name] = "it acts in generate, and single steps are timed (--objective generate)"
        elif given and not options:
            untried[name] = f"none of its options acts in a text of {tokens} tokens (give a longer --context)"
        elif not options:
            untried[name] = "it declares nothing to try without options of your own (--also)"
        else:
            ranked += enumerate(options.values())
    ranked.sort(key=lambda entry: (entry[0], entry[1].stage is Stage.COMPILE, not entry[1].exact, entry[1].stage))
    return [patch for _, patch in ranked], untried


def _reach(patch: Patch, target: Target) -> int:
    """Up to how many tokens ``patch`` changes nothing; 0 where length plays no part, or where it will be refused."""
    try:
        return patch.promises(target).same_up_to
    except PatchError:
        return 0


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = "stdlib",
    max_ppl_increase: float = 0.01,
    minutes: float = 10.0,
    context: int | None = None,
    objective: Objective = "generate",
    also: Sequence[Patch] = (),
    without: Sequence[str] = (),
    name: str = "",
    advance: Callable[[str], object] = lambda spec: None,
) -> Tuning:
    """Search for the fastest spec within a bound on perplexity, for this model on this machine. The model is not touched.

    Args:
        text: a file, or "stdlib" for held-out files of Python's library.
        max_ppl_increase: what the interval's upper end may be: 0.01 is 1 %.
        minutes: after which the search ends. A measurement in its course is cut off in the main thread, but not on Windows.
        context: tokens before the timed ones; None: half the positions that the model was made for, at most 1024.
        objective: what is timed: "decode", steps of one token; "generate", whole calls for 64 tokens, prompt included.
        also, without: patches to try besides those that patches declare, and names of patches to leave out.
        name: of the model, for the record.
        advance: called with a spec before it is measured.

    Raises:
        PatchError: the model cannot be patched or run at this length, a text too short, or a patch that does not exist.
        KeyboardInterrupt: before anything was measured; later, Ctrl-C ends the search with what is known.
    """
    seconds = 60 * minutes
    started = time.monotonic()
    if not 0 < seconds < math.inf:
        raise ValueError(f"minutes={minutes}: give a number above 0")
    if not 0 <= max_ppl_increase < math.inf:
        raise ValueError(f"max_ppl_increase={max_ppl_increase}: give a number such as 0.01, at least 0")
    limit = Target(model).position_limit or math.inf
    if context is None:
        context = int(max(1, min(_MOST_CONTEXT, limit // 2)))
    texts = documents(tokenizer, text, context)
    measurer = ModelMeasurer(model, texts, context, objective, seconds - (time.monotonic() - started))
    singles, untried = candidates(measurer.target, objective, also, without, context + _NEW_TOKENS)
    search = Search(measurer, max_ppl_increase, seconds - (time.monotonic() - started), advance=advance)
    best = search.run(singles)
    settings = {
        "model": name or type(model).__name__,
        "objective": objective,
        "context": context,
        "text": text,
        "max_ppl_increase": max_ppl_increase,
        "minutes": minutes,
        "reference": measurer.reference,
        "environment": environment(),
    }
    rows = sorted(search.rows, key=lambda row: row.speed, reverse=True)
    return Tuning(best, rows, untried, settings, time.monotonic() - started, search.stopped)
