"""examples/streaming_chat.py with a model that has a chat template: what it feeds is the conversation as the template writes it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from smollm2 import load_smollm2, needs_smollm2

ROOT = Path(__file__).resolve().parents[2]


@needs_smollm2
def test_the_cache_holds_the_conversation_as_the_template_writes_it(tmp_path: Path) -> None:
    questions = ["What is the capital of France?", "And of Italy?"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "streaming_chat.py"), "smollm2", "252"],
        input="\n".join([*questions, "", ""]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    replies, counts = zip(*re.findall(r"(.+)\n\[(\d+) tokens so far", done.stdout), strict=True)
    assert replies == ("The capital of France is Paris.", "The capital of Italy is Rome.")
    _, tokenizer = load_smollm2()
    messages = []
    for question, reply, count in zip(questions, replies, map(int, counts), strict=True):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        # The line break behind the last reply comes with the next question.
        assert whole.endswith("<|im_end|>\n") and count == len(tokenizer(whole)["input_ids"]) - 1
        assert whole.count("<|im_start|>system") == 1
