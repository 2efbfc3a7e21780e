"""Trees of drafts: the best ones against all paths, one for each row, their cuts, and the path that a chain cache verifies."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from speculation import FEW, NEW, plain_text, text_of
from support import matrix

from patchkit import patched
from patchkit.patches.speculative import Speculative
from patchkit.speculation import statistics_of
from patchkit.speculation.best_first import Tree, best_tree, proposal_of
from patchkit.speculation.controllers.cost_model import CostModel
from patchkit.speculation.drafter import Drafter, Proposal, Session, State
from patchkit.speculation.statistics import StepRecord
from patchkit.speculation.tree import at_most, chain_chances, depths, parents_of, tree_shape, trunk
from patchkit.testing import tiny_model

Path = tuple[int, ...]
CPU = torch.device("cpu")


def random_chances(seed: int, width: int, depth: int) -> dict[Path, float]:
    """A chance for every path of ``depth`` tokens at most, where no path may end earlier: in any order of tokens."""
    chance = random.Random(seed)
    paths = [path for length in range(1, depth + 1) for path in itertools.product(range(width), repeat=length)]
    return {path: chance.random() ** 2 for path in paths}


def paths_of(tree: Tree) -> list[Path]:
    """The tokens on the way to each node."""
    paths: list[Path] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@pytest.mark.parametrize("seed", range(30))
def test_the_first_n_nodes_are_the_n_likeliest_of_all_paths(seed: int) -> None:
    chances = random_chances(seed, width=3, depth=4)

    def children(path: Path) -> Iterator[tuple[int, None, float, Path]]:
        return ((token, None, chances[(*path, token)], (*path, token)) for token in range(3) if (*path, token) in chances)

    likelihood = {path: math.prod(chances[path[: n + 1]] for n in range(len(path))) for path in chances}
    expected = sorted(likelihood, key=lambda path: -likelihood[path])
    tree = best_tree((), children, 25)
    assert paths_of(tree) == expected[:25]
    assert tree.chances == [chances[path] for path in expected[:25]]
    assert len(best_tree((), children, 1000).tokens) == len(chances)
    chain = best_tree((), children, 25, chain=True)
    path: Path = ()
    for node, (token, parent) in enumerate(zip(chain.tokens, chain.parents, strict=True)):
        assert parent == node - 1
        path = (*path, max(range(3), key=lambda token: chances[(*path, token)]))
        assert token == path[-1]
    assert len(path) == 4


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_is_worth_the_paths_that_it_holds(seed: int) -> None:
    """A controller that knows chains counts the expected tokens of every cut of a tree, and takes the best by its costs."""
    chances = random_chances(seed, width=3, depth=3)
    rows = []
    for row in range(2):
        shift = 0.5 if row else 1.0

        def children(path: Path, shift: float = shift) -> Iterator[tuple[int, None, float, Path]]:
            return ((token, None, shift * chances[(*path, token)], (*path, token)) for token in range(3) if len(path) < 3)

        rows.append(best_tree((), children, 8 + row))
    proposal = proposal_of(rows, CPU)
    assert proposal is not None
    expected = [0.0] * 10
    for row, tree in enumerate(rows):
        for n in range(10):
            for path in paths_of(tree)[:n]:
                expected[n] += math.prod((0.5 if row else 1.0) * chances[path[: i + 1]] for i in range(len(path)))
    found = [sum(math.prod(row[: i + 1]) for row in chain_chances(proposal) for i in range(min(n, len(row)))) for n in range(10)]
    assert found == pytest.approx(expected, rel=1e-3)

    costs = [1.0, 1.75, 1.9, 1.39, 1.5, 1.6, 1.7, 1.86, 1.9, 1.95]  # by drafts
    session = CostModel(bounds=(0, 9)).begin()
    session.new_text(10)
    for n, ms in [(2, costs[2]), (0, costs[0]), (2, costs[2]), (0, costs[0])] + [(n, costs[n]) for n in range(10) for _ in range(2)]:
        session.observe(StepRecord(n, 2, (n, n), (0, 0), 2, 0.0, ms, 0.0))
    speeds = [(2 + tokens) / ms for tokens, ms in zip(expected, costs, strict=True)]
    assert session.worth(chain_chances(proposal)) == max(range(10), key=speeds.__getitem__)


def test_shapes_and_cuts_of_rows_with_trees_of_their_own() -> None:
    trees = [Tree([5, 6, 7, 8], [-1, -1, 0, 2], [0.5, 0.3, 0.4, 0.9]), Tree([9, 10], [-1, 0], [0.6, 0.5]), Tree()]
    proposal = proposal_of(trees, CPU)
    assert proposal is not None and proposal.counts == [4, 2, 0] and isinstance(proposal.parents, list)
    assert [parents_of(proposal, row) for row in range(3)] == [(-1, -1, 0, 2), (-1, 0), ()]
    assert depths(proposal, 3) == [3, 2, 0]
    shape, on_path = tree_shape(proposal, CPU)
    assert shape[:2].tolist() == [[0, 1, 1, 2, 3], [0, 1, 2, 1, 1]]
    assert on_path[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    first = trunk(proposal)
    assert first.parents is None and first.counts == [3, 2, 0] and first.chances == [[0.5, 0.4, 0.9], [0.6, 0.5], []]
    assert first.tokens[0].tolist() == [5, 7, 8] and first.tokens[1, :2].tolist() == [9, 10]
    cut = at_most(proposal, 3)
    assert cut is not None and cut.tokens.shape == (3, 3) and cut.counts == [3, 2, 0]
    assert [parents_of(cut, row) for row in range(3)] == [(-1, -1, 0), (-1, 0), ()]
    assert cut.chances == [[0.5, 0.3, 0.4], [0.6, 0.5], []]
    assert at_most(proposal, 0) is None
    chains = proposal_of([Tree([1, 2], [-1, 0], [0.5, 0.5]), Tree([3], [-1], [0.5])], CPU)
    assert chains is not None and chains.parents is None, "chains have a faster judge"
    assert proposal_of([Tree(), Tree()], CPU) is None


@dataclass(frozen=True, eq=False)
class Thicket(Drafter):
    """A tree of its own for every row and round: the right text, with wrong siblings, in a random order of siblings."""

    text: torch.Tensor

    def begin(self, model: Any, state: State) -> Session:
        return _ThicketSession(self.text)


class _ThicketSession(Session):
    def __init__(self, text: torch.Tensor) -> None:
        self.text, self.random = text, random.Random(0)

    def propose(self, state: State, k: int) -> Proposal | None:
        trees = []
        for row, length in enumerate(state.lengths):
            known = next(text for text in self.text.tolist() if text[:8] == state.tokens[row, :8].tolist())
            tree, trunk = Tree(), -1
            for token in known[length : length + self.random.randrange(k // 2 + 1)]:
                siblings = [token, (token + 1) % 128][: self.random.randrange(1, 3)]
                self.random.shuffle(siblings)
                nodes = [tree.add(each, trunk, 0.5) for each in siblings]
                trunk = nodes[siblings.index(token)]
            trees.append(tree)
        return proposal_of(trees, state.tokens.device)


@pytest.mark.parametrize(
    ("family", "batch", "new"),
    [("llama", 4, FEW), ("gemma3_text", 4, FEW), ("bloom", 4, FEW), ("deepseek_v3", 1, FEW)]
    + [matrix(family, 4, NEW) for family in ("llama", "gemma3_text", "mistral", "bloom", "gpt2", "deepseek_v3")],
)
def test_rows_are_verified_by_trees_of_their_own(family: str, batch: int, new: int) -> None:
    text, model = plain_text(family, batch, new=new), tiny_model(family)
    with patched(model, Speculative(draft=Thicket(text), k=8), verbose=False):
        assert torch.equal(text_of(model, batch, new), text)
        statistics = statistics_of(model)
    # Every right draft is accepted: 2 of each row and round on average.
    assert statistics.accepted == statistics.proposed and statistics.tokens_per_target_step > 2.4


def test_a_window_verifies_the_path_through_the_first_children() -> None:
    text, model = plain_text("llama", 2, streaming=True, new=FEW), tiny_model("llama")
    with patched(model, "streaming(sinks=2, window=10)", Speculative(draft=Thicket(text), k=8), verbose=False):
        assert torch.equal(text_of(model, 2, FEW), text)
        assert 0 < statistics_of(model).accepted < statistics_of(model).proposed
