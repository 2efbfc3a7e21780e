"""Files of a sweep: JSON, CSV and a plot; an interrupted sweep resumes from the JSON."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from patchkit.errors import PatchError
from patchkit.measure.jsonable import jsonable
from patchkit.search.sweep_report import draw
from patchkit.search.sweep_result import Sweep, SweepPoint

FILES = ("sweep.json", "sweep.csv", "sweep.png")


# Elements of each parameter that identify a model.
_SAMPLED = 64


class SweepConflict(PatchError):
    """A folder holds the sweep of another model, or with other settings; the message names what differs."""


def write(sweep: Sweep, folder: Path) -> None:
    """Write `FILES` to ``folder``, which is created if it does not exist."""
    store(sweep, folder)
    _write_csv(sweep, folder / "sweep.csv")
    draw(sweep, folder / "sweep.png")


def store(sweep: Sweep, folder: Path) -> None:
    """Write the JSON file alone, in one rename, so that an interrupted sweep leaves a whole file."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "sweep.json.part"
    unfinished.write_text(json.dumps(jsonable(sweep.to_dict()), indent=2) + "\n")
    os.replace(unfinished, folder / "sweep.json")


def model_digest(model: PreTrainedModel) -> str:
    """Hash of a model's configuration and of the first elements of every parameter."""
    found = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for key, parameter in model.named_parameters():
        found.update(key.encode() + str(tuple(parameter.shape)).encode())
        found.update(parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def ids_digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def stored_rows(folder: Path, settings: dict[str, Any]) -> list[SweepPoint]:
    """Read the results in ``folder``, which must have these settings; empty if there is no sweep.

    Raises:
        SweepConflict: the file cannot be read, or its settings differ.
    """
    path = folder / "sweep.json"
    remedy = f"give another --out, or --restart to drop what is in {folder}"
    try:
        stored = json.loads(path.read_text())
        before, rows = stored["settings"], stored["rows"]
        known = {each.name for each in dataclasses.fields(SweepPoint)}
        made = [SweepPoint(**{key: value for key, value in row.items() if key in known}) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SweepConflict(f"{path} is no sweep that can be resumed ({type(error).__name__}: {error}): {remedy}") from error
    now = jsonable(settings)
    different = [f"{key} {_shortened(before.get(key))} -> {_shortened(now[key])}" for key in now if before.get(key) != now[key]]
    if different:
        raise SweepConflict(f"{path} is a sweep with other settings ({'; '.join(different)}): {remedy}")
    return [_with_infinity(row) for row in made]


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _with_infinity(row: SweepPoint) -> SweepPoint:
    return dataclasses.replace(row, perplexity=math.inf) if row.nll and row.perplexity is None else row


def _write_csv(sweep: Sweep, path: Path) -> None:
    columns = ("name", "sinks", "window", "refresh", "perplexity", "ms_per_token", "over_unpatched", "cache_bytes", "refreshes")
    ratios = [f"{name}{end}" for name in ("over_blocks", "over_plain") for end in ("", "_low", "_high")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *ratios, "on_front", "refused"])
        for row in sweep.to_dict()["rows"]:
            figures = [(row[name] or {}).get(key) for name in ("over_blocks", "over_plain") for key in ("value", "low", "high")]
            writer.writerow([row[column] for column in columns] + figures + [row["on_front"], row["refused"]])
