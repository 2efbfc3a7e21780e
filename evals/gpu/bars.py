"""The bars of a whole run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evals.gpu.decode import COMPILED, INT8_COMPILED
from evals.gpu.rows import FAILED, NO_TIME, NOT_MEASURED, PASSED, Row
from evals.gpu.sizes import DTYPES, Sizes

LEAST_SHARE, MOST_MS = 0.75, 2.2


def bars(sections: dict[str, list[Row]], device_name: str) -> list[Row]:
    """Bars with their figures and verdicts: "met", "missed" or "not measured"."""
    found = {row["name"]: row for rows in sections.values() for row in rows if row["status"] == PASSED}
    statuses = [row["status"] for row in sections.get("correctness", [])]
    shares = [row["share"] for row in sections.get("bandwidth", []) if row.get("rows") == 1 and "share" in row]
    compiled, int8 = (found.get(f"{name}: ms per token", {}) for name in (COMPILED, INT8_COMPILED))
    wrong = statuses.count(FAILED) if statuses and NO_TIME not in statuses else None
    share = min(shares) if len(shares) == len(DTYPES) * len(Sizes().shapes) else None
    ms = compiled.get("ms") if "H100" in device_name else None
    ratio = int8.get("other_over_this", {}).get(COMPILED)
    attended = [row for row in sections.get("linear", []) if row["status"] == PASSED and row.get("tokens", 0) >= 2048]
    over_sdpa, over_fla = ([row[f"{name}_over_linear"] for row in attended if f"{name}_over_linear" in row] for name in ("sdpa", "fla"))
    table: list[tuple[str, str, Any, Callable[[Any], bool]]] = [
        ("wrong or failed rows of correctness", "0", wrong, lambda figure: figure == 0),
        ("int8_linear, 1 row: least share of the copy bandwidth", f">= {LEAST_SHARE}", share, lambda figure: figure >= LEAST_SHARE),
        (f"{COMPILED}: ms per token on an H100", f"<= {MOST_MS}", ms, lambda figure: figure <= MOST_MS),
        (f"{COMPILED} / {INT8_COMPILED}: ms per token", "> 1", ratio, lambda figure: figure > 1),
        ("SDPA / linear_attention, from 2048 tokens on: the least", "> 1", min(over_sdpa, default=None), lambda figure: figure > 1),
        ("fla / linear_attention, from 2048 tokens on: the least", ">= 1", min(over_fla, default=None), lambda figure: figure >= 1),
    ]
    return [
        {"bar": bar, "wanted": wanted, "figure": figure, "verdict": NOT_MEASURED if figure is None else "met" if met(figure) else "missed"}
        for bar, wanted, figure, met in table
    ]
