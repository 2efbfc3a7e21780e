"""`patchkit generate`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from patchkit.chat import system_tokens
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

# `sinks=system` in a spec: the tokens of the system message.
_SYSTEM = re.compile(r"""\bsinks\s*=\s*["']?system\b["']?""")


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT|-", help="The text to continue or answer; '-' reads it from stdin.")],
    patches: PatchesOption = "",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Answer the prompt as a message, or continue it as it is; default: chat where the model can."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message of a chat; 'streaming(sinks=system)' keeps it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token; above, tokens are sampled.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens that hold this share of the probability.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")] = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", metavar="FILE", help="Write JSON that this schema describes, and end.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", metavar="RE", help="Write a text that this expression matches, and end.")] = None,
    grammar: Annotated[
        Path | None, typer.Option("--grammar", metavar="FILE", help="Write a text of this grammar (Lark, or EBNF with ::=), and end.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after the model's end-of-text tokens.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue a text, or answer a message; tokens are printed as they are generated."""
    _check(chat, system, temperature, top_p, stop or [])
    constraint = _constraint(json_schema, regex, grammar, ignore_eos)
    # Arguments are checked before anything large is imported.
    from patchkit.models import find
    from patchkit.spec import check_spelling

    find(model)
    if patches.strip():
        check_spelling(patches)
    text = stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty: give some text with --prompt, or pipe it in with --prompt -")
    chosen = parse(_SYSTEM.sub("sinks=1", patches) if system is not None else patches)
    import torch

    from patchkit.patch import Stage
    from patchkit.speculation.stop_texts import Printer, StopsAt, before_stop

    loaded, tokenizer = load(model, dtype, device)
    as_chat = _is_chat(chat, system, model, tokenizer)
    if system is not None and _SYSTEM.search(patches):
        chosen = parse(_SYSTEM.sub(f"sinks={system_tokens(tokenizer, system)}", patches))
    patch(loaded, chosen)
    inputs = _chat_inputs(tokenizer, text, system) if as_chat else tokenizer(text, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    ends = _as_list(loaded.generation_config.eos_token_id)
    processors = [] if constraint is None else [_grammar(*constraint, tokenizer, ends)]
    if ignore_eos:
        ends = []
        loaded.generation_config.eos_token_id = None
    options: dict[str, Any] = {"do_sample": temperature > 0, "pad_token_id": _padding(loaded, tokenizer)}
    options |= {"temperature": temperature} if temperature > 0 else {}
    options |= {"top_p": top_p} if top_p is not None else {}
    options |= {"stopping_criteria": [StopsAt(tokenizer, stop, prompt_tokens)]} if stop else {}
    options |= {"logits_processor": processors} if processors else {}
    remarks = stderr()
    if not as_json:
        options["streamer"] = Printer(tokenizer, stop or [])
        if any(each.stage == Stage.COMPILE for each in chosen):
            remarks.print("compiling the first steps; where no earlier run has left the code, this takes minutes", highlight=False)
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
    written, stopped = before_stop(str(tokenizer.decode(new, skip_special_tokens=True)), stop or [])
    finish = "eos" if int(new[-1]) in ends else "stop" if stopped else "length"
    if as_json:
        emit({
            "model": model,
            "patches": report(loaded, chosen).to_dict()["patches"],
            "dtype": str(loaded.dtype),
            "chat": as_chat,
            "system": system,
            "prompt": text,
            "constraint": None if constraint is None else constraint[0],
            "text": written,
            "finish": finish,
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(new),
            "seconds": seconds,
            "tokens_per_s": len(new) / seconds,
        })  # fmt: skip
        return
    remarks.print(
        f"{len(new)} tokens in {seconds:.2f} s after a prompt of {prompt_tokens}: {len(new) / seconds:.1f} tokens/s", highlight=False
    )
    remarks.print(str(report(loaded, chosen)) or "unpatched", highlight=False, soft_wrap=True, markup=False)


def _check(chat: bool | None, system: str | None, temperature: float, top_p: float | None, stop: list[str]) -> None:
    """Refuse options that do not go together, or that would do nothing."""
    if system is not None and chat is False:
        raise UsageError("--system is a message of a chat, and --raw is none: leave one of them out")
    if top_p is not None and temperature == 0:
        raise UsageError("--top-p acts where tokens are sampled, and --temperature 0 takes the likeliest: give a --temperature such as 0.7")
    if top_p == 0:
        raise UsageError("--top-p 0 leaves no token to choose from: give a share above 0, such as 0.9")
    if not all(stop):
        raise UsageError("--stop is empty, which is found in every text: give the text to end before")


def _constraint(json_schema: Path | None, regex: str | None, grammar: Path | None, ignore_eos: bool) -> tuple[str, str] | None:
    """The kind of grammar that the options ask for, a method of `Grammar`, and its text; None if they ask for none."""
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        return None
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} are two grammars for one text: leave one of them out")
    if ignore_eos:
        raise UsageError(f"--ignore-eos goes on after the end of a text, and {names[0]} allows nothing there: leave one of them out")
    if regex is not None:
        return "regex", regex
    path = json_schema or grammar
    assert path is not None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}): give a text file for {names[0]}") from error
    if json_schema is not None:
        return "json_schema", text
    return ("ebnf" if "::=" in text else "lark"), text


def _grammar(kind: str, text: str, tokenizer: Any, ends: list[int]) -> Any:
    """A logits processor; texts end with the model's end tokens, or the tokenizer's if the model names none."""
    from patchkit.grammar.processor import Grammar

    return getattr(Grammar, kind)(text, tokenizer, ends=ends or None)


def _is_chat(chat: bool | None, system: str | None, model: str, tokenizer: Any) -> bool:
    has_template = bool(tokenizer.chat_template)
    if not has_template and (chat or system is not None):
        option = "--chat" if chat else "--system"
        raise UsageError(f"the tokenizer of {model} has no chat template, so the model takes no messages: leave {option} out")
    return has_template if chat is None else chat


def _chat_inputs(tokenizer: Any, text: str, system: str | None) -> Any:
    from jinja2 import TemplateError

    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    try:
        # The template writes all special tokens that belong there, so none are added to it.
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    except TemplateError as error:
        hint = "--raw" if system is None else "leave --system out, or give --raw"
        raise UsageError(f"the model's chat template refuses these messages ({error}): {hint}") from error


def _padding(model: Any, tokenizer: Any) -> int:
    """A padding token, which generate requires although a single row never contains it."""
    settings = model.generation_config
    known = [*_as_list(settings.pad_token_id), *_as_list(tokenizer.pad_token_id), *_as_list(settings.eos_token_id)]
    return int((known or [0])[0])


def _as_list(tokens: Any) -> list[int]:
    return [] if tokens is None else list(tokens) if isinstance(tokens, list | tuple) else [tokens]
