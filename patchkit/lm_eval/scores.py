"""Scores of lm-eval by task and spec, as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TaskScore:
    """Results of lm-eval for one task under one spec, or the reason why there is no score."""

    spec: str
    task: str
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def figures(self) -> dict[tuple[str, str], str]:
        """Value and standard error by subtask and metric."""
        found = {}
        for task, metrics in self.results.get("results", {}).items():
            for name, value in metrics.items():
                metric, _, kind = name.partition(",")
                if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                    error = metrics.get(f"{metric}_stderr,{kind}")
                    found[task, metric] = f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, int | float) and error > 0 else "")
        return found


def scores_table(cells: list[TaskScore]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a table: a column per spec, a row per metric, and a dash where there is no score."""
    specs = list(dict.fromkeys(cell.spec for cell in cells))
    rows = dict.fromkeys(row for cell in cells for row in cell.figures())
    figures = {(cell.spec, row): value for cell in cells for row, value in cell.figures().items()}
    return ["task", "metric", *specs], [[*row, *(figures.get((spec, row), "-") for spec in specs)] for row in rows]


def scores_markdown(cells: list[TaskScore]) -> str:
    headings, rows = scores_table(cells)
    lines = [headings, ["---", "---", *["---:"] * len(headings[2:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
