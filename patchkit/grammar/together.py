"""Several parsers of one text, for a call of `generate` with more than one grammar: `Together`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchkit.grammar.matcher import Matcher


class Together:
    """The parsers of one text, with the methods of one `Matcher`: a token may follow where all of them allow it.

    Args:
        matchers: of one vocabulary.

    Attributes:
        parser: None: no single parser of the library knows all that is allowed.
    """

    parser = None

    def __init__(self, matchers: Sequence[Matcher]) -> None:
        self.matchers = list(matchers)

    @property
    def over(self) -> bool:
        """Whether only an end token may follow."""
        return any(matcher.over for matcher in self.matchers)

    def bring(self, tokens: list[int]) -> None:
        """Go to the end of ``tokens``, with every parser."""
        for matcher in self.matchers:
            matcher.bring(tokens)

    def fill(self, mask: np.ndarray) -> None:
        """Write the mask [W] int32, contiguous, of what all grammars allow, which may be nothing."""
        self.matchers[0].fill(mask)
        other = np.empty_like(mask)
        for matcher in self.matchers[1:]:
            matcher.fill(other)
            mask &= other

    def forced(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that one of the parsers expects without a choice; another may forbid them."""
        return max((matcher.forced(most) for matcher in self.matchers), key=len)

    def check(self) -> None:
        """Raise a `GrammarError` if a parser has met an error."""
        for matcher in self.matchers:
            matcher.check()
