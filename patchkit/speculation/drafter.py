"""The interface of drafters: options (`Drafter`), one `Session` per call of generate, and the `Proposal` of one round.

Shapes: R rows still generating, n proposed tokens (K at most), V vocabulary, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from patchkit.registered import Registered

if TYPE_CHECKING:
    from patchkit.anatomy.target import Target


@dataclass(eq=False)
class State:
    """The state of a generation, as drafters see it.

    Attributes:
        tokens: [R, room] int64; the sequence of row r is ``tokens[r, pads[r] : lengths[r]]``. Its last token was not fed to the target yet.
        lengths, pads: of each row; lengths count the padding.
        sampler: None in greedy runs; else ``sampler(drafted, logits)`` is the distribution [R, V] float32 from which the token after
            the sequences and ``drafted`` [R, n] would be drawn, given logits [R, V], with the run's temperature, top-p and so on.
        likeliest: None where any token may follow; else ``likeliest(drafted, logits)`` is the likeliest token [R] that the grammar allows
            there.
        trees: trees can be verified. Elsewhere the path through the first children of a tree is, so a chain is the better proposal.
    """

    tokens: torch.Tensor
    lengths: list[int]
    pads: list[int]
    sampler: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    likeliest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    trees: bool = True

    @property
    def greedy(self) -> bool:
        """Whether the run takes the most likely token every time."""
        return self.sampler is None

    @property
    def rows(self) -> int:
        """Number of rows R."""
        return len(self.lengths)

    def text(self, row: int) -> torch.Tensor:
        """The row's tokens [length] int64, without padding."""
        return self.tokens[row, self.pads[row] : self.lengths[row]]


@dataclass(eq=False)
class Proposal:
    """Tokens that a drafter expects next.

    Attributes:
        tokens: [R, n] int64, n >= 1.
        counts: of each row, how many of its n tokens are proposed; the rest is filler.
        probabilities: [R, n, V] float32, the distribution each token was drawn from; None if the tokens are a deterministic choice.
        parents: None for a chain. For a tree, node i follows node ``parents[i] < i``, or the last known token if that is -1; trees are
            deterministic choices. One tuple is the tree of every row, all n nodes of it; a list has a tuple of n for each row, of which
            filler is ignored.
        chances: of each row, the estimated probability that each of its drafts is accepted when the draft that it follows is; None
            without estimates. Controllers that know costs cut a round by them (`ControllerSession.worth`) to its first drafts, so
            the best come first.
    """

    tokens: torch.Tensor
    counts: list[int]
    probabilities: torch.Tensor | None = None
    parents: tuple[int, ...] | list[tuple[int, ...]] | None = None
    chances: list[list[float]] | None = None


def chains(found: list[list[int]], device: torch.device) -> Proposal | None:
    """Return the proposal of a chain of tokens for each row, of any lengths; None if all are empty."""
    longest = max(map(len, found))
    if not longest:
        return None
    padded = [each + [0] * (longest - len(each)) for each in found]
    return Proposal(torch.tensor(padded, device=device), [len(each) for each in found])


