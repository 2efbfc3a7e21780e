"""Acceptance of the most likely tokens: `LongestPrefix`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchkit.speculation.acceptance import Acceptance


@dataclass(frozen=True)
class LongestPrefix(Acceptance, name="longest_prefix"):
    """Lossy in sampled runs: accepts drafts as long as each is the target's most likely token."""

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        return int(scores.argmax()) == token
