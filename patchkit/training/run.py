"""A running conversion: its stages, its scores, its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError
from patchkit.linear.state import LinearState
from patchkit.measure.latency import DecodeStream, decode_latency, median_ms, prefilled_cache
from patchkit.training.checkpoint import read_checkpoint, write_checkpoint
from patchkit.training.conversion import Conversion, Rates, StageName, StageResult
from patchkit.training.recovery import Lora, lm_loss, projections
from patchkit.training.scoring import Scorer
from patchkit.training.student import Student
from patchkit.training.transfer import errors, fit_readouts, transfer_loss
from patchkit.views import twin

_SAVE_EVERY = 25

_PROBES = 16  # sequences on which errors are measured before and after a stage

_READOUT_TEXTS = 32

_TIMED_CONTEXT = 1024


class ConversionRun:
    """A running conversion.

    Attributes:
        report: results so far.
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
        self.model, self.target, self.tokens, self.context = model, target, tokens, context
        self.batch, self.length, self.rates, self.seed, self.progress = batch, length, rates, seed, progress
        self.report = Conversion(state, context, limit, None, None, None, {}, [], [], {})
        self.scorer = Scorer(model, target, heldout, context, limit)
        self.partial: dict[str, Any] | None = None
        self.path: Path | None = None
        self.facts: dict[str, Any] = {}
        self.student = Student(twin(model).eval(), target, state)
        self._to_device()

    # -- the checkpoint -------------------------------------------------------------------------------------------------------

    def open(self, path: Path | None, facts: dict[str, Any]) -> None:
        """Resume from the checkpoint, if there is one.

        Raises:
            PatchError: it belongs to another run.
        """
        self.path, self.facts = path, facts
        if path is None or not path.exists():
            return
        self.report, self.partial = read_checkpoint(path, facts, self.target, self.report)
        self.student.state = self.report.state
        self._to_device()

    def save(self, partial: dict[str, Any] | None = None) -> None:
        """Write the checkpoint."""
        if self.path is not None:
            write_checkpoint(self.path, self.facts, self.report, partial)

    # -- the stages -----------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Score the baselines: the unpatched model, the window alone, and untrained hybrid attention."""
        self.report.start_errors = self._errors()
        self.report.unpatched = self.scorer.score(self.model)
        alone = self.scorer.window_alone(self.report.state)
        self.report.window_alone = None if alone is None else self.scorer.score(alone)
        self.report.start = self.scorer.score(self.scorer.patched(self.report.state))
        self.save()

    def closed_form(self) -> None:
        """Fit the readouts in closed form."""
        if self._has("closed form"):
            return
        started, before = time.perf_counter(), self.report.start_errors
        fit_readouts(self.student, self._texts(_READOUT_TEXTS, self.context, -2))
        self._close(StageResult("closed form", 1, time.perf_counter() - started, _mean(before), 0.0), self._errors())

    def transfer(self, steps: int) -> None:
        """Train feature maps, factors and, if there are any, readouts on attention transfer."""
        if self._has("transfer"):
            return
        texts = max(1, self.batch * self.length // self.context)
        before = _mean(self._errors()) if self.partial is None else self.partial["before"]

        def loss(step: int) -> float:
            return transfer_loss(self.student, self._texts(texts, self.context, step))

        seconds = self._fit("transfer", steps, self._groups(), loss, before)
        self._close(StageResult("transfer", steps, seconds, before, 0.0), self._errors())

    def keep_worst(self, count: int) -> None:
        """Restore the softmax attention of the ``count`` layers with the largest error."""
        if count == 0 or self.report.kept_softmax or self._has("recovery"):
            return
        last = self.report.stages[-1].errors if self.report.stages else self.report.start_errors
        self.report.kept_softmax = sorted(sorted(last, key=last.__getitem__, reverse=True)[:count])
        for index in self.report.kept_softmax:
            del self.report.state.parts[index]
        alone = self.scorer.window_alone(self.report.state)  # these layers keep all keys there, too
        self.report.window_alone = None if alone is None else self.scorer.score(alone)
        self.save()

    def recovery(self, steps: int, rank: int, distill: float) -> None:
        """Train adapters on the language-modelling loss; feature maps, factors and readouts continue to train."""
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
        self._close(StageResult("recovery", steps, seconds, before, probed()), {})

    def finish(self) -> Conversion:
        """Return the report, with the time per decoded token; the state is frozen and on the CPU."""
        for part in self.report.state.parts.values():
            part.requires_grad_(False).cpu()
        unpatched, linear = twin(self.model).eval(), self.scorer.patched(self.report.state)
        streams = {
            name: DecodeStream(model, prefilled_cache(model, _TIMED_CONTEXT))
            for name, model in (("unpatched", unpatched), ("linear", linear))
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

    def _close(self, stage: StageResult, errors: dict[int, float]) -> None:
        if errors:
            stage.errors, stage.after = errors, _mean(errors)
        stage.score = self.scorer.score(self.scorer.patched(self.report.state))
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
        """Pieces [count, length] of the text, sampled by the seed and the step."""
        random = torch.Generator().manual_seed(1_000_003 * self.seed + step + 2)
        starts = torch.randint(len(self.tokens) - length + 1, (count,), generator=random)
        return torch.stack([self.tokens[start : start + length] for start in starts.tolist()]).long()

    def _has(self, name: StageName) -> bool:
        return any(stage.name == name for stage in self.report.stages)

    def _to_device(self) -> None:
        for part in self.report.state.parts.values():
            part.requires_grad_(False).to(self.model.device)


def _mean(errors: dict[int, float]) -> float:
    return sum(errors.values()) / len(errors)
