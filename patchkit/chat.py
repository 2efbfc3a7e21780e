"""Number of tokens of a system message, so that a window can keep it."""

from __future__ import annotations

from typing import Any

from patchkit.errors import PatchError


def system_tokens(tokenizer: Any, system: str) -> int:
    """Number of tokens with which every chat under this system message begins; as ``sinks`` of `StreamingLLM` they stay visible.

    Args:
        tokenizer: the model's tokenizer, with a chat template.
        system: the system message.

    Raises:
        PatchError: there is no chat template, or it refuses a system message.
    """
    if not tokenizer.chat_template:
        raise PatchError("this tokenizer has no chat template, so it has no system message: give sinks as a number of tokens")
    from jinja2 import TemplateError

    try:
        # Two user messages that differ from their first character on: the common prefix of both chats belongs to the system message.
        first, second = (
            tokenizer.apply_chat_template(
                [{"role": "system", "content": system}, {"role": "user", "content": asked}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            for asked in ("apples", "Why?")
        )
    except TemplateError as error:
        raise PatchError(f"the chat template refuses a system message ({error}): give sinks as a number of tokens") from error
    return next(index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
