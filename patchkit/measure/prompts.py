"""Prompts out of a file."""

from __future__ import annotations

import json
from pathlib import Path

from patchkit.measure.perplexity import TextError, read_text


def read_prompts(path: Path) -> list[str]:
    """The texts of a UTF-8 file: every line that is not blank, or those in the list of a `.json` file.

    Raises:
        TextError: no such file, or no list of texts.
    """
    content = read_text(path)
    if path.suffix != ".json":
        return [line for line in content.splitlines() if line.strip()]
    try:
        texts = json.loads(content)
    except json.JSONDecodeError as error:
        raise TextError(f"{path} is not JSON ({error}): give a list of texts, or a text file with one prompt per line") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise TextError(f'{path} is not a JSON list of texts: write it like ["first prompt", "second prompt"]')
    return texts
