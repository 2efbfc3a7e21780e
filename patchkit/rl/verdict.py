"""Verdicts, what a verifier says of one text, in a form that can be signed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from patchkit.errors import RewardError
from patchkit.rl.keys import Checker, Signer

# In front of what is signed, so that no signature of anything else can be one of a verdict.
_PURPOSE = b"patchkit verdict\n"
_VERSION = 1


def canonical(value: Any) -> bytes:
    """Return JSON in its one canonical form: ASCII, sorted keys, no spaces, floats as Python's ``repr``.

    Raises:
        RewardError: the value has no form in JSON; NaN and infinities have none.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise RewardError(f"a {type(value).__name__} cannot be written as JSON, which is what is signed ({error})") from None


def digest(text: Any) -> str:
    """Return the SHA-256 of a prompt or completion, a string or a list of messages, in its `canonical` form, as 64 digits."""
    return hashlib.sha256(canonical(text)).hexdigest()


@dataclass(frozen=True)
class RewardVerdict:
    """A verifier's word on one completion of one prompt.

    Attributes:
        verifier: its name.
        prompt_sha256, completion_sha256: `digest` of both.
        reward: what the completion is worth.
        step: of the training in which it was asked.
        nonce: 32 hexadecimal digits that no other verdict has.
        issued: when, in UTC, ISO 8601.
        version: of this form.
    """

    verifier: str
    prompt_sha256: str
    completion_sha256: str
    reward: float
    step: int
    nonce: str
    issued: str
    version: int = _VERSION

    @classmethod
    def of(cls, verifier: str, prompt: Any, completion: Any, reward: float, step: int) -> RewardVerdict:
        """Return a new verdict, with a nonce of its own.

        Raises:
            RewardError: a reward that is no finite number.
        """
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise RewardError(f"the verifier {verifier} gave {reward!r}, which is no finite number")
        now = datetime.now(timezone.utc).isoformat()
        return cls(verifier, digest(prompt), digest(completion), float(reward), int(step), secrets.token_hex(16), now)

    def signed(self, key: Signer) -> SignedVerdict:
        """Return the verdict with its signature."""
        return SignedVerdict(self, key.sign(_PURPOSE + canonical(dataclasses.asdict(self))))


_TYPES = {"verifier": str, "prompt_sha256": str, "completion_sha256": str, "reward": float, "step": int, "nonce": str, "issued": str}


@dataclass(frozen=True)
class SignedVerdict:
    """A verdict and its signature."""

    verdict: RewardVerdict
    signature: str

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as a dict for JSON: ``{"verdict": {...}, "signature": ...}``."""
        return {"verdict": dataclasses.asdict(self.verdict), "signature": self.signature}

    @classmethod
    def from_dict(cls, data: Any) -> SignedVerdict:
        """Read what `to_dict` has written.

        Raises:
            RewardError: it has another form.
        """
        data = data if isinstance(data, dict) else {}
        verdict = data["verdict"] if isinstance(data.get("verdict"), dict) else {}
        names = {*_TYPES, "version"}
        if set(data) != {"verdict", "signature"} or set(verdict) != names or not isinstance(data["signature"], str):
            raise RewardError(f"no signed verdict: give 'signature', and 'verdict' with {', '.join(sorted(names))}")
        for name, kind in _TYPES.items():
            if type(verdict[name]) is not kind:
                raise RewardError(f"{name} of a verdict is {verdict[name]!r}: give a {kind.__name__}")
        if verdict["version"] != _VERSION:
            raise RewardError(f"a verdict of version {verdict['version']!r}, and this patchkit reads version {_VERSION}")
        return cls(RewardVerdict(**verdict), data["signature"])

    def check(self, key: Checker) -> None:
        """Raise a `RewardError` unless the reward is finite and the signature is that of ``key``."""
        if not math.isfinite(self.verdict.reward):
            raise RewardError(f"the reward is {self.verdict.reward!r}, which is no finite number")
        if not key.verify(_PURPOSE + canonical(dataclasses.asdict(self.verdict)), self.signature):
            raise RewardError("the signature is not that of this key for this verdict: one of the three was changed")
