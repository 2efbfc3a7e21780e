"""Verifiers, which find what a completion is worth by looking at its text. None of them runs code that the model has written."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar, Protocol

from patchkit.errors import RewardError

# A pattern that takes longer on one text would let the model stop the training.
_SECONDS = 1.0


class Verifier(Protocol):
    """Anything that says what a completion is worth; a function will do.

    Attributes:
        name: stands in its verdicts; of a function, its ``__name__``.
    """

    def __call__(self, prompt: Any, completion: Any, **columns: Any) -> float:
        """Return the reward of a completion, a finite number.

        Args:
            prompt, completion: strings, or lists of messages.
            columns: of the data set, this row's values.
        """


def text_of(completion: Any) -> str:
    """Return the text of a completion: a string itself, or the content of all its messages."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion]
    return "".join(each if isinstance(each, str) else "".join(part.get("text", "") for part in each) for each in contents)


@dataclass(frozen=True)
class ExactAnswer:
    """1.0 for the right answer, 0.0 for any other: the text behind the last ``marker``, without spaces around it.

    Args:
        marker: what an answer comes after, such as "####" or "Answer:"; None for the whole completion. Without it there is no answer.
        column: of the data set, with the right answers.
        as_number: compare as numbers, exactly: "1,000" is "1000.0", and "1/2" is "0.5". What is no number is wrong.
    """

    name: ClassVar[str] = "exact_answer"

    marker: str | None = None
    column: str = "answer"
    as_number: bool = False

    def __call__(self, prompt: Any, completion: Any, **columns: Any) -> float:
        if self.column not in columns:
            raise RewardError(f"the data set has no column {self.column!r} with answers, only {', '.join(sorted(columns)) or 'none'}")
        text, right = text_of(completion), str(columns[self.column]).strip()
        if self.marker is not None:
            _, marker, text = text.rpartition(self.marker)
            if not marker:
                return 0.0
        answer = text.strip()
        if not self.as_number:
            return float(answer == right)
        wanted = _number(right)
        if wanted is None:
            raise RewardError(f"the right answer {right!r} in the column {self.column!r} is no number")
        return float(_number(answer) == wanted)


@dataclass(frozen=True)
class MatchesPattern:
    """1.0 for a completion that a regular expression matches as a whole, else 0.0. A text that takes over a second is an error.

    Args:
        pattern: of the regex library, which reads all patterns of Python's re.

    Raises:
        RewardError: the pattern does not read.
    """

    name: ClassVar[str] = "matches_pattern"

    pattern: str
    _compiled: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        regex = _library("regex", "matches_pattern")
        try:
            object.__setattr__(self, "_compiled", regex.compile(self.pattern))
        except regex.error as error:
            raise RewardError(f"the pattern {self.pattern!r} does not read ({error})") from None

    def __call__(self, prompt: Any, completion: Any, **columns: Any) -> float:
        try:
            return float(self._compiled.fullmatch(text_of(completion), timeout=_SECONDS) is not None)
        except TimeoutError:
            raise RewardError(
                f"the pattern {self.pattern!r} takes over {_SECONDS:g} s on a completion of {len(text_of(completion))} characters: "
                "write it without nested repetitions"
            ) from None


@dataclass(frozen=True)
class MatchesSchema:
    """1.0 for a completion that is JSON and follows a JSON schema, else 0.0. The schema's references are never downloaded.

    Args:
        schema: the schema, of any draft that its "$schema" names; 2020-12 without.

    Raises:
        RewardError: it is no schema, or jsonschema is missing: ``pip install 'patchkit[rl]'``.
    """

    name: ClassVar[str] = "matches_schema"

    schema: dict[str, Any]
    _validator: Any = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        jsonschema, referencing = _library("jsonschema", self.name), _library("referencing", self.name)
        kind = jsonschema.validators.validator_for(self.schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(self.schema)
        except jsonschema.SchemaError as error:
            raise RewardError(f"no JSON schema: {error.message}") from None
        object.__setattr__(self, "_validator", kind(self.schema, registry=referencing.Registry()))

    def __call__(self, prompt: Any, completion: Any, **columns: Any) -> float:
        try:
            value = json.loads(text_of(completion), parse_constant=_refuse_constant)
            return float(self._validator.is_valid(value))
        except (ValueError, RecursionError):  # no JSON, or nested deeper than anything of use
            return 0.0
        except _library("referencing", self.name).exceptions.Unresolvable as error:
            raise RewardError(f"the schema refers to {error.ref!r}, which is not in it: write it into $defs") from None


def _number(text: str) -> Fraction | None:
    """The exact value of a number; None for any other text."""
    if len(text) > 100:  # 1e999999999 is short enough for a model, and its value is not
        return None
    try:
        mantissa = text.replace(",", "").replace("$", "")
        return None if "e" in mantissa.lower() else Fraction(mantissa)
    except (ValueError, ZeroDivisionError):
        return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not in JSON")


def _library(name: str, verifier: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise RewardError(f"{verifier} needs the {name} library: pip install 'patchkit[rl]'") from None
