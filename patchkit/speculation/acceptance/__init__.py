"""Acceptance policies: which drafts become part of the text. One file per policy; only `exact` leaves the text that of plain decoding.

A policy sees, for each proposed token, the target's scores [V] after the run's logits processors. The first token that is not
accepted is replaced by the target's own choice, and ends the round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from patchkit.registered import Registered
from patchkit.spelled import parse_object


@dataclass(frozen=True)
class Acceptance(Registered, kind="acceptance", folder="patchkit.speculation.acceptance"):
    """An acceptance policy. A subclass with ``name="name"`` is known to spec strings: `speculative(acceptance=name)`.

    Attributes:
        lossless: the output is that of plain decoding.
    """

    lossless: ClassVar[bool] = False

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        """Whether the draft ``token`` is accepted, given the target's scores [V] float32."""
        raise NotImplementedError(f"{type(self).__name__} has no accepts(scores, token): define it")

    def __str__(self) -> str:
        options = ", ".join(repr(value) for value in vars(self).values())
        name = vars(type(self)).get("name", type(self).__name__)
        return f"{name}({options})" if options else name


def acceptance(policy: Acceptance | str) -> Acceptance:
    """Return the policy that text such as ``"exact"`` or ``"conf_threshold(0.3)"`` names; a policy is returned as it is.

    Raises:
        SpecError: (a ValueError) there is no such policy, its parameter is missing, or out of range.
        TypeError: it is neither a policy nor text.
    """
    if isinstance(policy, Acceptance):
        return policy
    if not isinstance(policy, str):
        raise TypeError(
            f"acceptance={policy!r}: give one of {', '.join(Acceptance.available())}, or an object of patchkit.speculation.acceptance"
        )
    return parse_object(policy, "acceptance", Acceptance.available)


def require_share(name: str, option: str, value: float) -> None:
    """Raise a ValueError unless the option ``value`` of the policy ``name`` is a probability above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name}({option}={value!r}): give a probability above 0, at most 1")
