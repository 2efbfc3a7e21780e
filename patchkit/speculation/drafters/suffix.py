"""Suffix drafting: what followed the end of the sequence wherever it came before, in this call or in earlier ones, is proposed.

Hu et al. 2024, "SuffixDecoding", https://arxiv.org/abs/2411.04975. Differs from it in that sequences are scanned instead of
kept in a tree (`patchkit.speculation.suffix_store`), that tokens with few votes are left out, and that the number of drafts is not a
multiple of the match: drafts come with chances of acceptance, learned for each length of match, and the controller keeps those that pay.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from patchkit.record import Warnings
from patchkit.speculation.best_first import Tree, best_tree, proposal_of
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.drafter import Drafter, Proposal, Session, State
from patchkit.speculation.suffix_file import SuffixFile, Writer
from patchkit.speculation.suffix_store import LONGEST_SUFFIX, GrowingSequence, Places, SuffixStore

if TYPE_CHECKING:
    from patchkit.anatomy.target import Target

# Acceptance before anything was learned, by the shortest match that it holds for; less where the places found do not agree.
_PRIORS = ((1, 0.25), (2, 0.4), (3, 0.5), (4, 0.65), (6, 0.8), (10, 0.9))
_AGREED, _MOSTLY_AGREED = 0.95, 0.6
_FACTORS = (0.4, 0.75, 1.0)
# The same of tokens with fewer votes than the first.
_OFTEN, _SELDOM = 0.3, 0.15
_BRANCH_FACTORS = (0.1, 0.2, 0.35)

# Texts of a batch that does not end after which the file is written.
_TEXTS_PER_WRITE = 16

# Share of the first token's votes from which another token is drafted beside it.
_NEAR = 1 / 3

# Length of the match, whether another token has more votes, and the share of the places: each in three steps or a few.
_Kind = tuple[int, bool, int]


@dataclass(frozen=True)
class Suffix(Drafter, name="suffix"):
    """Draft from the sequence so far and from prompts and answers of earlier calls. Costs next to nothing, also where nothing is found.

    Args:
        scope: "model" remembers the calls of the patched model; "call" only the call itself; anything else is the path of a file in which
            they are kept from process to process (safetensors). Each call of generate replaces the file, and a `Scheduler` does after
            every 16 texts; of several processes, or models, that write one file the last wins. It belongs to the model with the weights
            that it was patched with.
        shortest: tokens that must agree at least, 1 to 32.
        max_tokens: the most tokens that are remembered, at 4 bytes each; sequences that were not used for longest are dropped.

    Raises:
        ValueError: an option out of range.
    """

    example = "suffix"

    scope: str = "model"
    shortest: int = 1
    max_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        if not isinstance(self.scope, str) or not self.scope:
            raise ValueError(f"scope={self.scope!r}: give 'model', 'call' or the path of a file")
        for name, least in (("shortest", 1), ("max_tokens", 1024)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of tokens, at least {least}")
        if self.shortest > LONGEST_SUFFIX:
            raise ValueError(f"shortest={self.shortest}: give at most {LONGEST_SUFFIX} tokens, which is as many as are compared")

    def check(self, target: Target) -> None:
        if self._file is not None:
            # While no patch has changed the weights.
            writer = Writer.of(target.model)
            target.views[id(self)] = writer, self._file.read(writer, self.max_tokens)

    def prepared(self, target: Target) -> Drafter:
        if self._file is None:
            return RememberingSuffix(self, SuffixStore(self.max_tokens), Calibration())
        if id(self) not in target.views:
            self.check(target)
        writer, store = target.views.pop(id(self))
        return RememberingSuffix(self, store, Calibration(), self._file, writer)

    def begin(self, model: Any, state: State) -> Session:
        return SuffixSession(self, SuffixStore(self.max_tokens), Calibration(), state.rows)

    @property
    def _file(self) -> SuffixFile | None:
        return None if self.scope in ("model", "call") else SuffixFile(os.path.abspath(self.scope))

    def __str__(self) -> str:
        return f"suffix({self.scope})"


@dataclass(frozen=True, eq=False)
class RememberingSuffix(Drafter):
    """Suffix drafting for one patched model, with what its calls have in common."""

    options: Suffix
    store: SuffixStore
    calibration: Calibration
    file: SuffixFile | None = None
    writer: Writer | None = None  # where there is a file
    warnings: Warnings = field(default_factory=Warnings)

    def follow(self, model: Any, thorough: bool = False) -> Drafter:
        now = None if self.writer is None else Writer.of(model)
        if now is None or self.writer is None or now.label == self.writer.label:
            now = self.writer
        # After resize_token_embeddings to fewer tokens the model could not read what is remembered.
        keeps = self.store.largest < model.get_input_embeddings().weight.shape[0]
        if keeps and now is self.writer:
            return self
        return dataclasses.replace(self, store=self.store if keeps else SuffixStore(self.options.max_tokens), writer=now)

    def begin(self, model: Any, state: State) -> Session:
        store = SuffixStore(self.options.max_tokens) if self.options.scope == "call" else self.store
        return SuffixSession(self.options, store, self.calibration, state.rows, self._save)

    def _save(self) -> None:
        if self.file is None or self.writer is None:
            return
        try:
            self.file.write(self.store, self.writer)
        except (OSError, SafetensorError) as error:  # the text is generated, and must not be lost
            self.warnings.add(f"suffix(scope={self.options.scope!r}) cannot be written ({type(error).__name__})")

    def __str__(self) -> str:
        return str(self.options)


@dataclass
class _Drafted:
    """The last drafts of one row, and where they begin in its sequence."""

    start: int
    tree: Tree


class SuffixSession(Session):
    """The sequences of one call, and what is remembered of earlier ones."""

    estimates = True

    def __init__(
        self, options: Suffix, store: SuffixStore, calibration: Calibration, rows: int, save: Callable[[], None] | None = None
    ) -> None:
        self.options, self.store, self.calibration, self.save = options, store, calibration, save
        self.sequences = [GrowingSequence() for _ in range(rows)]
        self.drafted: list[_Drafted | None] = [None] * rows

    def propose(self, state: State, k: int) -> Proposal | None:
        trees = [self._tree(state, row, k) for row in range(state.rows)]
        return proposal_of(trees, state.tokens.device)

    def _tree(self, state: State, row: int, k: int) -> Tree:
        self._read(state, row)
        sequence = self.sequences[row]
        places = self.store.places(sequence, self.options.shortest)
        if places is None:
            return Tree()
        tree = best_tree(places, functools.partial(self._children, sequence), k, chain=not state.trees)
        self.drafted[row] = _Drafted(sequence.length, tree)
        return tree

    def _children(self, sequence: GrowingSequence, places: Places) -> Iterator[tuple[int, _Kind, float, Places]]:
        following = self.store.following(sequence, places)
        for rank, (token, share, after) in enumerate(following):
            if share < _NEAR * following[0][1]:
                return
            kind = _kind(places.matched, share, rank)
            yield token, kind, self.calibration.chance(kind, _prior(kind)), after

    def finished(self, state: State, rows: list[int]) -> None:
        for row in rows:
            self._read(state, row)
            self.store.add(self.sequences[row].tokens[1:].copy())
        if self.save is not None and self.store.unwritten >= _TEXTS_PER_WRITE:
            self.save()

    def join(self, other: Any) -> None:
        self.sequences = self.sequences + other.sequences
        self.drafted = self.drafted + other.drafted

    def select_rows(self, rows: list[int]) -> None:
        self.sequences = [self.sequences[row] for row in rows]
        self.drafted = [self.drafted[row] for row in rows]

    def close(self, state: State) -> None:
        for row, sequence in enumerate(self.sequences):
            self._read(state, row)
            self.store.add(sequence.tokens[1:].copy())
        if self.save is not None:
            self.save()

    def _read(self, state: State, row: int) -> None:
        """Take in the row's new tokens, and learn from them which drafts were accepted."""
        sequence, drafted = self.sequences[row], self.drafted[row]
        new = state.tokens[row, state.pads[row] + sequence.length : state.lengths[row]].tolist()
        if drafted is not None and drafted.start == sequence.length:
            for node, accepted in drafted.tree.outcomes(new):
                self.calibration.add(drafted.tree.kinds[node], accepted)
        self.drafted[row] = None
        sequence.extend(new)


def _kind(matched: int, share: float, rank: int) -> _Kind:
    """Drafts whose acceptance is estimated together: by length of the match, first token or another one, and share of the places."""
    shortest = max(least for least, _ in _PRIORS if least <= matched)
    if rank:
        return shortest, True, (share > _SELDOM) + (share > _OFTEN)
    return shortest, False, (share > _MOSTLY_AGREED) + (share > _AGREED)


def _prior(kind: _Kind) -> float:
    shortest, branch, agreement = kind
    return dict(_PRIORS)[shortest] * (_BRANCH_FACTORS if branch else _FACTORS)[agreement]
