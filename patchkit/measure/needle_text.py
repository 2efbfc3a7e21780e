"""Long texts with a key in them, and the question for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError
from patchkit.measure.english_text import TextSource, english_ids
from patchkit.measure.perplexity import encode

_SAYS = "\n\nThe secret number is {key}. Remember it.\n\n"

_ASKS = "\n\nWhat is the secret number? Answer with the number only."

_ANSWERS = "The secret number is"

ANY_KEY = "12345"

# Prompts of all the positions that a model was made for, a half, a quarter and an eighth; longer limits are not reached.
_SHARES, _SHORTEST, _LONGEST = (8, 4, 2, 1), 256, 8192

# Where trials begin in the text, in tokens one after the other.
_TRIAL_STRIDE = 512

_PLACE = "\u241f"

# How the pieces of byte-level and of SentencePiece vocabularies write a leading blank or line break.
_BLANKS = (" ", "\n", "Ġ", "Ċ", "▁", "<0x0A>")


class NeedleError(PatchError):
    """A needle cannot be placed or asked for; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Asking:
    """How a key is said and asked for, as token ids.

    Attributes:
        chat: through the tokenizer's chat template; else the prompt ends with the words before the key.
        head: before the text.
        tail: after the text, up to where the answer begins.
        answer: what comes before the key in the answer whose probability is taken.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    head: list[int]
    tail: list[int]
    answer: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Asking:
        """
        Raises:
            NeedleError: the chat template does not hand a message on as it is.
        """
        if tokenizer.chat_template is None:
            return cls(tokenizer, False, encode(tokenizer, ""), _ids(tokenizer, f"{_ASKS}\n\n{_ANSWERS}"), [])
        message = [{"role": "user", "content": f"{_PLACE}{_ASKS}"}]
        # Models that think before they answer have templates that know this word; others ignore it.
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        head, found, tail = str(rendered).partition(_PLACE)
        if not found or not tail.startswith(_ASKS):
            raise NeedleError("the chat template changes what a user says, so a needle has no place in it: use a tokenizer without one")
        return cls(tokenizer, True, _ids(tokenizer, head), _ids(tokenizer, tail), _ids(tokenizer, _ANSWERS))

    def needle(self, key: str) -> list[int]:
        return _ids(self.tokenizer, _SAYS.format(key=key))

    def key(self, key: str) -> list[int]:
        return _ids(self.tokenizer, f" {key}")

    @property
    def words(self) -> str:
        """How it is asked, in words."""
        return "through the chat template" if self.chat else "as plain continuation"

    @property
    def least(self) -> int:
        """The shortest distance: needle and question alone."""
        return len(self.needle(ANY_KEY)) + len(self.tail)

    def side(self, distance: int, window: int | None) -> str:
        """Where a key is to a model with a window: its whole sentence "inside" until the answer has said it, all of it "beyond" before
        the answer begins, or at the "edge"; "" without a window."""
        if window is None:
            return ""
        if distance + len(self.answer) + len(self.key(ANY_KEY)) <= window:
            return "inside"
        return "beyond" if distance - len(self.needle(ANY_KEY)) >= window else "edge"


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
    """The English text around the keys, and where in it a sentence ends.

    Attributes:
        ids: of the text.
        breaks: indices into ``ids`` before which a sentence ends, ascending; 0 is the first.
        sources: the files it comes from.
        seed: of the keys.
    """

    asking: Asking
    ids: list[int]
    breaks: list[int]
    sources: list[TextSource]
    seed: int

    @classmethod
    def of(cls, asking: Asking, cases: Sequence[NeedleCase], seed: int = 0) -> Haystack:
        """Text enough for these cases.

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
        """Where the text of a trial begins."""
        return next(place for place in self.breaks if place >= trial * _TRIAL_STRIDE)

    def place(self, case: NeedleCase) -> int:
        """Where the key of a case stands: between two sentences, as late as its prompt may be long."""
        start = self.start(case.trial)
        latest = start + case.length - len(self.asking.head) - case.distance
        return max(place for place in self.breaks if place <= latest)

    def key(self, case: NeedleCase) -> str:
        """Five digits that follow from seed and case alone."""
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
        """How many tokens `answers` will report for these cases."""
        longest = {case.trial: 0 for case in cases}
        for case in cases:
            longest[case.trial] = max(longest[case.trial], len(self.before(case)))
        return sum(longest.values()) + sum(case.distance for case in cases)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
