"""A grammar as a logits processor of transformers: `Grammar`."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from patchkit.errors import GrammarError
from patchkit.grammar.lark import ebnf_to_lark, lark_grammar
from patchkit.grammar.library import llguidance, short
from patchkit.grammar.masks import apply
from patchkit.grammar.matcher import Matcher
from patchkit.grammar.runs import Runs
from patchkit.grammar.schema import Whitespace, read_schema, schema_grammar, unknown_keywords
from patchkit.grammar.vocabulary import Vocabulary, vocabulary_of

_WARNING = "whitespace='flexible' lets a model write blanks without end in a JSON text: bound max_new_tokens, or leave the option out"

# Copies of a parser share what it has learned of the grammar's words, of which llguidance keeps a bounded amount: so many use one parser.
_MOST_COPIES = 128


class Grammar(LogitsProcessor):
    """Constrains the generated text of any causal language model to a grammar.

        grammar = Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}}, tokenizer)
        model.generate(**inputs, logits_processor=[grammar])

    The text after the prompt follows the grammar, and then comes an end token. The object may be used for any number of calls, one after
    the other or at the same time. A model patched with `speculative` generates the same text in fewer forwards.

    Attributes:
        texts: the grammar in llguidance's form; several where every row of a batch has its own (`batch`).
        vocabulary: the tokens of the tokenizer.
        unenforced: under ``lenient``, what llguidance ignores.
    """

    # patchkit's speculative loop may ask for single rows, and for drafts that are rejected later: the answer for a row depends on that
    # row's tokens only.
    by_row = True

    def __init__(self, texts: tuple[str, ...], vocabulary: Vocabulary, unenforced: tuple[str, ...] = ()) -> None:
        self.texts, self.vocabulary, self.unenforced = texts, vocabulary, unenforced
        self._compiled: dict[str, Matcher] = {}  # by text: at its start, to be copied
        self._copies = 0
        self._runs = Runs()

    @classmethod
    def json_schema(
        cls, schema: Any, tokenizer: Any, *, whitespace: Whitespace = None, lenient: bool = False, ends: Sequence[int] | None = None
    ) -> Grammar:
        """JSON texts that a schema describes, with properties in the schema's order.

        Args:
            schema: a dict, or JSON text.
            tokenizer: the model's, a fast one.
            whitespace: None writes ``", "`` and ``": "`` as `json.dumps` does; "flexible" allows any blanks, and warns.
            lenient: ignore keywords that are unknown or not implemented, and warn of them by name.
            ends: ids of the tokens that end a text; None: the tokenizer's end token.

        Raises:
            GrammarError: the schema does not read, describes nothing, or has keywords that are not enforced.
        """
        read = read_schema(schema)
        if whitespace == "flexible":
            warnings.warn(_WARNING, stacklevel=2)
        text = schema_grammar(read, whitespace, lenient)
        unknown = unknown_keywords(read) if lenient else []
        return cls._checked(text, vocabulary_of(tokenizer, ends), tuple(f"unknown keyword {name!r}" for name in unknown))

    @classmethod
    def json(cls, tokenizer: Any, *, whitespace: Whitespace = None, ends: Sequence[int] | None = None) -> Grammar:
        """Any JSON text.

        Args:
            tokenizer: the model's, a fast one.
            whitespace: None writes ``", "`` and ``": "`` as `json.dumps` does; "flexible" allows any blanks, and warns.
            ends: ids of the tokens that end a text; None: the tokenizer's end token.

        Raises:
            GrammarError: the tokenizer is slow, or there is no end token.
        """
        if whitespace == "flexible":
            warnings.warn(_WARNING, stacklevel=2)
        return cls._checked(schema_grammar({}, whitespace, lenient=False), vocabulary_of(tokenizer, ends))

    @classmethod
    def regex(cls, pattern: str, tokenizer: Any, *, ends: Sequence[int] | None = None) -> Grammar:
        """Texts that a regular expression matches as a whole.

        Args:
            pattern: in the syntax of Rust's regex crate, without look-around and back references.
            tokenizer: the model's, a fast one.
            ends: ids of the tokens that end a text; None: the tokenizer's end token.

        Raises:
            GrammarError: the expression does not read; the message has the place.
        """
        if not isinstance(pattern, str):
            raise GrammarError(f"the regular expression is a {type(pattern).__name__}: give text")
        return cls._checked(llguidance().LLMatcher.grammar_from_regex(pattern), vocabulary_of(tokenizer, ends))

    @classmethod
    def lark(cls, text: str, tokenizer: Any, *, ends: Sequence[int] | None = None) -> Grammar:
        """Texts of a context-free grammar in Lark's notation, which begins at the rule ``start``.

        Args:
            text: rules; a special token is written by its name, as in ``<|im_start|>``.
            tokenizer: the model's, a fast one.
            ends: ids of the tokens that end a text; None: the tokenizer's end token.

        Raises:
            GrammarError: the grammar does not read, names an end token, or none of its texts ends.
        """
        vocabulary = vocabulary_of(tokenizer, ends)
        return cls._checked(lark_grammar(text, vocabulary), vocabulary)

    @classmethod
    def ebnf(cls, text: str, tokenizer: Any, *, ends: Sequence[int] | None = None) -> Grammar:
        """Texts of a context-free grammar in the notation of llama.cpp (GBNF), which begins at the rule ``root``.

        Args:
            text: rules.
            tokenizer: the model's, a fast one.
            ends: ids of the tokens that end a text; None: the tokenizer's end token.

        Raises:
            GrammarError: the grammar does not read, or none of its texts ends.
        """
        return cls.lark(ebnf_to_lark(text), tokenizer, ends=ends)

    @classmethod
    def batch(cls, grammars: Sequence[Grammar]) -> Grammar:
        """One grammar for each row of a batch; with n beams or sequences per row, n rows have the same.

        Raises:
            GrammarError: there is none, or they are of different tokenizers.
        """
        if not grammars:
            raise GrammarError("a batch of no grammars: give one for each row")
        vocabulary = grammars[0].vocabulary
        if any(each.vocabulary is not vocabulary for each in grammars):
            raise GrammarError("these grammars are of different tokenizers or end tokens: make them all with the same")
        unenforced = tuple(dict.fromkeys(each for grammar in grammars for each in grammar.unenforced))
        made = cls(tuple(text for grammar in grammars for text in grammar.texts), vocabulary, unenforced)
        for grammar in grammars:
            made._compiled |= grammar._compiled
        return made

    @classmethod
    def _checked(cls, text: str, vocabulary: Vocabulary, unknown: tuple[str, ...] = ()) -> Grammar:
        matcher = Matcher(text, vocabulary)
        if matcher.parser.is_error():
            raise GrammarError(f"{short(matcher.parser.get_error())}. Mend the grammar, or leave out what llguidance does not have")
        unenforced = (*unknown, *map(str, matcher.parser.get_grammar_warnings()))
        if unenforced:
            warnings.warn(f"the grammar does not enforce: {'; '.join(unenforced)}", stacklevel=3)
        try:
            matcher.fill(np.zeros(vocabulary.words, dtype=np.int32))
        except GrammarError as error:
            raise GrammarError(f"no text follows this grammar ({error})") from error
        grammar = cls((text,), vocabulary, unenforced)
        grammar._compiled[text] = matcher
        return grammar

    def matchers(self, rows: int) -> list[Matcher]:
        """Return new parsers for the rows of a batch.

        Raises:
            GrammarError: there are several grammars, and the rows are no multiple of them.
        """
        texts = [self.texts[self._number(row, rows)] for row in range(rows)]
        if self._copies + rows > _MOST_COPIES:
            self._compiled, self._copies = {}, 0
        compiled = self._compiled
        self._copies += rows
        for text in texts:
            if text not in compiled or compiled[text].failed:
                compiled[text] = Matcher(text, self.vocabulary)
        return [compiled[text].fresh() for text in texts]

    def for_row(self, row: int, rows: int, prompt: int) -> LogitsProcessor:
        """Return a processor for one row of a batch of ``rows``, whose grammar begins after ``prompt`` tokens, padding included."""
        return _Row(self.texts[self._number(row, rows)], self.vocabulary, prompt)

    def _number(self, row: int, rows: int) -> int:
        if rows % len(self.texts):
            raise GrammarError(f"{len(self.texts)} grammars do not fit {rows} rows: give one for each row of the batch, or one for all")
        return row * len(self.texts) // rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] with minus infinity for the tokens that the grammar forbids after input_ids [B, T].

        The first call of a `generate` has the prompt, after which the grammar begins.

        Raises:
            GrammarError: the model has fewer tokens than the tokenizer, or the parser met a limit.
        """
        if input_ids.ndim != 2:
            raise GrammarError("a grammar needs all tokens of every row, [B, T]: call model.generate, and not generate_batch")
        run = self._runs.of(input_ids)
        rows = len(input_ids)
        if len(run.matchers) != rows:
            run.matchers = self.matchers(rows)
        masks = np.empty((rows, self.vocabulary.words), dtype=np.int32)
        for matcher, tokens, mask in zip(run.matchers, input_ids[:, run.prompt :].tolist(), masks, strict=True):
            matcher.bring(tokens)
            matcher.fill(mask)
        return apply(scores, masks, self.vocabulary.size)

    def __deepcopy__(self, memo: Any) -> Grammar:
        made = type(self)(self.texts, self.vocabulary, self.unenforced)
        made._compiled |= self._compiled
        return made

    def __repr__(self) -> str:
        return f"Grammar({json.dumps(self.texts[0])[:60]}{', ...' if len(self.texts) > 1 else ''})"


class _Row(LogitsProcessor):
    """A grammar over one row, [1, T]."""

    by_row = True

    def __init__(self, text: str, vocabulary: Vocabulary, prompt: int) -> None:
        self.text, self.vocabulary, self.prompt = text, vocabulary, prompt

    @functools.cached_property
    def matcher(self) -> Matcher:
        """The parser, which is made when it is needed."""
        return Matcher(self.text, self.vocabulary)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, V], masked."""
        self.matcher.bring(input_ids[0, self.prompt :].tolist())
        mask = np.empty((1, self.vocabulary.words), dtype=np.int32)
        self.matcher.fill(mask[0])
        return apply(scores, mask, self.vocabulary.size)
