"""`patchkit rewards verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.common import JsonOption, UsageError, app, emit

rewards = typer.Typer(help="Ledgers of signed rewards.", no_args_is_help=True)
app.add_typer(rewards, name="rewards")


@rewards.command()
def verify(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger that patchkit.rl.reward.checked has written.")],
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The HMAC key.")] = None,
    key_env: Annotated[str | None, typer.Option("--key-env", metavar="NAME", help="The environment variable with the HMAC key.")] = None,
    public_key: Annotated[Path | None, typer.Option("--public-key", metavar="FILE", help="The public Ed25519 key, in PEM.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every verdict of a ledger: its signature, its place, and that it is there once. Exit code 1 on the first that fails."""
    from patchkit.rl.keys import Checker, Ed25519PublicKey, HmacKey
    from patchkit.rl.ledger import verify_ledger

    if sum(each is not None for each in (key, key_env, public_key)) != 1:
        raise UsageError("give one of --key FILE, --key-env NAME and --public-key FILE")
    checker: Checker
    if public_key is not None:
        checker = Ed25519PublicKey.from_file(public_key)
    elif key is not None:
        checker = HmacKey.from_file(key)
    else:
        checker = HmacKey.from_environment(str(key_env))
    found = verify_ledger(ledger, checker)
    if as_json:
        emit(dataclasses.asdict(found))
        return
    typer.echo(f"{found.verdicts} verdicts, all signed by this key" if found.verdicts else "no verdicts")
    if found.verdicts:
        typer.echo(f"steps {found.first_step} to {found.last_step}, mean reward {found.mean_reward:.4g}")
        for name, count in sorted(found.verifiers.items()):
            typer.echo(f"{name}: {count}")
    typer.echo(f"last line: {found.last_line}")
