"""Long texts with a key in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from patchkit.anatomy.target import Target
from patchkit.measure.english_text import TextSource, english_ids
from patchkit.measure.needle_prompt import Asking, NeedleError
from patchkit.measure.texts import encode

# Prompts of all the positions that a model was made for, a half, a quarter and an eighth; longer limits are not reached.
_SHARES, _SHORTEST, _LONGEST = (8, 4, 2, 1), 256, 8192

# Distance between the beginnings of two trials in the text, in tokens.
_TRIAL_STRIDE = 512


# How the pieces of byte-level and of SentencePiece vocabularies write a leading blank or line break.
_BLANKS = (" ", "\n", "Ġ", "Ċ", "▁", "<0x0A>")


@dataclass(frozen=True)
class NeedleCase:
    """One key to be found: at most ``length`` tokens of prompt, the key ``distance`` tokens before the answer."""

    length: int
    distance: int
    trial: int


def lengths_for(model: PreTrainedModel) -> list[int]:
    """Lengths of prompts that suit a model's position limit, ascending."""
    longest = min(Target(model).position_limit or _LONGEST, _LONGEST)
    return [longest // share for share in _SHARES if share == 1 or longest // share >= _SHORTEST]


def possible(lengths: Sequence[int], distances: Sequence[int], trials: int, asking: Asking) -> list[NeedleCase]:
    """The cases of a grid whose key fits into the prompt.

    Raises:
        NeedleError: a distance is shorter than needle and question, or no distance fits any length.
    """
    if min(distances) < asking.least:
        raise NeedleError(f"a key {min(distances)} tokens before its answer leaves no room for the question: give at least {asking.least}")
    room = len(asking.head)
    cases = [NeedleCase(length, distance, trial) for trial in range(trials) for length in lengths for distance in distances]
    cases = [case for case in cases if room + case.distance <= case.length]
    if not cases:
        raise NeedleError(f"no prompt of {max(lengths)} tokens has room for a key {min(distances)} tokens before its answer")
    return cases


@dataclass(frozen=True)
class Haystack:
    """English text around the keys, and the ends of its sentences.

    Attributes:
        ids: token ids of the text.
        breaks: indices into ``ids`` before which a sentence ends, ascending; 0 is the first.
        sources: files of the text.
        seed: seed of the keys.
    """

    asking: Asking
    ids: list[int]
    breaks: list[int]
    sources: list[TextSource]
    seed: int

    @classmethod
    def of(cls, asking: Asking, cases: Sequence[NeedleCase], seed: int = 0) -> Haystack:
        """Read enough text for these cases.

        Raises:
            TextError: there is no text of that length on this machine.
        """
        longest = max(case.length for case in cases) + (1 + max(case.trial for case in cases)) * _TRIAL_STRIDE
        text, sources = english_ids(asking.tokenizer, longest)
        ids = text.tolist()[len(encode(asking.tokenizer, "")) :]
        pieces = asking.tokenizer.convert_ids_to_tokens(ids)
        breaks = [i for i in range(1, len(ids)) if pieces[i - 1].endswith(".") and pieces[i].startswith(_BLANKS)]
        return cls(asking, ids, [0, *breaks], sources, seed)

    def start(self, trial: int) -> int:
        """Index at which the text of a trial begins."""
        return next(place for place in self.breaks if place >= trial * _TRIAL_STRIDE)

    def place(self, case: NeedleCase) -> int:
        """Index of the key of a case: between two sentences, as late as the prompt's length allows."""
        start = self.start(case.trial)
        latest = start + case.length - len(self.asking.head) - case.distance
        return max(place for place in self.breaks if place <= latest)

    def key(self, case: NeedleCase) -> str:
        """Five digits, determined by seed and case alone."""
        return str(random.Random(f"{self.seed} {case.length} {case.distance} {case.trial}").randrange(10_000, 100_000))

    def before(self, case: NeedleCase) -> list[int]:
        """The prompt up to the sentence with the key."""
        return self.asking.head + self.ids[self.start(case.trial) : self.place(case)]

    def after(self, case: NeedleCase) -> list[int]:
        """The rest of the prompt: ``distance`` tokens.

        Raises:
            NeedleError: they are too few for needle and question.
        """
        needle, place = self.asking.needle(self.key(case)), self.place(case)
        between = case.distance - len(needle) - len(self.asking.tail)
        if between < 0:  # keys differ in their numbers of tokens
            raise NeedleError(f"a key {case.distance} tokens before its answer leaves no room for the question: give {-between} more")
        return needle + self.ids[place : place + between] + self.asking.tail

    def work(self, cases: Sequence[NeedleCase]) -> int:
        """Number of tokens that `answers` reports for these cases."""
        longest = {case.trial: 0 for case in cases}
        for case in cases:
            longest[case.trial] = max(longest[case.trial], len(self.before(case)))
        return sum(longest.values()) + sum(case.distance for case in cases)
