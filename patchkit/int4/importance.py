"""How much the error of each input's weights counts: the mean square of that input on a short text."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from patchkit.anatomy.target import Target
from patchkit.quantised.calibration import calibrated_inputs, calibration_ids

# Added to each mean square, relative to the mean of all: an input that this text hardly uses may matter in another.
_FLOOR = 0.01

# By the unpatched model, then the text: `check`, `promises` and `apply` of a patch ask for the same.
_known: WeakKeyDictionary[Target, dict[bytes, dict[str, torch.Tensor]]] = WeakKeyDictionary()


def mean_squares(target: Target, modules: dict[str, Any], calibration: Any) -> dict[str, torch.Tensor]:
    """Mean square [K] float64 of each input of each module on the calibration text; a module that is not called is missing.

    It is measured when ``target`` is first asked, which has to be before it is patched: what other patches change does not count.
    """
    ids = calibration_ids(target, calibration)
    known = _known.setdefault(target, {})
    text = ids.cpu().numpy().tobytes()
    if any(name not in known.get(text, {}) for name in modules):
        inputs = calibrated_inputs(target, modules, ids)
        known[text] = {name: args[0].reshape(-1, args[0].shape[-1]).double().square().mean(0) for name, args in inputs.items()}
    return {name: known[text][name] for name in modules if name in known[text]}


def importance_of(squares: torch.Tensor | None, k: int, group: int, device: torch.device) -> torch.Tensor:
    """Weights [G, group] float64 of the errors of K inputs: their mean squares [K] with a floor, 1 on average, or 1 throughout for None.

    0 where a last group is filled up.
    """
    weights = torch.ones(k, dtype=torch.float64, device=device)
    if squares is not None and bool(squares.isfinite().all()) and bool(squares.any()):
        weights = squares.to(weights) / squares.mean().to(weights) + _FLOOR
    return F.pad(weights.float().double(), (0, -k % group)).unflatten(0, (-1, group))
