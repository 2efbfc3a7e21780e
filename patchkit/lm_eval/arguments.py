"""Arguments of a model as lm-eval writes them on its command line."""

from __future__ import annotations


def split_outside_brackets(text: str) -> list[str]:
    """Split a text at commas that are in no brackets and no quotes, so that a spec string stays whole."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts
