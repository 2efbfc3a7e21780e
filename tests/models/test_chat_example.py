"""examples/streaming_chat.py with a model that has a chat template: what it feeds is the conversation as the template writes it."""

from __future__ import annotations

import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from smollm2 import load_smollm2, needs_smollm2

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "streaming_chat.py"


@needs_smollm2
def test_the_cache_holds_the_conversation_as_the_template_writes_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = ["What is the capital of France?", "And of Italy?"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "smollm2", "252"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "", ""])))
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    replies, counts = zip(*re.findall(r"(.+)\n\[(\d+) tokens so far", capsys.readouterr().out), strict=True)
    assert replies == ("The capital of France is Paris.", "The capital of Italy is Rome.")
    _, tokenizer = load_smollm2()
    messages = []
    for question, reply, count in zip(questions, replies, map(int, counts), strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        # The line break behind the last reply comes with the next question.
        assert whole.endswith("<|im_end|>\n") and count == len(tokenizer(whole)["input_ids"]) - 1
        assert whole.count("<|im_start|>system") == 1
