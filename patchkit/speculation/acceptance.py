"""Which drafts stand. `Exact` keeps the text, or its distribution, that of plain decoding; every other policy changes it.

A policy sees, for each proposed token, the target's scores [V] after the run's logits processors. The first token that is not
accepted is replaced by the target's own choice, and ends the round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from patchkit.speculation.controllers import parse_call


@dataclass(frozen=True)
class Acceptance:
    """A policy. ``lossless`` says whether the output is that of plain decoding."""

    name: ClassVar[str]
    lossless: ClassVar[bool] = False

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        """Whether ``token`` stands, given the target's scores [V] float32."""
        raise NotImplementedError(f"{type(self).__name__} has no accepts(scores, token): define it")

    def __str__(self) -> str:
        options = ", ".join(repr(value) for value in vars(self).values())
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True)
class Exact(Acceptance):
    """Greedy runs: a draft stands if it is the target's most likely token. Sampled runs: a deterministic draft stands if it is the
    token that the target draws, a drawn one by the rejection rule (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192,
    algorithm 1; Chen et al. 2023, https://arxiv.org/abs/2302.01318), which leaves the target's distribution."""

    name = "exact"
    lossless = True


@dataclass(frozen=True)
class LongestPrefix(Acceptance):
    """Lossy in sampled runs: drafts stand as long as each is the target's most likely token."""

    name = "longest_prefix"

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        return int(scores.argmax()) == token


@dataclass(frozen=True)
class ConfThreshold(Acceptance):
    """Lossy: a draft stands if the target gives it a probability of at least ``tau``."""

    name = "conf_threshold"
    tau: float

    def __post_init__(self) -> None:
        _require_share(self.name, "tau", self.tau)

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        return float(scores.softmax(-1)[token]) >= self.tau


@dataclass(frozen=True)
class TopKAgree(Acceptance):
    """Lossy: a draft stands if it is among the target's ``k`` most likely tokens."""

    name = "topk_agree"
    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"topk_agree(k={self.k!r}): give a whole number, at least 1")

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        return bool(scores[token] > -torch.inf) and int((scores > scores[token]).sum()) < self.k


@dataclass(frozen=True)
class Typical(Acceptance):
    """Lossy: typical acceptance (Cai et al. 2024, https://arxiv.org/abs/2401.10774, section 2.3.2).

    A draft x stands if p(x) > min(epsilon, delta exp(-H(p))), H the entropy in nats; epsilon is ``p`` and delta its square root.
    """

    name = "typical"
    p: float

    def __post_init__(self) -> None:
        _require_share(self.name, "p", self.p)

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        probabilities = scores.softmax(-1)
        entropy = torch.special.entr(probabilities).sum()
        return float(probabilities[token]) > min(self.p, self.p**0.5 * float(torch.exp(-entropy)))


POLICIES: dict[str, type[Acceptance]] = {cls.name: cls for cls in (Exact, LongestPrefix, ConfThreshold, TopKAgree, Typical)}


def acceptance(policy: Acceptance | str) -> Acceptance:
    """The policy itself, or the one that a word such as ``"exact"`` or ``"conf_threshold(0.3)"`` names.

    Raises:
        SpecError: (a ValueError) there is no such policy, its parameter is missing, or out of range.
        TypeError: it is neither a policy nor text.
    """
    if isinstance(policy, Acceptance):
        return policy
    if not isinstance(policy, str):
        raise TypeError(f"acceptance={policy!r}: give one of {', '.join(POLICIES)}, or an object of patchkit.speculation.acceptance")
    parsed: Acceptance = parse_call(policy, POLICIES, "acceptance")
    return parsed


def _require_share(name: str, option: str, value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
        raise ValueError(f"{name}({option}={value!r}): give a probability above 0, at most 1")
