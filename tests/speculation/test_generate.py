"""What generate promises besides the text: streamers, stopping, lengths, processors, outputs, and what goes to the stock method."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from speculation import FEW, NEW, plain_text, text_of, told
from support import cache_of, cached, fast_first, matrix
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, pipeline

from patchkit import patch_model, patched, report, unpatch_model
from patchkit.errors import PatchConflict, SpecError, StreamError, UnsupportedModel
from patchkit.models import load_model
from patchkit.patches.speculative import Speculative
from patchkit.speculation import reset_statistics, statistics_of
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.drafters.self_draft import SelfDraft
from patchkit.testing import assert_restored, snapshot, tiny_model

PROMPT = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(5))
OPTIONS: dict[str, Any] = dict(max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)


def right(model: Any, **options: Any) -> Speculative:
    """Drafts that are right, k of them."""
    plain = model.generate(PROMPT, **OPTIONS | dict(max_new_tokens=60))
    return Speculative(draft=told(plain), **{"k": 4, **options})


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


GIVEN: list[dict[str, Any]] = [
    dict(repetition_penalty=1.5),
    dict(no_repeat_ngram_size=2),
    dict(min_new_tokens=20, eos_token_id=list(range(3, 60))),
    dict(max_new_tokens=1),
    dict(max_new_tokens=2),
    dict(max_new_tokens=7),
    dict(max_length=20, max_new_tokens=None),
    dict(suppress_tokens=[5, 6, 7]),
    dict(prefill_chunk_size=5),
    dict(exponential_decay_length_penalty=(5, 1.5), eos_token_id=9),
]


# Every option once, alone or as four rows by turns.
@pytest.mark.parametrize(
    ("options", "batch"),
    fast_first([(options, batch) for options in GIVEN for batch in (1, 4)], lambda case: case[1] == (4, 1)[GIVEN.index(case[0]) % 2]),
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_options_of_generate(options: dict[str, Any], batch: int) -> None:
    model = tiny_model("llama")
    options = {"new": 40, **options}
    new = options.pop("new")
    wanted = text_of(model, batch, new, **options)
    with patched(model, Speculative(draft=DraftModel(tiny_model("llama")), k=5), verbose=False):
        assert torch.equal(text_of(model, batch, new, **options), wanted)
        assert "stock calls" not in report(model).patches[0].hits


@pytest.mark.parametrize("batch", (1, 4))
def test_scores_and_logits_are_those_of_plain_decoding(batch: int) -> None:
    model = tiny_model("llama")
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, repetition_penalty=1.3)
    wanted = text_of(model, batch, 30, **options)
    with patched(model, Speculative(draft=DraftModel(tiny_model("llama", seed=3)), k=3), verbose=False):
        got = text_of(model, batch, 30, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(got[name]), torch.stack(wanted[name])
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_cache_that_is_returned_goes_on() -> None:
    model = tiny_model("llama")
    longer = model.generate(PROMPT, **OPTIONS | dict(max_new_tokens=50))
    with patched(model, right(model), verbose=False):
        first = model.generate(PROMPT, **OPTIONS, return_dict_in_generate=True)
        assert cache_of(first).get_seq_length() == first.sequences.shape[1] - 1
        again = model.generate(first.sequences, **OPTIONS | dict(max_new_tokens=10), **cached(cache_of(first)))
    assert torch.equal(again, longer)


def test_a_streamer_gets_the_text_once_and_in_order() -> None:
    model = tiny_model("llama")
    plain, ours = Recorder(), Recorder()
    model.generate(PROMPT, **OPTIONS, streamer=plain)
    with patched(model, right(model), verbose=False):
        text = model.generate(PROMPT, **OPTIONS, streamer=ours)
    assert ours.tokens == plain.tokens == text[0].tolist() and ours.ended == 1


def test_a_streamer_of_a_call_that_goes_to_the_stock_method_gets_its_prompt_once() -> None:
    model, ours = tiny_model("llama"), Recorder()
    with patched(model, "speculative", verbose=False):
        text = model.generate(PROMPT, **OPTIONS, streamer=ours, return_dict_in_generate=True, output_hidden_states=True)
        assert report(model).patches[0].hits["stock calls"] == 1
    assert ours.tokens == text.sequences[0].tolist() and ours.ended == 1


def test_streamed_text_and_stop_strings_of_the_bundled_model() -> None:
    target, tokenizer = load_model("stdlib-7m")
    prompt = tokenizer("import os\n\n\ndef main(", return_tensors="pt")
    options = dict(max_new_tokens=80, do_sample=False, pad_token_id=0, tokenizer=tokenizer)
    free = target.generate(**prompt, **options)
    written = tokenizer.decode(free[0, prompt.input_ids.shape[1] :])
    # A string that starts and ends within tokens, and spans several of them.
    stop = written[len(written) // 2 : len(written) // 2 + 9]
    wanted = target.generate(**prompt, **options, stop_strings=stop)
    assert wanted.shape[1] < free.shape[1]
    with patched(target, Speculative(draft="stdlib-1m-draft", k=6), verbose=False):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        got = target.generate(**prompt, **options, stop_strings=stop, streamer=streamer)
    assert torch.equal(got, wanted)
    assert "".join(streamer) == tokenizer.decode(got[0, prompt.input_ids.shape[1] :])


class CallCounter(StoppingCriteria):
    """Notes every prefix it is asked about, and stops at the 15th."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.seen.append(input_ids[0].tolist())
        return torch.tensor([len(self.seen) >= 15])


