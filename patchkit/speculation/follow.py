"""Reaction of `speculative` to changed weights of its model: drafts follow, and measured acceptance is forgotten."""

from __future__ import annotations

from typing import Any

from patchkit.speculation.shared import Speculation


def follow_weights(model: Any, speculation: Speculation, thorough: bool = False) -> bool:
    """Bring drafter and controller up to date if the weights or adapters of ``model`` have changed. Returns whether they had.

    Texts are the model's own in any case: what is out of date costs acceptance.

    Args:
        thorough: bring the drafter up to date even where no sign of a change is seen.

    Raises:
        StreamError: another thread generates with this model.
    """
    assert speculation.weights is not None
    speculation.exclusive.take(f"generate of this {type(model).__name__}")
    try:
        changes = speculation.weights.changes()
        if changes or thorough:
            speculation.drafter = speculation.drafter.follow(model, thorough)
        if not changes:
            return False
        reason = speculation.drafter.outdated(model, adapters="adapters" in changes)
        if reason is not None:
            speculation.warnings.add(reason)
        speculation.controller.new_weights()
        speculation.weights.settle()
        return True
    finally:
        speculation.exclusive.give_back()
