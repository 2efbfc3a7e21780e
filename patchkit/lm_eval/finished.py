"""Results of lm-eval in a folder, by everything that they depend on, so that a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Options of lm-eval that change no result, so that an interrupted run may be resumed with others.
_IRRELEVANT = (
    "config tasks model output_path include_path use_cache cache_requests hf_hub_log_args verbosity show_config write_out "
    "check_integrity log_samples wandb_args wandb_config_args trackio_args"
)


def identity(lm: Any, model: str, spec: str, task: str, config: Any) -> dict[str, Any]:
    """Everything that a result depends on: runs with equal identities have equal results."""
    from patchkit.measure.environment import version_of
    from patchkit.trained_for import TrainedFor, fingerprint, lm_head_weight

    head = lm_head_weight(lm.model)
    return {
        "model": model,
        "head": None if head is None else fingerprint(head),
        "weights": {} if head is None else TrainedFor.of(lm.model).samples,
        "dtype": str(lm.model.dtype),
        "spec": spec,
        "task": task,
        "options": {name: value for name, value in asdict(config).items() if name not in _IRRELEVANT.split()},
        "versions": {name: version_of(name) for name in ("patchkit", "lm_eval", "transformers", "torch")},
    }


def key_of(run: dict[str, Any]) -> str:
    return json.dumps(run, sort_keys=True, default=str)


def finished_results(out: Path, unfinished: Callable[[Path], object]) -> dict[str, dict[str, Any]]:
    """Results in a folder, by the key of their `identity`.

    Args:
        unfinished: called with each file that is left out because it holds no whole result.
    """
    found = {}
    for path in sorted(out.rglob("results_*.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            found[key_of(results["config"]["patchkit"]["run"])] = results
        except (OSError, ValueError, KeyError, TypeError):
            unfinished(path)
    return found


def label_of(task: Any) -> str:
    return task if isinstance(task, str) else str(task.get("task") or task.get("group"))
