"""docs/tutorial.md runs: every block of Python, in order, and prints what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from smollm2 import needs_smollm2

from patchkit.models import load_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
# A block of Python, and the output below it.
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
# Two graphs, which dynamo runs without generating code: to compile all takes minutes.
COMPILED = {'"speculative + compile"': "\"speculative(k=1) + compile(backend='eager')\""}
# The bundled model has no chat template and answers no questions: short texts and a few tokens are enough.
BUNDLED = COMPILED | {
    'load_model("smollm2")': 'load_chat_model("bundled")',
    "2048": "512",
    "ids.split(512": "ids.split(128",
    "sinks=4, window=508": "sinks=4, window=124",
    "max_new_tokens=40": "max_new_tokens=3",
    "max_new_tokens=48": "max_new_tokens=8",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_chat_model(name: str) -> tuple[Any, Any]:
    """The model and its tokenizer, with the chat template that smollm2 has."""
    model, tokenizer = load_model(name)
    tokenizer.chat_template = CHAT_TEMPLATE
    return model, tokenizer


def blocks() -> list[tuple[str, str]]:
    """Every block of Python on the page, in order, with the output that the page shows for it."""
    return _BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def run(replaced: Mapping[str, str]) -> list[str]:
    """Run all blocks in one namespace, with parts of the code replaced; return the output of each."""
    outputs, unused = [], set(replaced)
    namespace: dict[str, Any] = {"load_chat_model": load_chat_model}
    for number, (code, _) in enumerate(blocks(), 1):
        unused -= {old for old in replaced if old in code}
        for old, new in replaced.items():
            code = code.replace(old, new)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, f"block {number} of {PAGE.name}", "exec"), namespace)
        outputs.append(output.getvalue())
    assert not unused, f"no block has {unused}"
    return outputs


def test_every_block_shows_its_output() -> None:
    assert len(blocks()) == PAGE.read_text(encoding="utf-8").count("```python\n") > 10
    assert [code for code, shown in blocks() if not shown.strip()] == []


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_the_blocks_run_on_the_bundled_model() -> None:
    found = run(BUNDLED)
    for (code, _), output in zip(blocks(), found, strict=True):
        literals = re.findall(r'print\("([^"]*)"\)', code)
        assert output.strip() and all(f"{literal}\n" in output for literal in literals), (code, output)
    grows, bounded = ([float(size) for size in re.findall(r"([\d.]+) MiB of cache", output)] for output in found[1:3])
    assert len(grows) == 4 and grows == sorted(set(grows))
    assert len(bounded) == 4 and len(set(bounded[1:])) == 1 and bounded[-1] < grows[1]


@needs_smollm2
@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_the_blocks_print_on_smollm2_what_the_page_shows() -> None:
    found = run(COMPILED)
    # Which answers int8 changes depends on the kernels of the machine.
    assert re.fullmatch(r"the same tokens: \[(True|False), (True|False)\]\n", found[-1])
    assert found[:-1] == [shown for _, shown in blocks()][:-1]
