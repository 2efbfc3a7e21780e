"""Patch a model in one line, use it, look at what was done, and undo it. Runs offline on the bundled model.

python examples/quickstart.py [MODEL]     # MODEL: bundled, a directory or a hub id
"""

import sys

import torch

from patchkit import StreamingLLM, patch_model, report, unpatch_model
from patchkit.models import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "bundled")
inputs = tokenizer("import os\nimport sys\n\n\ndef main(", return_tensors="pt")
with torch.no_grad():
    before = model(**inputs).logits

# Keep the first 4 tokens and the last 60; everything between is forgotten, so a text may be endless.
patch_model(model, StreamingLLM(sinks=4, window=60))

output = model.generate(**inputs, max_new_tokens=200, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0], skip_special_tokens=True))
print(report(model))

unpatch_model(model)
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, before)
print("unpatched: the logits are what they were, bit by bit")
