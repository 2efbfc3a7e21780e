"""Generate the same text in fewer forwards: python examples/speculate.py [MODEL]"""

import sys
import time

import torch

from patchkit import Speculative, patched
from patchkit.models import load_model
from patchkit.speculation import statistics_of

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "bundled")
prompt = tokenizer("import os\n\n\nclass Path:\n    def __init__(self, path):\n        self.path = path\n\n    def", return_tensors="pt")


def timed() -> tuple[torch.Tensor, float]:
    started = time.perf_counter()
    text = model.generate(**prompt, max_new_tokens=120, do_sample=False)
    return text, time.perf_counter() - started


plain, plain_seconds = timed()
for draft in ("prompt_lookup", "stdlib-1m-draft"):
    with patched(model, Speculative(draft=draft), verbose=False):
        timed()  # the cost model measures costs
        text, seconds = timed()
        print(f"{draft}: {plain_seconds:.2f} s -> {seconds:.2f} s; {statistics_of(model)}")
    assert torch.equal(text, plain)
print("the same text every time:\n" + tokenizer.decode(plain[0], skip_special_tokens=True))
