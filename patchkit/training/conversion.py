"""Result of a conversion, stage by stage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from patchkit.linear.state import LinearState

if TYPE_CHECKING:
    from rich.table import Table


StageName = Literal["closed form", "transfer", "recovery"]


@dataclass(frozen=True)
class Rates:
    """Highest learning rates (Adam).

    Attributes:
        maps, readouts, factors: rates in the transfer.
        lora: rate of the adapters, in the recovery.
        recovery: factor on the first three in the recovery, where the language-modelling loss determines them much less.
    """

    maps: float = 1e-2
    readouts: float = 1e-3
    factors: float = 5e-2
    lora: float = 1e-3
    recovery: float = 0.1


@dataclass
class Score:
    """Perplexity of a model on held-out text.

    Attributes:
        fresh: perplexity of sequences of one context length C each, at positions 0 to C.
        streamed: perplexity of one long sequence through one cache, by range of positions: {"4096-16384": 12.3}.
        fresh_ratio: fresh / the unpatched model's on the same sequences.
        streamed_ratio: streamed / the unpatched model's on the same tokens, also streamed, but restarted wherever the positions that it
            was made for end.
    """

    fresh: float
    streamed: dict[str, float]
    fresh_ratio: float = 1.0
    streamed_ratio: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, facts: dict[str, Any] | None) -> Score | None:
        """The inverse of `dataclasses.asdict`; None stays None."""
        return None if facts is None else cls(**facts)


@dataclass
class StageResult:
    """Result of one stage.

    Attributes:
        seconds: duration of training, without scoring.
        before, after: "closed form" and "transfer": RMS error of the attention outputs, relative, mean over layers; "recovery":
            nats per token of hybrid text. Both on the same pieces of the training text.
        errors: error of each layer after it (not for "recovery", which changes the teacher's inputs).
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
        context: C, tokens of each sequence that is scored from its beginning.
        limit: positions that the unpatched model was made for.
        unpatched: score of the unpatched model.
        window_alone: score of `streaming` with the same window and sinks, and nothing for older tokens: the baseline of a conversion.
        start, start_errors: score of untrained hybrid attention, and the error of each layer.
        stages: in the order in which they ran.
        kept_softmax: layers that keep softmax attention.
        ms_per_token: milliseconds per decoded token after 1024 tokens, {"unpatched": ..., "linear": ...}.
    """

    state: LinearState
    context: int
    limit: int
    unpatched: Score | None
    window_alone: Score | None
    start: Score | None
    start_errors: dict[int, float]
    stages: list[StageResult]
    kept_softmax: list[int]
    ms_per_token: dict[str, float]

    def reference_scores(self) -> dict[str, Score | None]:
        """Scores of the baselines that the stages are compared with, by name."""
        return {name: getattr(self, name) for name in ("unpatched", "window_alone", "start")}

    def to_json(self) -> dict[str, Any]:
        """Everything except the weights, as plain data."""
        facts = {name: getattr(self, name) for name in ("context", "limit", "start_errors", "kept_softmax", "ms_per_token")}
        state = {name: getattr(self.state, name) for name in ("feature_map", "window", "sinks", "horizon", "layers")}
        return {
            **state,
            "adapted": sorted(self.state.lora),
            **facts,
            **{name: score and dataclasses.asdict(score) for name, score in self.reference_scores().items()},
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "seconds": sum(stage.seconds for stage in self.stages),
        }

    def tables(self) -> list[Table]:
        """Tables of perplexity by stage and position, with the time of each stage, and of the error of each layer by stage."""
        from rich.table import Table

        alone = f"window of {self.state.window} alone" + (f", {self.state.sinks} sinks" if self.state.sinks else "")
        rows: list[tuple[str, Score | None, StageResult | None]] = [
            ("unpatched", self.unpatched, None),
            (alone, self.window_alone, None),
            ("untrained", self.start, None),
        ]
        rows += [(stage.name, stage.score, stage) for stage in self.stages]
        tables = []
        if self.unpatched is not None:
            quality = Table(
                title=f"perplexity (in brackets: / unpatched on the same tokens, restarted every {self.limit})",
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
