"""`patchkit patches`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from patchkit.cli.common import JsonOption, UsageError, app, emit, print_table, stderr
from patchkit.cli.tables import default_of, fill, summary, tables
from patchkit.spelled import Spelled, is_required, options_of, spell


@app.command()
def patches(
    pages: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PAGE]...", help="With --markdown: pages whose tables to rewrite, instead of printing one."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table of README.md: what each patch is for, exactness, costs, source.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the patches that --patches can name, with their options."""
    from patchkit.patch import available_patches

    if pages and not markdown:
        raise UsageError(f"{pages[0]} is given without --markdown: add it to rewrite the tables of pages")
    for page in pages or []:
        stderr().print(f"{page}: {'written' if fill(page) else 'as it was'}", markup=False, highlight=False, soft_wrap=True)
    if pages:
        return
    if markdown:
        print(tables()["patches"], end="")
        return
    listed: dict[str, dict[str, Any]] = {
        name: {
            "summary": summary(cls),
            "stage": cls.stage.name.lower(),
            "options": {option: _default_of(field) for option, field in options_of(cls).items()},
            "example": cls.example,
        }
        for name, cls in available_patches().items()
    }
    if as_json:
        emit(listed)
        return
    rows = [
        [name, listed[name]["stage"], ", ".join(_option(*option) for option in options_of(cls).items()), listed[name]["summary"]]
        for name, cls in available_patches().items()
    ]
    print_table(Console(), None, ["patch", "stage", "options", "what it does"], rows)


def _option(name: str, field: Any) -> str:
    return f"{name}=required" if is_required(field) else f"{name}={spell(default_of(field))}"


def _default_of(field: Any) -> Any:
    """The default of an option as JSON: objects as their spec strings, "required" for none."""
    if is_required(field):
        return "required"
    default = default_of(field)
    return default.spec if isinstance(default, Spelled) else default
