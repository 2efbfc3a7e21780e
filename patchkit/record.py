"""What a patch tells: what it did to a model, and what it has to say while it runs."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

_logger = logging.getLogger("patchkit")


class Named(Protocol):
    """A patch, as far as what stands below patches knows it: its name, its spec string, and when it is applied."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def stage(self) -> int: ...


class Notices(dict[str, int]):
    """What a patch had to say while it ran, such as why it was idle in a call that it should have served; each text with its count.

    Like `Handle.hits` it goes into functions that stay on the model: it can be copied and pickled on its own.
    """

    def say(self, text: str) -> None:
        """Count ``text``, and log it as a warning the first time."""
        if text not in self:
            _logger.warning("patchkit: %s", text)
        self[text] = self.get(text, 0) + 1


@dataclass(frozen=True)
class PatchReport:
    """What one patch did to a model.

    Attributes:
        name: the patch's spec name.
        spec: the patch with its options, as a spec string.
        changed: how many of what was changed, {"attention layers": 12}.
        left_alone: what was not, and why, {"6 sliding-window layers": "they keep their own window of 512"}.
        hits: run-time counters since the model was patched.
        notices: why the patch was idle where it should have acted, and how often; each was logged once as a warning.
        measured: figures taken while patching, {"1 row": "31.2 -> 9.8 ms"}.
        same_up_to: texts of at most this many tokens have the logits of the unpatched model; 0 where length plays no part.
        modules: what was done to each module, for patches that say it, {"model.layers.0.mlp.up_proj": {"snr_db": 44.1}}.
    """

    name: str
    spec: str
    changed: dict[str, int]
    left_alone: dict[str, str]
    hits: dict[str, int]
    measured: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    same_up_to: int = 0
    notices: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.spec}: {', '.join(f'{count} {what}' for what, count in self.changed.items())}"
        if self.measured:
            text += f"; {', '.join(f'{what} {figure}' for what, figure in self.measured.items())}"
        if self.left_alone:
            text += f"; left alone: {', '.join(f'{what} ({why})' for what, why in self.left_alone.items())}"
        if self.hits:
            text += f"; hits: {', '.join(f'{what} {count}' for what, count in self.hits.items())}"
        for notice, count in self.notices.items():
            text += f"; note: {notice}{f' ({count} times)' if count > 1 else ''}"
        return text


@dataclass(frozen=True)
class Report:
    """What patchkit did to a model, one entry per patch in the order of application."""

    patches: list[PatchReport]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(map(str, self.patches))
