"""Speculation over compiled steps: the same text, and the verification of drafts is a step too."""

from __future__ import annotations

import itertools

import pytest
from speculation import Bush, plain_text, text_of, told
from support import fast_first
from torch import equal

from patchkit import Compile, patched, report
from patchkit.patches.speculative import Speculative
from patchkit.speculation import statistics_of
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.ragged_cache import VERIFIED_LENGTHS
from patchkit.testing import tiny_model

NEW = 60
COMPILE = Compile(backend="eager")  # traced by dynamo like any other, and quick


FAMILIES = ("llama", "gemma3_text")


@pytest.mark.parametrize("family", FAMILIES)
def test_verification_is_compiled(family: str) -> None:
    model, wanted = tiny_model(family), plain_text(family, 1, new=NEW)
    with patched(model, Speculative(draft=told(wanted), k=4), COMPILE, verbose=False):
        assert equal(text_of(model, 1, NEW), wanted)
        run, hits = statistics_of(model), report(model).patches[1].hits
    assert run.acceptance_rate == 1
    assert hits["compiled steps"] == len(run.steps) and hits["eager forwards"] == 1  # the prompt
    assert hits["graphs compiled"] <= len(VERIFIED_LENGTHS)


@pytest.mark.parametrize(
    ("family", "nodes", "batch"),
    fast_first(itertools.product(FAMILIES, (2, 8), (1, 4)), [("llama", 2, 1), ("llama", 8, 4), ("gemma3_text", 2, 4)]),
)
def test_trees_of_a_length_that_chains_have_are_not_taken_for_chains(family: str, nodes: int, batch: int) -> None:
    assert nodes + 1 in VERIFIED_LENGTHS
    model, wanted = tiny_model(family), plain_text(family, batch, new=NEW)
    with patched(model, Speculative(draft=Bush(wanted), k=nodes), COMPILE, verbose=False):
        assert equal(text_of(model, batch, NEW), wanted)


@pytest.mark.parametrize("family", fast_first(FAMILIES, ["gemma3_text"]))
def test_rows_that_part_run_eagerly_and_say_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, wanted = tiny_model(family), plain_text(family, 4, new=NEW)
    with patched(model, Speculative(draft=PromptLookup(min_ngram=1), k=3), COMPILE, verbose=False):
        assert equal(text_of(model, 4, NEW), wanted)
    assert sum("rows of the batch advance by different numbers" in record.message for record in caplog.records) == 1


def test_a_stream_is_not_padded_for_graphs_that_it_has_not() -> None:
    model, wanted = tiny_model("llama"), plain_text("llama", 1, streaming=True, new=NEW)
    with patched(model, "streaming(sinks=2, window=10)", Speculative(draft=told(wanted), k=3), COMPILE, verbose=False):
        assert equal(text_of(model, 1, NEW), wanted)
        fed, run = report(model).patches[0].hits["tokens"], statistics_of(model)
    assert fed == 12 + sum(1 + proposed for step in run.steps for proposed in step.proposed)
