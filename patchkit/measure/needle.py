"""Needle in a haystack: a five-digit key is stated once in a long English text, and asked for many tokens later.

Mohtashami & Jaggi 2023, "Landmark Attention", https://arxiv.org/abs/2305.16300 (the passkey task). Differs from the paper in that

* the haystack is fluent English (`english_text`) instead of one repeated sentence, and the key is stated once;
* the question goes through the model's chat template, if it has one;
* distances are exact numbers of the model's tokens;
* the log-probability of the key is recorded in addition to the greedy answer, which is only right or wrong.

The distance of a key is the number of tokens from the first token of the sentence that states it to the beginning of the answer. A
window of W tokens still sees keys at a distance of at most W minus the answer's length.

One trial reads one text for all its distances and lengths: the text without a key is read once; at the place of a key the cache is
copied, and the copy reads the sentence with the key.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from patchkit import _compat
from patchkit.api import patch_model
from patchkit.errors import UnsupportedModel
from patchkit.measure.latency import filled_cache
from patchkit.measure.needle_grid import UNPATCHED, Answer, NeedleGrid
from patchkit.measure.needle_prompt import ANY_KEY
from patchkit.measure.needle_text import Haystack, NeedleCase
from patchkit.patch import Patch
from patchkit.views import twin

_ANSWER_TOKENS = 24

_CHUNK = 512

Advance = Callable[[str, int], object]


def answers(view: PreTrainedModel, haystack: Haystack, cases: Sequence[NeedleCase], progress: Callable[[int], object]) -> list[Answer]:
    """Answers of a model, patched or not, in the order of ``cases``.

    Raises:
        UnsupportedModel: the model returns no cache, or its position table ends before a prompt does.
    """
    found: dict[NeedleCase, Answer] = {}
    for trial in sorted({case.trial for case in cases}):
        cache, read = None, 0
        # Sorted by place, so that the text before one key is a prefix of the text before the next.
        for case in sorted((case for case in cases if case.trial == trial), key=haystack.place):
            before, after = haystack.before(case), haystack.after(case)
            cache = _read(view, before[read:], cache, progress)
            read = len(before)
            branch = _read(view, after[:-1], copy.deepcopy(cache), progress)
            found[case] = _answer(view, haystack, case, branch)
            progress(1)
    return [found[case] for case in cases]


def _answer(view: PreTrainedModel, haystack: Haystack, case: NeedleCase, cache: Any) -> Answer:
    """``cache`` holds all of the prompt but its last token, and is used up."""
    asking, key = haystack.asking, haystack.key(case)
    prompt = haystack.before(case) + haystack.after(case)
    ids = torch.tensor([prompt], device=view.device)
    pad = asking.tokenizer.pad_token_id if asking.tokenizer.pad_token_id is not None else asking.tokenizer.eos_token_id
    output: Any = view.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        **{_compat.CACHE: copy.deepcopy(cache)},
    )
    text = str(asking.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()
    digits = asking.key(key)
    forced = torch.tensor([[prompt[-1], *asking.answer, *digits]], device=view.device)
    with torch.no_grad():
        logits = view(input_ids=forced[:, :-1], use_cache=True, **{_compat.CACHE: cache}).logits[0, -len(digits) :].float()
    of_key = logits.log_softmax(-1).gather(1, forced[0, -len(digits) :, None])
    return Answer(case, key, len(prompt), text, key in text, of_key.mean().item())


def _read(view: PreTrainedModel, ids: list[int], cache: Any, progress: Callable[[int], object]) -> Any:
    """The cache after these tokens too."""
    # Only the cache is wanted: where a model allows it, the head runs on one position.
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(view.forward).parameters else {}
    with torch.no_grad():
        for start in range(0, len(ids), _CHUNK):
            block = torch.tensor([ids[start : start + _CHUNK]], device=view.device)
            try:
                cache = _compat.cache_of(view(input_ids=block, use_cache=True, **{_compat.CACHE: cache}, **options))
            except IndexError as error:
                raise UnsupportedModel(
                    f"{type(view).__name__} cannot take a prompt of that length ({error}): its position table is shorter, or the "
                    "tokenizer is not its own. Ask for shorter --lengths"
                ) from error
            if cache is None:
                raise UnsupportedModel(f"{type(view).__name__} returns no cache, so texts cannot be read in parts")
            progress(block.shape[1])
    return cache


def run_needle(
    model: PreTrainedModel,
    haystack: Haystack,
    cases: Sequence[NeedleCase],
    patches: Sequence[Patch] = (),
    name: str = "",
    advance: Advance = lambda what, count: None,
) -> NeedleGrid:
    """Ask the unpatched model and, if any are given, the patched one; ``model`` itself stays unpatched, and weights are shared.

    Args:
        cases: from `possible`.
        name: of the model, for the record.
        advance: called with a description of the work and a number of finished tokens.

    Raises:
        PatchError: patches that the model cannot use, before any work is done.
    """
    views = {UNPATCHED: twin(model).eval()}
    if patches:
        views[" + ".join(patch.spec for patch in patches)] = patch_model(twin(model).eval(), *patches, verbose=False)
    asking = haystack.asking
    settings = {
        "model": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "patches": [patch.spec for patch in patches],
        "asked": asking.words,
        "prompt": asking.tokenizer.decode([*asking.head, *asking.needle(ANY_KEY), *asking.tail]),
        "lengths": sorted({case.length for case in cases}),
        "distances": sorted({case.distance for case in cases}),
        "trials": len({case.trial for case in cases}),
        "seed": haystack.seed,
    }
    found = {way: answers(view, haystack, cases, lambda count, way=way: advance(way, count)) for way, view in views.items()}  # type: ignore[misc]
    return NeedleGrid(settings, haystack, window_of(patches), found)


def window_of(patches: Sequence[Patch]) -> int | None:
    """The tokens of the narrowest window among these patches; None if there is none."""
    windows = [window for patch in patches if isinstance(window := getattr(patch, "window", None), int)]
    return min(windows) if windows else None


def estimated_seconds(model: PreTrainedModel, haystack: Haystack, cases: Sequence[NeedleCase], models: int) -> float:
    """How long `run_needle` will take, about: from one forward of the unpatched model at half of the longest length."""
    cache = filled_cache(model, max(case.length for case in cases) // 2)
    started = time.perf_counter()
    _read(model, haystack.ids[:_CHUNK], cache, lambda count: None)
    return models * haystack.work(cases) * (time.perf_counter() - started) / _CHUNK
