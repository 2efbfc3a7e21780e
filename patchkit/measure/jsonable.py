"""Results as data that strict JSON can hold."""

from __future__ import annotations

import math
from typing import Any


def jsonable(value: Any) -> Any:
    """Convert a result to data for `json.dumps(..., allow_nan=False)`.

    Infinities and NaN become None, tuples become lists, and objects that JSON does not know become their `str`.
    """
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)
