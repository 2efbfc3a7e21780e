"""Search for the fastest spec of a model on this machine under a bound on perplexity, by `patchkit.search.halving`.

* Speed is the median over rounds of unpatched time / patched time in the same round.
* Quality is the perplexity of documents streamed through one cache, relative to the unpatched model within the positions that it was
  made for.
* Both have confidence intervals. A spec is within the bound only if the upper end of its interval is. No patch is a candidate too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.anatomy.target import Target
from patchkit.measure.environment import environment
from patchkit.measure.perplexity import TextError
from patchkit.measure.texts import encode, read_text, spread
from patchkit.patch import Patch
from patchkit.search.candidate import LEAST_DOCUMENTS
from patchkit.search.halving import Search
from patchkit.search.measurer import ModelMeasurer, Objective
from patchkit.search.singles import single_patches
from patchkit.search.sweep import documents as library_documents
from patchkit.search.tuning import Tuning

_MOST_DOCUMENTS, _MOST_TOKENS = 16, 32768
_MOST_CONTEXT, _NEW_TOKENS = 1024, 64


def documents(tokenizer: PreTrainedTokenizerBase, source: str, context: int) -> list[torch.Tensor]:
    """Token ids [T] of documents of ``context`` + 64 predictions each: pieces of a text file, or held-out library files for "stdlib".

    Raises:
        TextError: the file cannot be read, or there is too little text for four documents.
    """
    length = context + _NEW_TOKENS
    most = max(LEAST_DOCUMENTS, min(_MOST_DOCUMENTS, _MOST_TOKENS // length))
    if source == "stdlib":
        try:
            found = [torch.tensor(document.ids) for document in library_documents(tokenizer, [], length, most)]
        except TextError as error:
            raise TextError(f"no held-out library file has {length} tokens: give a longer --text, or a smaller --context") from error
    else:
        ids = torch.tensor(encode(tokenizer, read_text(source)))
        starts = range(0, len(ids) - length, length)
        # Evenly spread over the text, if it has more.
        found = [ids[start : start + length + 1] for start in starts]
        found = spread(found, most)
    if len(found) < LEAST_DOCUMENTS:
        raise TextError(
            f"{source} has {len(found)} documents of {length + 1} tokens, and an interval needs {LEAST_DOCUMENTS}: "
            "give a longer text, or a smaller --context"
        )
    return found


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str = "stdlib",
    max_ppl_increase: float = 0.01,
    minutes: float = 10.0,
    context: int | None = None,
    objective: Objective = "generate",
    also: Sequence[Patch] = (),
    without: Sequence[str] = (),
    name: str = "",
    advance: Callable[[str], object] = lambda spec: None,
) -> Tuning:
    """Search for the fastest spec within a bound on perplexity, for this model on this machine. The model is not touched.

    Args:
        text: a file, or "stdlib" for held-out files of Python's library.
        max_ppl_increase: largest upper end of the perplexity increase's interval: 0.01 is 1 %.
        minutes: duration of the search. A running measurement is cut off in the main thread, but not on Windows.
        context: tokens before the timed ones; None: half the positions that the model was made for, at most 1024.
        objective: "decode" times steps of one token; "generate" times whole calls for 64 tokens, prompt included.
        also, without: patches to try in addition to the declared ones, and names of patches to leave out.
        name: of the model, for the record.
        advance: called with a spec before it is measured.

    Raises:
        PatchError: the model cannot be patched or run at this length, a text is too short, or a patch does not exist.
        KeyboardInterrupt: Ctrl-C before anything was measured; later, it ends the search with the candidates known so far.
    """
    seconds = 60 * minutes
    started = time.monotonic()
    if not 0 < seconds < math.inf:
        raise ValueError(f"minutes={minutes}: give a number above 0")
    if not 0 <= max_ppl_increase < math.inf:
        raise ValueError(f"max_ppl_increase={max_ppl_increase}: give a number such as 0.01, at least 0")
    limit = Target(model).position_limit or math.inf
    if context is None:
        context = int(max(1, min(_MOST_CONTEXT, limit // 2)))
    texts = documents(tokenizer, text, context)
    measurer = ModelMeasurer(model, texts, context, objective, seconds - (time.monotonic() - started))
    singles, untried = single_patches(measurer.target, objective, also, without, context + _NEW_TOKENS)
    search = Search(measurer, max_ppl_increase, seconds - (time.monotonic() - started), advance=advance)
    best = search.run(singles)
    settings = {
        "model": name or type(model).__name__,
        "objective": objective,
        "context": context,
        "text": text,
        "max_ppl_increase": max_ppl_increase,
        "minutes": minutes,
        "reference": measurer.reference,
        "environment": environment(),
    }
    ranked = sorted(search.candidates, key=lambda candidate: candidate.speed, reverse=True)
    return Tuning(best, ranked, untried, settings, time.monotonic() - started, search.stopped)
