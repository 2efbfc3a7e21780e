"""How a key is stated and asked for, in token ids."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from patchkit.errors import PatchError
from patchkit.measure.texts import encode

_SAYS = "\n\nThe secret number is {key}. Remember it.\n\n"


_ASKS = "\n\nWhat is the secret number? Answer with the number only."


_ANSWERS = "The secret number is"


ANY_KEY = "12345"


_PLACE = "\u241f"


class NeedleError(PatchError):
    """A needle cannot be placed or asked for; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Asking:
    """Prompt around a key, as token ids: how the key is stated and asked for.

    Attributes:
        chat: the question goes through the tokenizer's chat template; else the prompt ends with the words before the key.
        head: tokens before the text.
        tail: tokens after the text, up to the beginning of the answer.
        answer: tokens before the key in the answer whose probability is measured.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    head: list[int]
    tail: list[int]
    answer: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Asking:
        """Ask through the chat template if the tokenizer has one, else as plain continuation.

        Raises:
            NeedleError: the chat template changes a message.
        """
        if tokenizer.chat_template is None:
            return cls(tokenizer, False, encode(tokenizer, ""), _ids(tokenizer, f"{_ASKS}\n\n{_ANSWERS}"), [])
        message = [{"role": "user", "content": f"{_PLACE}{_ASKS}"}]
        # Models that think before they answer have templates that know this word; others ignore it.
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        head, found, tail = str(rendered).partition(_PLACE)
        if not found or not tail.startswith(_ASKS):
            raise NeedleError("the chat template changes a user's message, so a needle cannot be placed in it: use a tokenizer without one")
        return cls(tokenizer, True, _ids(tokenizer, head), _ids(tokenizer, tail), _ids(tokenizer, _ANSWERS))

    def needle(self, key: str) -> list[int]:
        return _ids(self.tokenizer, _SAYS.format(key=key))

    def key(self, key: str) -> list[int]:
        return _ids(self.tokenizer, f" {key}")

    @property
    def words(self) -> str:
        """Description of how a key is asked for."""
        return "through the chat template" if self.chat else "as plain continuation"

    @property
    def least(self) -> int:
        """Shortest distance in tokens: needle and question alone."""
        return len(self.needle(ANY_KEY)) + len(self.tail)

    def side(self, distance: int, window: int | None) -> str:
        """Position of a key relative to a window.

        "inside": the whole sentence is visible until the answer is complete. "beyond": none of it is visible when the answer begins.
        "edge": otherwise. "": there is no window.
        """
        if window is None:
            return ""
        if distance + len(self.answer) + len(self.key(ANY_KEY)) <= window:
            return "inside"
        return "beyond" if distance - len(self.needle(ANY_KEY)) >= window else "edge"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
