"""The printed table, and the description of the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from evals.gpu.rows import NOT_MEASURED, PASSED, Row
from patchkit.measure.environment import environment, version_of

SHOWN = (
    "gb_per_second", "int8_graph_ms", "int8_launched_ms", "linear_over_int8", "share",
    "op_graph_ms", "op_launched_ms", "torch_graph_ms", "torch_launched_ms", "torch_over_op",
    "linear_graph_ms", "linear_launched_ms", "sdpa_graph_ms", "sdpa_over_linear", "fla_graph_ms", "fla_over_linear",
    "ms", "limit_ms", "back_to_back_ms", "other_over_this", "compile_milliseconds", "tokens", "near_ties", "largest_logit_error",
    "stories", "edits", "found",
)  # fmt: skip


def print_table(result: Row) -> None:
    """Print a summary of each section, its rows that did not pass, and the bars."""
    for name, rows in result["sections"].items():
        counts = Counter(row["status"] for row in rows)
        print(f"\n{name}: {', '.join(f'{count} {status}' for status, count in counts.items())}")
        passed = [row for row in rows if row["status"] == PASSED]
        if name == "correctness":
            for op, backend in sorted({(row["op"], row["backend"]) for row in passed}):
                mine = [row for row in passed if (row["op"], row["backend"]) == (op, backend)]
                worst = max((row["error"] / row["bound"] for row in mine if row.get("bound")), default=0.0)
                print(f"  {op} {backend}: {len(mine)} passed, largest error {worst:.2g} of what is allowed")
        else:
            for row in passed:
                print(f"  {row['name']}: {', '.join(f'{key} {shown(value)}' for key, value in row.items() if key in SHOWN)}")
        alike: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row["status"] != PASSED:
                alike.setdefault((row["status"], row["message"]), []).append(row["name"])
        for (status, message), names in alike.items():
            print(f"  {status.upper()} {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {message[:400]}")
    print("\nbars")
    for bar in result["bars"]:
        print(f"  {bar['bar']}: {shown(bar['figure'])} (wanted {bar['wanted']}): {bar['verdict']}")


def shown(value: Any) -> str:
    """A figure with four digits."""
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {shown(item)}" for key, item in value.items()) + ")"
    return NOT_MEASURED if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def described(device: torch.device) -> Row:
    """Machine and versions, and the properties of the GPU."""
    facts = environment() | {name: version_of(name) for name in ("triton", "torchao")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts
