"""`patchkit serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    PatchesOption,
    UsageError,
    app,
    load,
    parse,
    patch,
    report,
    stderr,
)

_NEEDED = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


@app.command()
def serve(
    model: ModelArgument,
    patches: PatchesOption = "",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 is any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="Name by which requests call the model; default: MODEL's last part.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="A file with the API key; default: the variable PATCHKIT_API_KEY.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Texts that are generated at the same time.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Texts that may wait; a request for more gets status 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a text.")] = 4096,
    prefill: Annotated[int, typer.Option(min=1, help="Most tokens of waiting prompts that are fed between two rounds.")] = 512,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the model on a CPU; default: torch's, or one less if that is timed to be faster.")
    ] = None,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that texts have to end after SIGTERM.")] = 60.0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
) -> None:
    """Serve a model with OpenAI's API, with a page to chat at its address, until a signal ends it.

    Without --patches, a directory that `patchkit export` wrote has its own patches.
    """
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"a server needs {', '.join(missing)}: pip install 'patchkit[serve]'")
    # Arguments are checked before anything large is imported.
    from patchkit.models import find
    from patchkit.spec import check_spelling

    find(model)
    if patches.strip():
        check_spelling(patches)
    from patchkit.serving.access import VARIABLE, is_open_to_others, read_key

    key = read_key(api_key_file)
    from patchkit.serving.server import listening, run

    bound = listening(host, port)
    remarks = stderr()
    if key is None and is_open_to_others(host):
        remarks.print(
            f"warning: {host} can be reached by other machines, and there is no API key: give --api-key-file, or set {VARIABLE}",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    from patchkit.serving import app as application
    from patchkit.serving.patching import WITHOUT_DRAFTS

    chosen = parse(patches)
    loaded, tokenizer = load(model, dtype, device)
    if not patches.strip():
        chosen = parse(getattr(loaded.config, "patchkit", ""))  # of an exported directory
    if all(each.name != "speculative" for each in chosen):
        chosen += parse(WITHOUT_DRAFTS)
    patch(loaded, chosen)
    served = name or Path(model).name
    asgi = application(
        loaded,
        tokenizer,
        name=served,
        max_rows=max_rows,
        max_queue=max_queue,
        max_tokens=max_tokens,
        prefill=prefill,
        threads=threads,
        api_key=key,
    )
    address, number = bound.getsockname()[:2]
    where = f"[{address}]" if ":" in address else address
    remarks.print(str(report(loaded, chosen)), highlight=False, soft_wrap=True, markup=False)
    remarks.print(f"{served} at http://{where}:{number}/v1; a page to chat at http://{where}:{number}/", highlight=False, soft_wrap=True)
    run(asgi, bound, drain)
