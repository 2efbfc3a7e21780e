"""Shapes of proposals: trees and chains, their depths, and cuts to a number of drafts. Node 0 is the last known token."""

from __future__ import annotations

import itertools

import torch

from patchkit.speculation.drafter import Proposal

# Below this chance a draft brings nothing, and ratios would be divided by nothing.
_LEAST_CHANCE = 1e-6


def tree_shape(proposal: Proposal, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape of a proposed tree.

    Returns:
        The depth [R or 1, 1 + n] int64 of each node, and [R or 1, 1 + n, 1 + n] bool, whether node j is on the path of node i; the
        first dimension is 1 if all rows have the same tree.
    """
    parents = proposal.parents
    assert parents is not None
    shapes = [_shape(each) for each in (parents if isinstance(parents, list) else [parents])]
    return torch.tensor([depths for depths, _ in shapes], device=device), torch.tensor([paths for _, paths in shapes], device=device)


def _shape(parents: tuple[int, ...]) -> tuple[list[int], list[list[bool]]]:
    """Depths and paths of one tree, as lists: a few nodes take microseconds so, and several times that as tensors."""
    depths, paths = [0], [[True] + [False] * len(parents)]
    for node, parent in enumerate(parents, 1):
        depths.append(depths[parent + 1] + 1)
        path = list(paths[parent + 1])
        path[node] = True
        paths.append(path)
    return depths, paths


def parents_of(proposal: Proposal, row: int) -> tuple[int, ...]:
    """Return the parent of each draft of a row, filler left out, as in `Proposal.parents`."""
    count, parents = proposal.counts[row], proposal.parents
    if parents is None:
        return tuple(range(-1, count - 1))
    return (parents[row] if isinstance(parents, list) else parents)[:count]


def children_of(proposal: Proposal | None, row: int) -> dict[int, list[int]]:
    """Return the drafted nodes, numbered from 1, under each node of a row's drafts."""
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(() if proposal is None else parents_of(proposal, row), 1):
        children.setdefault(parent + 1, []).append(node)
    return children


def trunk(proposal: Proposal) -> Proposal:
    """Reduce trees to the path through their first children, for caches that verify chains only; return a chain as it is."""
    if proposal.parents is None:
        return proposal
    paths = [_first_children(parents_of(proposal, row)) for row in range(len(proposal.tokens))]
    longest = max(map(len, paths))
    index = torch.tensor([path + [0] * (longest - len(path)) for path in paths], dtype=torch.int64, device=proposal.tokens.device)
    chances = proposal.chances
    return Proposal(
        proposal.tokens.gather(1, index),
        list(map(len, paths)),
        chances=None if chances is None else [[row[node] for node in path] for row, path in zip(chances, paths, strict=True)],
    )


def _first_children(parents: tuple[int, ...]) -> list[int]:
    path, node = [], -1
    while node in parents:
        node = parents.index(node)
        path.append(node)
    return path


def at_most(proposal: Proposal, k: int) -> Proposal | None:
    """Cut a proposal to at most ``k`` drafts per row, without columns that no row uses; None if nothing is left."""
    longest = min(k, max(proposal.counts))
    if longest <= 0:
        return None
    parents = proposal.parents
    return Proposal(
        proposal.tokens[:, :longest],
        [min(count, longest) for count in proposal.counts],
        None if proposal.probabilities is None else proposal.probabilities[:, :longest],
        [row[:longest] for row in parents] if isinstance(parents, list) else None if parents is None else parents[:longest],
        None if proposal.chances is None else [chances[:longest] for chances in proposal.chances],
    )


def chain_chances(proposal: Proposal) -> list[list[float]]:
    """Return, for proposals with chances, those of chains whose first n drafts bring as many tokens as the first n drafts here, for any n.

    A draft of a tree brings the probability that its whole path is accepted. In a chain that is the product of the chances so far, so each
    chance is the ratio of two such probabilities.
    """
    assert proposal.chances is not None
    if proposal.parents is None:
        return proposal.chances
    result = []
    for row, chances in enumerate(proposal.chances):
        reached = [1.0]
        for parent, chance in zip(parents_of(proposal, row), chances, strict=True):
            reached.append(reached[parent + 1] * max(chance, _LEAST_CHANCE))
        result.append([after / before for before, after in itertools.pairwise(reached)])
    return result


def depths(proposal: Proposal | None, rows: int) -> list[int]:
    """Return the largest number of drafts that could be accepted in each row."""
    if proposal is None:
        return [0] * rows
    if proposal.parents is None:
        return proposal.counts
    return [max(_shape(parents_of(proposal, row))[0]) for row in range(rows)]


def stacked(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Stack lists of [V] per row into one [B, V] per new token; zeros where a row has ended."""
    longest = max(map(len, rows))
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[i] if i < len(row) else blank for row in rows]) for i in range(longest))
