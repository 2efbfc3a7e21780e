"""Gate a patch: timed interleaved with the unpatched model, scored on real text, and passed only if the intervals keep every bound.

python examples/gate_a_patch.py [MODEL]; in a test suite the fixture `patch_gate` of patchkit's pytest plug-in does the same.
"""

import sys

from patchkit.gates.gate import run_gate
from patchkit.gates.result import Bounds
from patchkit.models import load_model

model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "bundled")
gate = run_gate(
    model,
    "streaming(window=252)",
    Bounds(min_speedup=0.9, max_ppl_increase=0.03),
    context=512,
    tokenizer=tokenizer,
)
print(gate)
print("tokens per second:", {way: round(rate) for way, rate in gate.to_dict()["tokens_per_s"].items()})
print("\n".join(gate.failures) or "passed")
