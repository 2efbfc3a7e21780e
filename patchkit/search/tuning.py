"""The result of `patchkit tune`: the chosen spec, all candidates, and why others lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchkit.search.candidate import Candidate, percent


@dataclass(frozen=True)
class Tuning:
    """The result of `tune`.

    Attributes:
        best: the chosen candidate; without patches if nothing pays.
        candidates: the fastest first, then those that were not timed.
        untried: patches of which nothing was tried, by name, with the reason.
        settings: objective, context, bound, reference and so on, and the machine.
        seconds: duration of the search.
        stopped: Ctrl-C ended the search before its time was over.
    """

    best: Candidate
    candidates: list[Candidate]
    untried: dict[str, str]
    settings: dict[str, Any]
    seconds: float
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `jsonable` makes it ready for JSON."""
        return {
            **self.settings,
            "best": self.best.to_dict(),
            "rows": [candidate.to_dict() for candidate in self.candidates],
            "untried": self.untried,
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    @property
    def summary(self) -> str:
        """One sentence about the choice."""
        bound = f"{self.settings['max_ppl_increase']:.3g}"
        untimed = [each for each in self.candidates if len(each.patches) == 1 and each.lost and each.lost.kind == "no time"]
        if not self.best.patches and untimed:
            singles = sum(len(each.patches) == 1 for each in self.candidates)
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
        """Write the chosen spec to a file that `patch_model` reads, with its origin (model, machine, summary) as comments."""
        machine = self.settings["environment"]
        lines = [
            f"# patchkit tune, {self.settings['model']}: {self.summary}",
            f"# {machine['gpu'] or machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}",
            self.best.spec,
        ]
        path.write_text("\n".join(" ".join(line.split()) for line in lines) + "\n", encoding="utf-8")
