"""A fixed number of drafts: `Fixed`."""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.speculation.controllers import Controller, ControllerSession


@dataclass(frozen=True)
class Fixed(Controller, name="fixed"):
    """A constant K in every round; spec strings write the number alone.

    Attributes:
        k: drafts per round; 0 is plain decoding.
    """

    example = "fixed(4)"

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool):
            raise ValueError(f"k is {self.k!r}: give a whole number, 0 (plain decoding) or more")
        if self.k < 0:
            raise ValueError(f"k is {self.k}: give 0 (plain decoding) or more drafts per round")

    @property
    def spec(self) -> str:
        """The number: `speculative(k=4)`."""
        return str(self.k)

    def begin(self) -> ControllerSession:
        return _FixedSession(self.k)


@dataclass
class _FixedSession(ControllerSession):
    k: int

    def choose(self) -> int:
        return self.k

    def why_plain(self) -> str | None:
        return None
