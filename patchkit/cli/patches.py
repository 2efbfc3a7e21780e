"""`patchkit patches`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Console

from patchkit.cli.common import (
    JsonOption,
    app,
    emit,
    print_table,
)

if TYPE_CHECKING:
    pass


@app.command()
def patches(as_json: JsonOption = False) -> None:
    """List the patches that --patches can name, with their options."""
    from patchkit.patch import available_patches

    listed: dict[str, dict[str, Any]] = {
        name: {
            "summary": (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else "",
            "stage": cls.stage.name.lower(),
            "options": {field.name: _default_of(field) for field in dataclasses.fields(cls) if field.init},
        }
        for name, cls in available_patches().items()
    }
    if as_json:
        emit(listed)
        return
    rows = [
        [name, entry["stage"], ", ".join(f"{option}={value!r}" for option, value in entry["options"].items()), entry["summary"]]
        for name, entry in listed.items()
    ]
    print_table(Console(), None, ["patch", "stage", "options", "what it does"], rows)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default
