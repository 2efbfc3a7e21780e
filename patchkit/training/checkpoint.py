"""Checkpoint file of a conversion."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError
from patchkit.linear.state import load_state
from patchkit.training.conversion import Conversion, Score, StageResult


def read_checkpoint(path: Path, facts: dict[str, Any], target: Target, fresh: Conversion) -> tuple[Conversion, dict[str, Any] | None]:
    """Return the stored conversion, and the stage that was interrupted, if any.

    Args:
        facts: model, text and options of this run.
        fresh: the conversion before its first stage, for its context and limit.

    Raises:
        PatchError: the file belongs to another run.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["run"] != facts:
        other = {name: saved["run"].get(name) for name in facts.keys() | saved["run"].keys() if facts.get(name) != saved["run"].get(name)}
        raise PatchError(f"{path} belongs to another run ({other}): delete it, or name another checkpoint")
    report = saved["report"]
    conversion = Conversion(
        load_state(saved["state"], target),
        fresh.context,
        fresh.limit,
        Score.from_dict(report["unpatched"]),
        Score.from_dict(report["window_alone"]),
        Score.from_dict(report["start"]),
        report["start_errors"],
        [StageResult(**{**stage, "score": Score.from_dict(stage["score"])}) for stage in report["stages"]],
        report["kept_softmax"],
        {},
    )
    return conversion, saved["partial"]


def write_checkpoint(path: Path, facts: dict[str, Any], report: Conversion, partial: dict[str, Any] | None) -> None:
    """Write the file in one rename, so that an interrupted run leaves a whole one."""
    stored = {
        **{name: score and dataclasses.asdict(score) for name, score in report.reference_scores().items()},
        "start_errors": report.start_errors,
        "stages": [dataclasses.asdict(stage) for stage in report.stages],
        "kept_softmax": report.kept_softmax,
    }
    new = path.with_suffix(".new")
    torch.save({"run": facts, "report": stored, "state": report.state.state_dict(), "partial": partial}, new)
    new.replace(path)
