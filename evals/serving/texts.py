"""Prompts, and models that are saved where every server finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from patchkit.models import bundled_path

# Beginnings of Python files, for stdlib-7m.
CODE = (
    "def read(path):\n    with open(path) as file:\n",
    "import os\nimport sys\n\ndef main(",
    "class Node:\n    def __init__(self, value):\n",
    "for line in lines:\n    if line.startswith(",
    "    def close(self):\n        if self.",
    "try:\n    import json\nexcept ImportError:\n",
    "def test_simple(self):\n    self.assertEqual(",
    "while True:\n    data = sock.recv(",
)
# Beginnings of English texts, for smollm2.
ENGLISH = (
    "Once upon a time, in a small village by the sea, there lived",
    "The main advantages of riding a bicycle to work are that",
    "To bake a simple loaf of bread, begin by mixing",
    "The history of the printing press begins in the",
    "When the rain had stopped, the two friends walked along",
    "A good scientific experiment has to be repeatable, because",
    "The city was quiet that morning, and the old man",
    "Plants need light to grow. In photosynthesis, they",
)
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% for tool in tools or [] %}[tool] {{ tool['function']['name'] }}\n{% endfor %}[assistant] "
)
PROMPTS = {"stdlib-7m": CODE, "smollm2": ENGLISH}


def bodies(model: str, clients: int, tokens: int, **more: Any) -> list[dict[str, Any]]:
    """Return one greedy, streamed completion for each client."""
    prompts = PROMPTS[model]
    fixed = {"temperature": 0, "max_tokens": tokens, "stream": True, **more}
    return [{"prompt": prompts[number % len(prompts)], **fixed} for number in range(clients)]


def with_template(model: str, folder: Path) -> Path:
    """Return a folder with a model that takes chats, tools too."""
    target = folder / f"{model}-chat"
    if not target.is_dir():
        shutil.copytree(bundled_path(model), target)
        (target / "chat_template.jinja").write_text(TEMPLATE)
    return target


def with_positions(model: str, positions: int, folder: Path) -> Path:
    """Return a folder with a model that takes texts of so many tokens, whatever it was trained for: it is there to be timed."""
    source = bundled_path(model)
    config = json.loads((source / "config.json").read_text())
    if config["max_position_embeddings"] >= positions:
        return source
    target = folder / f"{model}-{positions}"
    if not target.is_dir():
        shutil.copytree(source, target)
        (target / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    return target