class PrefixCounter:
    """A logits processor with a state: it must be called once for every token."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids[0].tolist())
        return scores + torch.arange(scores.shape[1]) * 0.01 * (len(self.seen) % 3)


def test_processors_and_criteria_see_what_they_see_in_plain_decoding() -> None:
    model = tiny_model("llama")

    def run() -> tuple[torch.Tensor, Any, Any]:
        processor, criterion = PrefixCounter(), CallCounter()
        text = model.generate(
            PROMPT, **OPTIONS, logits_processor=LogitsProcessorList([processor]), stopping_criteria=StoppingCriteriaList([criterion])
        )
        return text, processor.seen, criterion.seen

    plain = run()
    with patched(model, Speculative(draft=told(plain[0]), k=4), verbose=False):
        ours = run()
        assert statistics_of(model).tokens_per_target_step > 2
    assert torch.equal(plain[0], ours[0]) and plain[1:] == ours[1:]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(num_beams=2), "beam search"),
        (dict(use_cache=False), "without a cache"),
        (dict(return_dict_in_generate=True, output_attentions=True), "output_attentions"),
        (dict(cache_implementation="static"), "cache_implementation='static'"),
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens"),
        (dict(prefix_allowed_tokens_fn=lambda row, ids: [3 + row, 9]), "PrefixConstrained"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_what_goes_to_the_stock_method(options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    batch = 1 if "prompt_lookup_num_tokens" in options else 4
    wanted = text_of(model, batch, 10, **options)
    with patched(model, "speculative", verbose=False), caplog.at_level(logging.WARNING, logger="patchkit"):
        for _ in range(2):
            got = text_of(model, batch, 10, **options)
        assert report(model).patches[0].hits["stock calls"] == 2
    assert torch.equal(getattr(got, "sequences", got), getattr(wanted, "sequences", wanted))
    lines = [record.message for record in caplog.records if "without speculation" in record.message]
    assert len(lines) == 1 and said in lines[0]


def test_pipelines_speculate() -> None:
    target, tokenizer = load_model("stdlib-7m")
    texts = ["def f(x):\n    return", "import re\n\nclass A:\n"]
    ask = dict(max_new_tokens=24, do_sample=False, batch_size=2)
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(texts, **ask)
    with patched(target, "speculative", verbose=False):
        assert pipeline("text-generation", model=target, tokenizer=tokenizer)(texts, **ask) == plain
        assert report(target).patches[0].hits["rounds"] > 0


def test_copies_and_pickles_speculate_on_their_own() -> None:
    model = tiny_model("llama")
    patch_model(model, Speculative(draft=PromptLookup(min_ngram=1)), verbose=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        reset_statistics(model)
        assert torch.equal(text_of(copied, 2, FEW), plain_text("llama", 2, new=FEW))
        assert statistics_of(copied).steps and not statistics_of(model).steps
        unpatch_model(copied)
        assert "generate" not in vars(copied)
    unpatch_model(model)


def test_nothing_stays_behind_on_target_and_draft() -> None:
    model, draft = tiny_model("llama"), tiny_model("llama", seed=2)
    before, draft_before = snapshot(model), snapshot(draft)
    with patched(model, Speculative(draft=draft), "streaming(window=16)", verbose=False):
        text_of(model, 4, FEW)
    assert_restored(before, model)
    assert_restored(draft_before, draft)


LOSSY = ("streaming(sinks=2, window=8)", "mlp_int8(mode=weight_only)", "streaming(sinks=1, window=9) + mlp_int8")
SERVED = ("llama", "gpt_neox", "mixtral")


@pytest.mark.parametrize(
    ("family", "spec", "new"),
    [(family, spec, FEW) for family, spec in zip(SERVED, LOSSY, strict=True)]
    + [matrix(family, spec, NEW) for family in SERVED for spec in LOSSY],
)
def test_lossless_makes_a_lossy_patch_exact(family: str, spec: str, new: int) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        view = patch_model(tiny_model(family), spec, verbose=False)
        assert not torch.equal(view(PROMPT.repeat(1, 4)).logits, model(PROMPT.repeat(1, 4)).logits)  # it is lossy
    before = snapshot(model)
    patch_model(model, spec, lossless=True, verbose=False)
    assert torch.equal(text_of(model, 1, new), plain_text(family, 1, new=new))
    assert statistics_of(model).proposed > 0
    unpatch_model(model)
    assert_restored(before, model)


def test_bad_input_is_refused_by_name_before_anything_is_touched() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    small = tiny_model("llama")
    small.resize_token_embeddings(100)
    cases: list[tuple[Any, type[Exception], str]] = [
        (Speculative(draft=small), UnsupportedModel, "vocabulary of 100 tokens"),
        (Speculative(draft=model), UnsupportedModel, "SelfDraft"),
        (Speculative(draft=tiny_model("mamba")), UnsupportedModel, "cannot draft"),
        (Speculative(draft=tiny_model("llama").to("meta")), UnsupportedModel, "meta"),
        (Speculative(draft=SelfDraft(skip_layers=(9,))), Exception, r"skip_layers=\[9\]"),
    ]
    for patch, error, message in cases:
        with pytest.raises(error, match=message):
            patch_model(model, patch)
        assert_restored(before, model)
    with pytest.raises(UnsupportedModel, match="cannot verify drafts exactly"):
        patch_model(tiny_model("jamba"), "speculative")
    for options, message in (
        (dict(k=-1), "-1"),
        (dict(k="sometimes"), "sometimes"),
        (dict(acceptance="conf_threshold"), "tau"),
        (dict(acceptance="topk_agree(0)"), "topk_agree"),
        (dict(acceptance="typical(2)"), "typical"),
        (dict(acceptance="lucky"), "lucky"),
    ):
        with pytest.raises(ValueError, match=message):
            Speculative(**options)
    with pytest.raises(SpecError, match="lucky"):
        patch_model(model, "speculative(acceptance=lucky)")
    with pytest.raises(TypeError, match="draft=3"):
        Speculative(draft=3)
    with pytest.raises(PatchConflict, match="lossless"):
        patch_model(model, "speculative", lossless=True)
    assert_restored(before, model)


def test_a_draft_need_not_be_exact() -> None:
    """A jamba gives other logits for several tokens at once than one by one: no target, but a draft that takes tokens back."""
    model, ids = tiny_model("llama"), torch.arange(12)[None] * 5 % 90 + 5
    plain = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
    with patched(model, Speculative(draft=tiny_model("jamba"), k=3), verbose=False):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=20, do_sample=False), plain)


def test_a_cache_that_cannot_roll_back_is_refused() -> None:
    model = tiny_model("qwen3_next")
    with patched(model, "streaming(window=16) + speculative", verbose=False), pytest.raises(StreamError, match="cannot roll tokens back"):
        model.generate(PROMPT, **OPTIONS)
