"""`patchkit generate`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patchkit.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PatchesOption,
    UsageError,
    app,
    emit,
    load,
    parse,
    patch,
    report,
    stderr,
    stdin,
)
from patchkit.errors import UnsupportedModel

if TYPE_CHECKING:
    pass


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT|-", help="The text to continue; '-' reads it from stdin.")],
    patches: PatchesOption = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token; above, tokens are sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue a text; tokens are printed as they come."""
    chosen = parse(patches)
    text = stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty: give some text with --prompt, or pipe it in with --prompt -")
    import torch
    from transformers import TextStreamer

    loaded, tokenizer = load(model, dtype, device)
    patch(loaded, chosen)
    inputs = tokenizer(text, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if tokenizer.pad_token_id is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    if not as_json:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    started = time.perf_counter()
    try:
        output = loaded.generate(
            input_ids=inputs["input_ids"].to(loaded.device),
            attention_mask=inputs["attention_mask"].to(loaded.device),
            max_new_tokens=max_new_tokens,
            **options,
        )
    except IndexError as error:
        raise UnsupportedModel(
            f"{type(loaded).__name__} cannot take a text of {prompt_tokens} + {max_new_tokens} tokens ({error}): its position table is "
            "shorter, or the tokenizer is not its own. Shorten the prompt or lower --max-new-tokens"
        ) from error
    seconds = time.perf_counter() - started
    new = output[0, prompt_tokens:]
    if as_json:
        emit({
            "model": model,
            "patches": report(loaded, chosen).to_dict()["patches"],
            "prompt": text,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(new),
            "seconds": seconds,
            "tokens_per_s": len(new) / seconds,
        })  # fmt: skip
        return
    remarks = stderr()
    remarks.print(
        f"{len(new)} tokens in {seconds:.2f} s after a prompt of {prompt_tokens}: {len(new) / seconds:.1f} tokens/s", highlight=False
    )
    remarks.print(str(report(loaded, chosen)) or "unpatched", highlight=False, soft_wrap=True, markup=False)
