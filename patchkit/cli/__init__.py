"""The command line. Each file of this folder except common.py is one command, and is discovered by name.

Results go to stdout, progress and remarks to stderr. With `--json` stdout carries one JSON object and nothing else. A user's
mistake ends in one line on stderr and exit code 1 (2 for a wrong call), never in a traceback.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from typing import Annotated

import typer

from patchkit._compat.loggers import LOUD_AT_IMPORT
from patchkit.cli.common import app


def main() -> None:
    """The console script."""
    app(prog_name="patchkit")


def _show_version(wanted: bool) -> None:
    if wanted:
        from patchkit.measure.environment import version_of

        typer.echo(f"patchkit {version_of('patchkit')}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    for name in LOUD_AT_IMPORT:
        logging.getLogger(name).setLevel(logging.ERROR)


for _module in pkgutil.iter_modules(__path__):
    if _module.name not in ("common", "__main__"):
        importlib.import_module(f"{__name__}.{_module.name}")
