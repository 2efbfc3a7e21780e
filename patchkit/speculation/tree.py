"""Shapes of proposals: trees and chains, their depths, and cuts to a number of drafts. Node 0 is the last known token."""

from __future__ import annotations

import torch

from patchkit.speculation.drafter import Proposal


def tree_shape(parents: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the depth [1 + n] int64 of each node of a tree, and whether node j is on the path of node i, bool [1 + n, 1 + n]."""
    depths = [0]
    on_path = torch.zeros(len(parents) + 1, len(parents) + 1, dtype=torch.bool)
    on_path[0, 0] = True
    for node, parent in enumerate(parents, 1):
        depths.append(depths[parent + 1] + 1)
        on_path[node] = on_path[parent + 1]
        on_path[node, node] = True
    return torch.tensor(depths, device=device), on_path.to(device)


def children_of(proposal: Proposal | None, row: int) -> dict[int, list[int]]:
    """Return the drafted nodes, numbered from 1, under each node of a row's drafts."""
    if proposal is None:
        return {}
    if proposal.parents is None:
        return {node: [node + 1] for node in range(proposal.counts[row])}
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(proposal.parents, 1):
        children.setdefault(parent + 1, []).append(node)
    return children


def trunk(proposal: Proposal) -> Proposal:
    """Reduce a tree to the path through its first children, for caches that verify chains only; return a chain as it is."""
    if proposal.parents is None:
        return proposal
    path, node = [], -1
    while node in proposal.parents:
        node = proposal.parents.index(node)
        path.append(node)
    return Proposal(proposal.tokens[:, path], [len(path)] * len(proposal.tokens))


def at_most(proposal: Proposal, k: int) -> Proposal | None:
    """Cut a proposal to at most ``k`` drafts per row, without columns that no row uses; None if nothing is left."""
    longest = min(k, max(proposal.counts)) if proposal.parents is None else min(k, proposal.tokens.shape[1])
    if longest <= 0:
        return None
    return Proposal(
        proposal.tokens[:, :longest],
        [min(count, longest) for count in proposal.counts],
        None if proposal.probabilities is None else proposal.probabilities[:, :longest],
        None if proposal.parents is None else proposal.parents[:longest],
        None if proposal.chances is None else [chances[:longest] for chances in proposal.chances],
    )


def depths(proposal: Proposal | None, rows: int) -> list[int]:
    """Return the largest number of drafts that could be accepted in each row."""
    if proposal is None:
        return [0] * rows
    if proposal.parents is None:
        return proposal.counts
    return [int(tree_shape(proposal.parents, torch.device("cpu"))[0].max())] * rows


def stacked(rows: list[list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
    """Stack lists of [V] per row into one [B, V] per new token; zeros where a row has ended."""
    longest = max(map(len, rows))
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.stack([row[i] if i < len(row) else blank for row in rows]) for i in range(longest))