class Draws:
    """The chain of one round as it grows: the likeliest tokens in greedy runs, drawn ones in sampled runs.

    Args:
        greedy: choose in sampled runs too.

    Attributes:
        last: [R] int64, the token drafted last.
    """

    last: torch.Tensor

    def __init__(self, state: State, greedy: bool = False) -> None:
        self.sampler = None if greedy else state.sampler
        self.state = state
        self._tokens: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens drafted so far, [R, n] int64."""
        return torch.stack(self._tokens, 1)

    @property
    def probabilities(self) -> torch.Tensor | None:
        """The distribution of each draw, [R, n, V] float32; None in greedy runs."""
        return torch.stack(self._probabilities, 1) if self._probabilities else None

    def draw(self, logits: torch.Tensor) -> None:
        """Choose the next token of every row by its logits [R, V]."""
        state = self.state
        if self.sampler is None and state.likeliest is None:
            self.last = logits.argmax(-1)
            self._tokens.append(self.last)
            return
        drafted = self.tokens if self._tokens else state.tokens[:, :0]
        if self.sampler is None:
            assert state.likeliest is not None
            self.last = state.likeliest(drafted, logits)
        else:
            self._probabilities.append(self.sampler(drafted, logits))
            self.last = torch.multinomial(self._probabilities[-1], 1)[:, 0]
        self._tokens.append(self.last)


class Session(ABC):
    """A drafter at work on one call of generate."""

    # Whether `observe` is wanted, which has the target's last hidden states kept.
    wants_hidden: bool = False
    # Decoder layers, by index, whose outputs `observe` gets behind the last hidden states.
    layers: tuple[int, ...] = ()
    # Whether `observe_logits` is wanted.
    wants_logits: bool = False
    # Whether the rows of a batch have to advance by the same number of tokens.
    aligned: bool = False
    # Whether proposals come with chances, so that the controller may ask for many drafts and keep those that pay.
    estimates: bool = False

    @abstractmethod
    def propose(self, state: State, k: int) -> Proposal | None:
        """Return at most ``k >= 1`` tokens for every row; None, or rows of count 0, where there is nothing to propose."""

    def observe(self, hidden: torch.Tensor, counts: list[int]) -> None:  # noqa: B027 (most drafters want no hidden states)
        """Take note of a target forward; the first call is the prompt, padding included.

        Args:
            hidden: [R, T, D], the last hidden states of the T tokens fed; with `layers`, [R, T, (1 + len(layers)) D], and the outputs of
                these layers behind them.
            counts: of each row, how many of these tokens are part of the text.
        """

    def observe_logits(self, tokens: torch.Tensor, logits: torch.Tensor, counts: list[int]) -> None:  # noqa: B027 (as above)
        """Take note of the target's logits after each token that was fed, before it is known which are accepted.

        The first call is the last token of the prompt.

        Args:
            tokens: [R, T] int64, the last known token of each row and its drafts.
            logits: [R, T, V], before processors; they must not be changed.
            counts: of each row, how many of these tokens it has; the rest is filler.
        """

    def select_rows(self, rows: list[int]) -> None:  # noqa: B027 (nothing to do where nothing is kept by row)
        """Go on with these rows only, in this order: the others have finished."""

    def finished(self, state: State, rows: list[int]) -> None:  # noqa: B027 (most drafters learn nothing from it)
        """Take note that these rows have ended; ``state`` still has them, whole. `select_rows` or `close` follows."""

    def join(self, other: Any) -> None:  # noqa: B027 (nothing to do where nothing is kept by row)
        """Go on with the rows of another session of the same drafter too, after one's own. Sessions that are `aligned` never join."""

    def close(self, state: State) -> None:  # noqa: B027 (nothing to do where nothing outlives the call)
        """End the call of generate, also after an error. ``state`` holds the rows that were still generating."""


class Drafter(Registered, ABC, kind="drafter", folder="patchkit.speculation.drafters"):
    """Options of one method of drafting: a frozen dataclass, validated in `__post_init__`, without run-time state.

    A subclass with ``name="name"`` is known to spec strings: `speculative(draft=name)`. Its ``example`` drafts for any model.

    Attributes:
        any_model: False if the example drafts only for a model whose tokenizer is known.
    """

    any_model: ClassVar[bool] = True

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers, by index, whose outputs sessions of this drafter, once prepared, ask for (`Session.layers`)."""
        return ()

    def check(self, target: Target) -> None:
        """Refuse a model that this drafter cannot serve, by raising a `PatchError`. Must not touch the model."""

    def prepared(self, target: Target) -> Drafter:
        """Return the drafter for this model, made once, when the patch is applied; by default the options themselves."""
        return self

    def follow(self, model: Any, thorough: bool = False) -> Drafter:
        """Return the drafter for ``model``, for which this one was prepared, now that its weights or adapters have changed.

        Args:
            thorough: they may have changed where no sign of it is seen.
        """
        return self

    def outdated(self, model: Any, adapters: bool) -> str | None:
        """Return why drafts for ``model`` are worse since its weights have changed, or its adapters; None if they are not."""
        return None

    def note(self) -> str | None:
        """Return what the report says of this drafter, once prepared, beyond its text; None for nothing."""
        return None

    @abstractmethod
    def begin(self, model: Any, state: State) -> Session:
        """Return a session for one call of generate of ``model``."""
