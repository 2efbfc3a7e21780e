"""Conversion of a softmax model to hybrid attention in one call: `linearize`.

Three stages, each optional: a closed-form readout per head and a gradient fit of the feature maps (`patchkit.training.transfer`), and
low-rank recovery on the language-modelling loss (`patchkit.training.recovery`). After each, the model is scored as a user will run it:
patched, streamed through one cache. Stages can be interrupted and taken up again, with the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from patchkit import _compat
from patchkit.api import _ATTRIBUTE, _causal_lm, patch_model
from patchkit.errors import PatchConflict, PatchError, UnsupportedModel
from patchkit.linear.state import LinearState, load_state
from patchkit.measure.latency import Stream, decode_latency, median_ms, prefilled_cache
from patchkit.measure.perplexity import block_nll, by_position, encode, stream_nll
from patchkit.target import BAKED_IN, Target
from patchkit.training.recovery import Lora, lm_loss
from patchkit.training.student import Student
from patchkit.training.transfer import errors, fit_readouts, transfer_loss
from patchkit.views import evaluating, twin

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

StageName = Literal["closed form", "transfer", "recovery"]

_SAVE_EVERY = 25
_PROBES = 16  # texts on which errors are taken before and after a stage
_READOUT_TEXTS = 32
_EVALUATED = 16384  # tokens
_TIMED_CONTEXT = 1024
# Where a model says nothing of its context.
_CONTEXT = 2048


@dataclass(frozen=True)
class Rates:
    """Highest learning rates (Adam).

    Attributes:
        maps, readouts, factors: in the transfer.
        lora: of the adapters, in the recovery.
        recovery: by what the first three are multiplied there: the language-modelling loss says much less about each of them.
    """

    maps: float = 1e-2
    readouts: float = 1e-3
    factors: float = 5e-2
    lora: float = 1e-3
    recovery: float = 0.1


@dataclass
class Score:
    """Perplexity of the patched model on text that was kept back.

    Attributes:
        fresh: of texts of one context length C each, at positions 0 to C.
        streamed: of one long text through one cache, by range of positions, {"4096-16384": 12.3}.
        fresh_ratio: over the unpatched model's on the same texts.
        streamed_ratio: over the unpatched model's on the same tokens, streamed too; where the text is longer than the positions that it
            was made for, it starts anew there.
    """

    fresh: float
    streamed: dict[str, float]
    fresh_ratio: float = 1.0
    streamed_ratio: dict[str, float] = field(default_factory=dict)


@dataclass
class Stage:
    """What one stage did.

    Attributes:
        seconds: of training, without scoring.
        before, after: "closed form" and "transfer": RMS error of the attention outputs, relative, mean over layers; "recovery":
            nats per token of hybrid text. Both on the same pieces of the training text.
        errors: after it, of each layer (not for "recovery", which changes the teacher's inputs).
    """

    name: StageName
    steps: int
    seconds: float
    before: float
    after: float
    errors: dict[int, float] = field(default_factory=dict)
    score: Score | None = None


@dataclass
class Conversion:
    """The result of `linearize`.

    Attributes:
        state: for ``LinearAttention(state_dict=...)``; `LinearState.save` writes it.
        context: C, tokens of each text that is scored from its beginning.
        limit: positions that the unpatched model was made for.
        unpatched: its score.
        window_alone: the score of `streaming` with the same window and sinks, and nothing for older tokens: what a conversion has to beat.
        start: the score of untrained hybrid attention, and each layer's error.
        stages: in the order in which they ran.
        kept_softmax: layers that stay as they are.
        ms_per_token: of decoding after 1024 tokens, {"unpatched": ..., "linear": ...}.
    """

    state: LinearState
    context: int
    limit: int
    unpatched: Score | None
    window_alone: Score | None
    start: Score | None
    start_errors: dict[int, float]
    stages: list[Stage]
    kept_softmax: list[int]
    ms_per_token: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """All but the weights, as plain data."""
        facts = {name: getattr(self, name) for name in ("context", "limit", "start_errors", "kept_softmax", "ms_per_token")}
        state = {name: getattr(self.state, name) for name in ("feature_map", "window", "sinks", "horizon", "layers")}
        return {
            **state,
            "adapted": sorted(self.state.lora),
            **facts,
            "unpatched": _plain(self.unpatched),
            "window_alone": _plain(self.window_alone),
            "start": _plain(self.start),
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": sum(stage.seconds for stage in self.stages),
        }

    def tables(self) -> list[Table]:
        """Perplexity by stage and position, with the time of each stage; and the error of each layer by stage."""
        from rich.table import Table

        alone = f"window of {self.state.window} alone" + (f", {self.state.sinks} sinks" if self.state.sinks else "")
        rows: list[tuple[str, Score | None, Stage | None]] = [
            ("unpatched", self.unpatched, None),
            (alone, self.window_alone, None),
            ("untrained", self.start, None),
        ]
        rows += [(stage.name, stage.score, stage) for stage in self.stages]
        tables = []
        if self.unpatched is not None:
            quality = Table(
                title=f"perplexity (in brackets: over unpatched on the same tokens, which starts anew every {self.limit})",
                title_justify="left",
            )
            quality.add_column("after")
            for heading in (f"0-{self.context}, fresh", *self.unpatched.streamed, "s", "before -> after"):
                quality.add_column(heading, justify="right")
            for name, score, stage in rows:
                if score is None:
                    continue
                cells = [f"{score.fresh:.3f} ({score.fresh_ratio:.3f})"]
                cells += [f"{value:.3f} ({score.streamed_ratio[span]:.3f})" for span, value in score.streamed.items()]
                gain = ["", ""] if stage is None else [f"{stage.seconds:.0f}", f"{stage.before:.4f} -> {stage.after:.4f}"]
                quality.add_row(name, *cells, *gain)
            tables.append(quality)
        layers = Table(title="relative error of each layer's attention", title_justify="left")
        layers.add_column("layer")
        fits = [stage for stage in self.stages if stage.errors]
        for heading in ("untrained", *(stage.name for stage in fits), ""):
            layers.add_column(heading, justify="right")
        for index, error in self.start_errors.items():
            found = [f"{stage.errors[index]:.4f}" for stage in fits]
            layers.add_row(str(index), f"{error:.4f}", *found, "softmax kept" if index in self.kept_softmax else "")
        return [*tables, layers]


def linearize(
    model: Any,
    texts: Sequence[str] | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    feature_map: str = "hedgehog",
    window: int = 64,
    sinks: int = 0,
    layers: Sequence[int] | None = None,
    horizon: int | None = None,
    closed_form: bool = True,
    transfer_steps: int = 40,
    lora_steps: int = 200,
    rank: int = 8,
    distill: float = 0.5,
    keep_softmax: int = 0,
    batch: int = 4,
    length: int = 1024,
    rates: Rates | None = None,
    seed: int = 0,
    heldout: torch.Tensor | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert the softmax attention of a model to a softmax window over a linear memory. The model is left as it is.

    Args:
        model: a causal language model of transformers, unpatched.
        texts: texts to learn on, or token ids [n].
        tokenizer: of the model; needed for texts that are not token ids.
        feature_map: see `patchkit.linear.feature_maps`.
        window: W, last tokens that keep softmax attention.
        sinks: S, first tokens of every text that keep it, too.
        layers: indices of the attention layers to convert; None for all with full attention.
        horizon: number of old tokens beyond which their weight grows no more; None for the model's trained context, or ``length`` if
            that is shorter.
        closed_form: whether to fit a readout per head in closed form, on 32 texts.
        transfer_steps, lora_steps: of the gradient fit of the feature maps and of the recovery; 0 leaves a stage out.
        rank: of the adapters.
        distill: share of the softmax model's own distribution in the recovery's loss, within its context; 0 for the text alone.
        keep_softmax: so many layers, those with the largest error after the transfer, stay as they are.
        batch, length: texts per step; tokens of each in the recovery, best more than the model's context. The other stages take
            no more than the context.
        heldout: token ids [n] to score on; None keeps back the last 20th of the texts, at most 16384 tokens.
        checkpoint: a file that is written every 25 steps and after each stage, and from which training goes on if it exists.
        progress: whether to show bars.

    Raises:
        UnsupportedModel: its attention cannot be converted.
        PatchConflict: it is patched.
        PatchError: options or texts that cannot be used, peft is missing, or a checkpoint of another run.
    """
    rates = rates or Rates()
    _check(batch, length, window, sinks, rank, transfer_steps, lora_steps, keep_softmax, distill)
    model = _causal_lm(model)
    if _ATTRIBUTE in vars(model):
        raise PatchConflict("this model is patched: unpatch_model first, the conversion learns from its own softmax attention")
    _compat.self_check()
    target = Target(model)
    chosen = _layers(target, feature_map, window, sinks, layers)
    if keep_softmax >= len(chosen):
        raise PatchError(f"keep_softmax={keep_softmax} of {len(chosen)} layers leaves none to convert: keep fewer")
    limit = target.position_limit or _CONTEXT
    _check_length(target, length)
    tokens, heldout = _tokens(texts, tokenizer, heldout)
    context = min(limit, max(length, window + sinks + 1))
    if len(tokens) < max(length, context) + 1:
        raise PatchError(
            f"{len(tokens)} tokens of text are fewer than one piece of {max(length, context) + 1}: give more, or smaller pieces"
        )

    state = LinearState.start(target, feature_map, window, sinks, horizon or context, chosen)
    run = _Run(model, target, state, tokens, heldout, context, limit, batch, length, rates, seed, progress)
    facts = dict(
        model=state.trained_for.fingerprint, tokens=len(tokens), feature_map=feature_map, window=window, sinks=sinks, horizon=state.horizon,
        layers=chosen, closed_form=closed_form, transfer_steps=transfer_steps, lora_steps=lora_steps, rank=rank, distill=distill,
        keep_softmax=keep_softmax, batch=batch, length=length, rates=list(dataclasses.astuple(rates)), seed=seed,
    )  # fmt: skip
    run.open(None if checkpoint is None else Path(checkpoint), facts)
    with weights_frozen(model):
        if run.report.stages == [] and run.partial is None:
            run.begin()
        if closed_form:
            run.closed_form()
        if transfer_steps:
            run.transfer(transfer_steps)
        run.keep_worst(keep_softmax)
        if lora_steps:
            run.recovery(lora_steps, rank, distill)
    return run.finish()


class _Run:
    """A conversion under way.

    Attributes:
        report: what is done so far.
        partial: the stage that a checkpoint stopped in: its name, steps done, seconds, error before, parameters and optimizer.
    """

    def __init__(
        self,
        model: Any,
        target: Target,
        state: LinearState,
        tokens: torch.Tensor,
        heldout: torch.Tensor,
        context: int,
        limit: int,
        batch: int,
        length: int,
        rates: Rates,
        seed: int,
        progress: bool,
    ) -> None:
        self.model, self.target, self.tokens, self.heldout, self.context = model, target, tokens, heldout, context
        self.batch, self.length, self.rates, self.seed, self.progress = batch, length, rates, seed, progress
        self.report = Conversion(state, context, limit, None, None, None, {}, [], [], {})
        self.partial: dict[str, Any] | None = None
        self.path: Path | None = None
        self.facts: dict[str, Any] = {}
        self.student = Student(twin(model).eval(), target, state)
        self._to_device()

    # -- the file -------------------------------------------------------------------------------------------------------------

    def open(self, path: Path | None, facts: dict[str, Any]) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            PatchError: it belongs to another run.
        """
        self.path, self.facts = path, facts
        if path is None or not path.exists():
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["run"] != facts:
            other = {name: value for name, value in saved["run"].items() if facts.get(name) != value}
            raise PatchError(f"{path} belongs to another run ({other}): delete it, or name another checkpoint")
        report = saved["report"]
        self.report = Conversion(
            load_state(saved["state"], self.target),
            self.context,
            self.report.limit,
            _scored(report["unpatched"]),
            _scored(report["window_alone"]),
            _scored(report["start"]),
            report["start_errors"],
            [Stage(**{**stage, "score": _scored(stage["score"])}) for stage in report["stages"]],
            report["kept_softmax"],
            {},
        )
        self.partial = saved["partial"]
        self.student.state = self.report.state
        self._to_device()

    def save(self, partial: dict[str, Any] | None = None) -> None:
        """Write the checkpoint."""
        if self.path is None:
            return
        report = {
            "unpatched": _plain(self.report.unpatched),
            "window_alone": _plain(self.report.window_alone),
            "start": _plain(self.report.start),
            "start_errors": self.report.start_errors,
            "stages": [dataclasses.asdict(stage) for stage in self.report.stages],
            "kept_softmax": self.report.kept_softmax,
        }
        new = self.path.with_suffix(".new")
        torch.save({"run": self.facts, "report": report, "state": self.report.state.state_dict(), "partial": partial}, new)
        new.replace(self.path)

    # -- the stages -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Score the model as it is, with the window alone, and with untrained hybrid attention."""
        self.report.start_errors = self._errors()
        self.report.unpatched = self.score(self.model)
        alone = self.window_alone()
        self.report.window_alone = None if alone is None else self.score(alone)
        self.report.start = self.score(self.patched(self.report.state))
        self.save()

    def closed_form(self) -> None:
        """Readouts."""
        if self._has("closed form"):
            return
        started, before = time.perf_counter(), self.report.start_errors
        fit_readouts(self.student, self._texts(_READOUT_TEXTS, self.context, -2))
        self._close(Stage("closed form", 1, time.perf_counter() - started, _mean(before), 0.0), self._errors())

    def transfer(self, steps: int) -> None:
        """Feature maps, factors and, where there are any, readouts."""
        if self._has("transfer"):
            return
        texts = max(1, self.batch * self.length // self.context)
        before = _mean(self._errors()) if self.partial is None else self.partial["before"]

        def loss(step: int) -> float:
            return transfer_loss(self.student, self._texts(texts, self.context, step))

        seconds = self._fit("transfer", steps, self._groups(), loss, before)
        self._close(Stage("transfer", steps, seconds, before, 0.0), self._errors())

    def keep_worst(self, count: int) -> None:
        """Give the worst layers back their softmax."""
        if count == 0 or self.report.kept_softmax or self._has("recovery"):
            return
        last = self.report.stages[-1].errors if self.report.stages else self.report.start_errors
        self.report.kept_softmax = sorted(sorted(last, key=last.__getitem__, reverse=True)[:count])
        for index in self.report.kept_softmax:
            del self.report.state.parts[index]
        self.save()

    def recovery(self, steps: int, rank: int, distill: float) -> None:
        """Adapters; feature maps, factors and readouts train on."""
        if self._has("recovery"):
            return
        lora = Lora(self.student, projections(self.target, self.report.state.layers), rank, self.seed)
        teacher, probe = twin(self.model).eval(), self._texts(_PROBES, self.length + 1, -1)

        def probed() -> float:
            with torch.no_grad():
                return sum(lm_loss(self.student, text[None]).item() for text in probe) / len(probe)

        def loss(step: int) -> float:
            found = lm_loss(self.student, self._texts(self.batch, self.length + 1, step), teacher, self.context, distill)
            found.backward()
            return found.item()

        before = probed() if self.partial is None else self.partial["before"]
        groups = [*self._groups(self.rates.recovery), {"params": lora.parameters(), "lr": self.rates.lora}]
        seconds = self._fit("recovery", steps, groups, loss, before)
        self.report.state.lora = lora.weights()
        self._close(Stage("recovery", steps, seconds, before, probed()), {})

    def finish(self) -> Conversion:
        """The report, with the times of a decoded token; the state is frozen and on the CPU."""
        for part in self.report.state.parts.values():
            part.requires_grad_(False).cpu()
        unpatched, linear = twin(self.model).eval(), self.patched(self.report.state)
        streams = {
            name: Stream(model, prefilled_cache(model, _TIMED_CONTEXT)) for name, model in (("unpatched", unpatched), ("linear", linear))
        }
        timings = decode_latency(streams)
        self.report.ms_per_token = {name: median_ms(timings, name) for name in streams}
        return self.report

    # -- parts of a stage -----------------------------------------------------------------------------------------------------

    def _fit(self, name: StageName, steps: int, groups: list[dict[str, Any]], loss_of: Callable[[int], float], before: float) -> float:
        """Train; ``loss_of(step)`` leaves gradients and returns the loss. Returns the seconds that it took."""
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        peaks = [group["lr"] for group in optimizer.param_groups]
        done, seconds = 0, 0.0
        if self.partial is not None:
            done, seconds = self.partial["done"], self.partial["seconds"]
            optimizer.load_state_dict(self.partial["optimizer"])
            with torch.no_grad():
                for parameter, saved in zip(parameters, self.partial["parameters"], strict=True):
                    parameter.copy_(saved)
            self.partial = None
        for parameter in parameters:
            parameter.requires_grad_(True)
        bar = tqdm(total=steps, initial=done, desc=name, unit="step", disable=not self.progress)
        for step in range(done, steps):
            started = time.perf_counter()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
            loss = loss_of(step)
            if not math.isfinite(loss):
                raise PatchError(f"the loss of {name} is {loss} in step {step}: use lower rates (rates=Rates(...)), or other texts")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - started
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}")
            if (step + 1) % _SAVE_EVERY == 0:
                self.save({
                    "done": step + 1, "seconds": seconds, "before": before, "optimizer": optimizer.state_dict(),
                    "parameters": [parameter.detach() for parameter in parameters],
                })  # fmt: skip
        bar.close()
        for parameter in parameters:
            parameter.requires_grad_(False)
        return seconds

    def _close(self, stage: Stage, errors: dict[int, float]) -> None:
        if errors:
            stage.errors, stage.after = errors, _mean(errors)
        stage.score = self.score(self.patched(self.report.state))
        self.report.stages.append(stage)
        self.save()

    def _groups(self, scale: float = 1.0) -> list[dict[str, Any]]:
        named = [item for part in self.report.state.parts.values() for item in part.named_parameters()]
        own = {"factor": self.rates.factors, "readout": self.rates.readouts}
        groups = []
        for kind, rate in {"map": self.rates.maps, **own}.items():
            chosen = [parameter for name, parameter in named if (name if name in own else "map") == kind]
            if chosen:
                groups.append({"params": chosen, "lr": scale * rate})
        return groups

    def _errors(self) -> dict[int, float]:
        return errors(self.student, self._texts(_PROBES, self.context, -1))

    def _texts(self, count: int, length: int, step: int) -> torch.Tensor:
        """[count, length] pieces of the text, drawn from the seed and the step."""
        random = torch.Generator().manual_seed(1_000_003 * self.seed + step + 2)
        starts = torch.randint(len(self.tokens) - length + 1, (count,), generator=random)
        return torch.stack([self.tokens[start : start + length] for start in starts.tolist()]).long()

    def _has(self, name: StageName) -> bool:
        return any(stage.name == name for stage in self.report.stages)

    def _to_device(self) -> None:
        for part in self.report.state.parts.values():
            part.requires_grad_(False).to(self.model.device)

    # -- what it is worth -----------------------------------------------------------------------------------------------------

    def patched(self, state: LinearState) -> Any:
        """A twin of the model, patched with a copy of ``state``."""
        from patchkit.patches.linear import LinearAttention

        frozen = load_state(state.state_dict(), self.target)
        return patch_model(twin(self.model).eval(), LinearAttention(state_dict=frozen), verbose=False)

    def window_alone(self) -> Any:
        """A twin of the model in which the layers to convert see sinks and window, and nothing else; None where streaming is refused."""
        from patchkit.patches.streaming import StreamingLLM

        state = self.report.state
        alone = StreamingLLM(sinks=state.sinks, window=state.window, layers=tuple(state.layers))
        try:
            return patch_model(twin(self.model).eval(), alone, verbose=False)
        except UnsupportedModel:  # learned positions cannot stream; a linear layer has none
            return None

    def score(self, model: Any) -> Score | None:
        """Perplexity of a model on the text kept back; None without such text."""
        if len(self.heldout) <= self.context:
            return None
        edges = [0, self.context, 8 * self.context, 32 * self.context]
        fresh_reference, streamed_reference = self.references
        with evaluating(model):
            fresh, streamed = block_nll(model, self.heldout, self.context), stream_nll(model, self.heldout)
        buckets = by_position(streamed, edges)
        ratios = by_position(streamed - streamed_reference, edges)
        spans = [f"{bucket.start}-{bucket.stop}" for bucket in buckets]
        return Score(
            by_position(fresh, [0, len(fresh)])[0].perplexity,
            {span: bucket.perplexity for span, bucket in zip(spans, buckets, strict=True)},
            by_position(fresh - fresh_reference, [0, len(fresh)])[0].perplexity,
            {span: bucket.perplexity for span, bucket in zip(spans, ratios, strict=True)},
        )

    @functools.cached_property
    def references(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token of the unpatched model, [n - 1] each: given C tokens at a time, and as many as it was made for."""
        with evaluating(self.model):
            pieces = [
                stream_nll(self.model, self.heldout[start : start + self.report.limit + 1])
                for start in range(0, len(self.heldout) - 1, self.report.limit)
            ]
            return block_nll(self.model, self.heldout, self.context), torch.cat(pieces)


@contextlib.contextmanager
def weights_frozen(model: Any) -> Iterator[None]:
    """No parameter of the model takes a gradient; afterwards, those do that did."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def projections(target: Target, layers: list[int]) -> list[str]:
    """The linear layers inside the attention modules of these layers, by name.

    Raises:
        UnsupportedModel: there is none.
    """
    found = [
        f"{layer.name}.{name}"
        for layer in target.attention_layers
        if layer.index in layers
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.Linear | _compat.Conv1D)
    ]
    if not found:
        raise UnsupportedModel(
            f"{type(target.model).__name__} has no linear layers in its attention: leave the recovery out (lora_steps=0)"
        )
    return list(dict.fromkeys(found))


def _layers(target: Target, feature_map: str, window: int, sinks: int, layers: Sequence[int] | None) -> list[int]:
    """The layers to convert, after everything that the patch would refuse is refused."""
    from patchkit.patches.linear import LinearAttention

    LinearAttention(feature_map=feature_map, window=window, sinks=sinks, layers=None if layers is None else tuple(layers)).check(target)
    full = [layer.index for layer in target.attention_layers if layer.kind == "full"]
    return full if layers is None else sorted(set(layers))


def _check_length(target: Target, length: int) -> None:
    """Texts may be longer than the context, since only differences of positions within the window count; but for two kinds of model."""
    name, switch = type(target.model).__name__, _compat.rope_switch(target.config)
    if switch is not None and length > switch:
        raise UnsupportedModel(f"length={length}: {name} turns to other rotary frequencies beyond {switch} tokens, so use at most that")
    learned = any(layer.obstacle == BAKED_IN for layer in target.attention_layers)
    if learned and target.position_limit is not None and length > target.position_limit:
        raise UnsupportedModel(f"length={length}: the learned positions end at {target.position_limit} tokens, so use at most that")


def _tokens(
    texts: Sequence[str] | torch.Tensor, tokenizer: PreTrainedTokenizerBase | None, heldout: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to learn on and to score on, [n] each."""
    if isinstance(texts, str):
        raise PatchError("texts is one string: give a list of texts")
    if isinstance(texts, torch.Tensor):
        tokens = texts.flatten()
    elif tokenizer is None:
        raise PatchError("texts need the model's tokenizer: linearize(model, texts, tokenizer), or give token ids")
    else:
        tokens = torch.tensor([token for text in texts for token in encode(tokenizer, text)], dtype=torch.long)
    if heldout is not None:
        return tokens, heldout.flatten()
    kept = min(_EVALUATED + 1, len(tokens) // 20)
    return tokens[: len(tokens) - kept], tokens[len(tokens) - kept :].long()


def _check(
    batch: int, length: int, window: int, sinks: int, rank: int, transfer_steps: int, lora_steps: int, keep_softmax: int, distill: float
) -> None:
    least = {"batch": (batch, 1), "window": (window, 1), "sinks": (sinks, 0), "rank": (rank, 1), "length": (length, 2)}
    least |= {"transfer_steps": (transfer_steps, 0), "lora_steps": (lora_steps, 0), "keep_softmax": (keep_softmax, 0)}
    if not 0 <= distill <= 1:
        raise PatchError(f"distill={distill}: give a share between 0 and 1")
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise PatchError(f"{name}={value}: give at least {smallest}")


def _mean(errors: dict[int, float]) -> float:
    return sum(errors.values()) / len(errors)


def _plain(score: Score | None) -> dict[str, Any] | None:
    return None if score is None else dataclasses.asdict(score)


def _scored(facts: dict[str, Any] | None) -> Score | None:
    return None if facts is None else Score(**facts)
