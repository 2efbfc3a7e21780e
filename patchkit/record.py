"""Record: one patch's account of its changes, choices and counters. `Report` shows the records of all patches of a model."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

_logger = logging.getLogger("patchkit")


class Named(Protocol):
    """The part of a patch that modules below `patchkit.patch` use: its name, its spec string, and its stage in the order of application."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def stage(self) -> int: ...


class Warnings(dict[str, int]):
    """Run-time warnings of a patched model with their counts, such as the reason why a patch did not act in a call.

    Hooks hold it directly, as they hold `Record.hits`, so that a copy of the model copies it without the handle.
    """

    def add(self, text: str) -> None:
        """Count ``text``, and log it the first time."""
        if text not in self:
            _logger.warning("patchkit: %s", text)
        self[text] = self.get(text, 0) + 1


class Record:
    """One patch's account of its changes to a model, and of the run time through ``hits`` and ``warnings``.

    Attributes:
        patch: the patch that this record belongs to.
        hits: run-time counters, kept by the patch.
        warnings: run-time warnings, logged once each.
        same_up_to: `Promises.same_up_to` of the patch for this model.
        modules: facts about single modules, {"model.layers.0.mlp.up_proj": {"snr_db": 44.1}}.
    """

    def __init__(self, patch: Named | None = None) -> None:
        self.patch = patch
        self.hits: Counter[str] = Counter()
        self.warnings = Warnings()
        self.same_up_to = 0
        self.modules: dict[str, dict[str, Any]] = {}
        self._changed: dict[str, int] = {}
        self._left_alone: dict[str, str] = {}
        self._measured: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._lasting: list[str] = []

    def changed(self, what: str, count: int = 1) -> None:
        """Record a change and its number: `changed("attention layers", 12)`. Counts add up.

        A patch that changes nothing is refused with `NothingMatched` and undone, so every `apply` calls this.
        """
        self._changed[what] = self._changed.get(what, 0) + count

    @property
    def changed_nothing(self) -> bool:
        """Whether no change has been recorded."""
        return not any(self._changed.values())

    def left_alone(self, what: str, why: str) -> None:
        """Record parts that were not changed, and why: `left_alone("6 sliding-window layers", "they keep their own window of 512")`."""
        self._left_alone[what] = why

    def measured(self, what: str, figure: str) -> None:
        """Record a figure taken while patching: `measured("1 row", "31.2 -> 9.8 ms")`."""
        self._measured[what] = figure

    def note(self, what: str, choice: str) -> None:
        """Record a choice of the patch, or a fact worth knowing: `note("mode", "dynamic")`."""
        self._notes[what] = choice

    def warn(self, text: str, *, log: bool = False) -> None:
        """Record a warning that holds as long as the model is patched: `warn("positions are not bounded")`.

        Args:
            log: log it at level WARNING too, even with `patch_model(verbose=False)`.
        """
        self._lasting.append(text)
        if log:
            _logger.warning("patchkit: %s", text)

    def describe(self, module: str, **facts: Any) -> None:
        """Record facts about one module: `describe("model.layers.0.mlp.up_proj", snr_db=44.1)`."""
        self.modules.setdefault(module, {}).update(facts)

    def start(self) -> None:
        """Reset counters and run-time warnings, which patching itself may have changed."""
        self.hits.clear()
        self.warnings.clear()

    def report(self) -> PatchReport:
        """Return a copy of the record as it is now."""
        assert self.patch is not None
        return PatchReport(
            name=self.patch.name,
            spec=self.patch.spec,
            warnings={**dict.fromkeys(self._lasting, 0), **self.warnings},
            changed=dict(self._changed),
            left_alone=dict(self._left_alone),
            notes=dict(self._notes),
            measured=dict(self._measured),
            hits=dict(self.hits),
            modules={name: dict(facts) for name, facts in self.modules.items()},
            same_up_to=self.same_up_to,
        )


@dataclass(frozen=True)
class PatchReport:
    """A copy of one patch's record.

    Attributes:
        name: the patch's spec name.
        spec: the patch with its options, as a spec string.
        warnings: {"positions are not bounded": 0}: the number of times that each occurred at run time; 0 for a warning that holds as
            long as the model is patched.
        changed: {"attention layers": 12}.
        left_alone: parts that were not changed, and why, {"6 sliding-window layers": "they keep their own window of 512"}.
        notes: choices of the patch, {"mode": "dynamic"}.
        measured: figures taken while patching, {"1 row": "31.2 -> 9.8 ms"}.
        hits: run-time counters since the model was patched.
        modules: facts about single modules, {"model.layers.0.mlp.up_proj": {"snr_db": 44.1}}.
        same_up_to: sequences of at most this many tokens have the logits of the unpatched model; 0 where length plays no part.
    """

    name: str
    spec: str
    warnings: dict[str, int]
    changed: dict[str, int]
    left_alone: dict[str, str]
    notes: dict[str, str]
    measured: dict[str, str]
    hits: dict[str, int]
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    same_up_to: int = 0

    def warning_lines(self) -> list[str]:
        """One line per warning, with the patch's name."""
        return [f"warning: {self.name}: {text}{f' ({count} times)' if count > 1 else ''}" for text, count in self.warnings.items()]

    def __str__(self) -> str:
        text = f"{self.spec}: {', '.join(f'{count} {what}' for what, count in self.changed.items())}"
        for facts in (self.notes, self.measured):
            if facts:
                text += f"; {', '.join(f'{what} {fact}' for what, fact in facts.items())}"
        if self.left_alone:
            text += f"; left alone: {', '.join(f'{what} ({why})' for what, why in self.left_alone.items())}"
        if self.hits:
            text += f"; hits: {', '.join(f'{what} {count}' for what, count in self.hits.items())}"
        return text


@dataclass(frozen=True)
class Report:
    """The reports of all patches of a model, in the order of application. As text, it begins with the warnings."""

    patches: list[PatchReport]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        warnings = [line for patch in self.patches for line in patch.warning_lines()]
        return "\n".join([*warnings, *map(str, self.patches)])
