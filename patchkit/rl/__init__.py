"""Reinforcement learning on a patched model: rollouts with TRL, log probabilities, and rewards that are signed.

`patchkit.rl.reward` has what signs and checks verdicts; it loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit.rl.rollouts import Rollouts as Rollouts
    from patchkit.rl.rollouts import rollout_func as rollout_func
    from patchkit.rl.scoring import logprobs as logprobs

_HOMES = {"Rollouts": "rollouts", "rollout_func": "rollouts", "logprobs": "scoring"}
__all__ = ["Rollouts", "logprobs", "rollout_func"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'patchkit.rl' has no attribute {name!r}, available: {', '.join(__all__)}")
