"""The main claim on the bundled trained model, at a length that a test can afford; `make bench` has it at 16k tokens."""

from __future__ import annotations

import math

from patchkit import StreamingLLM, patched
from patchkit.measure.perplexity import block_nll, stream_nll
from patchkit.measure.texts import heldout_ids
from patchkit.models import load_model


def test_streaming_keeps_the_perplexity_that_an_unpatched_model_loses() -> None:
    model, tokenizer = load_model("bundled")
    ids, _ = heldout_ids(tokenizer, 4096)
    reference = block_nll(model, ids)
    unpatched = stream_nll(model, ids)
    with patched(model, StreamingLLM(sinks=4, window=508), verbose=False):
        streaming = stream_nll(model, ids)
    late = slice(1024, 4096)
    assert math.exp((streaming - reference)[late].mean().item()) <= 1.05
    assert math.exp((unpatched - reference)[late].mean().item()) >= 2.0
