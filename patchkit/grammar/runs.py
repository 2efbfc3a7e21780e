"""Which call of `generate` a logits processor is called for: `Runs`.

A processor sees token ids and scores, but not where the prompt ends. transformers makes a `LogitsProcessorList` for every call of
`generate`, and that list calls the processors: so the first tokens that come from a list are its prompt. An assistant that drafts inside
another `generate` has a list of its own, but its tokens begin with the prompt of the outer call, which is still running.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field

import torch

from patchkit import _compat
from patchkit.grammar.matcher import Matcher


@dataclass(eq=False)
class Run:
    """One call of `generate`.

    Attributes:
        prompt: tokens of the prompt, padding included.
        prompts: [B, prompt] int64.
        thread: that it runs in.
        matchers: of each row.
    """

    prompt: int
    prompts: torch.Tensor
    thread: int = field(default_factory=threading.get_ident)
    matchers: list[Matcher] = field(default_factory=list)


class Runs:
    """The calls of `generate` that are running."""

    def __init__(self) -> None:
        self._by_list: dict[int, Run] = {}
        self._by_thread: dict[int, Run] = {}  # of calls without a list

    def of(self, input_ids: torch.Tensor) -> Run:
        """Return the run that tokens [B, T] belong to, which begins here if there is none."""
        owner = _compat.calling_processors()
        if owner is None:
            thread = threading.get_ident()
            known = self._by_thread.get(thread)
            if known is None or not _goes_on(known, input_ids):
                known = self._by_thread[thread] = _begun(input_ids)
            return known
        found = self._by_list.get(id(owner))
        if found is None or not _begins_with(input_ids, found.prompts):
            outer = [run for run in list(self._by_list.values()) if run.thread == threading.get_ident() and run is not found]
            inherited = next((run.prompts for run in reversed(outer) if _begins_with(input_ids, run.prompts)), None)
            if found is None:
                weakref.finalize(owner, self._by_list.pop, id(owner), None).atexit = False
            found = self._by_list[id(owner)] = _begun(input_ids if inherited is None else inherited)
        return found


def _begun(prompts: torch.Tensor) -> Run:
    return Run(prompts.shape[1], prompts.clone())


def _begins_with(input_ids: torch.Tensor, prompts: torch.Tensor) -> bool:
    length = prompts.shape[1]
    return (
        input_ids.shape[1] >= length and len(input_ids) == len(prompts) and torch.equal(input_ids[:, :length].to(prompts.device), prompts)
    )


def _goes_on(run: Run, input_ids: torch.Tensor) -> bool:
    """Whether tokens are those of a run and one more."""
    if not _begins_with(input_ids, run.prompts) or input_ids.shape[1] == run.prompt:
        return False
    known = [matcher.tokens for matcher in run.matchers]
    return all(any(row[: len(tokens)] == tokens[: len(row)] for tokens in known) for row in input_ids[:, run.prompt : -1].tolist())
