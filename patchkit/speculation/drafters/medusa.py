"""Drafts from heads on the last hidden state: `Medusa`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError
from patchkit.speculation.drafter import Drafter, Draws, Proposal, Session, State
from patchkit.speculation.heads import Init, MedusaHeads, TrainedFor, heads_for


@dataclass(frozen=True)
class Medusa(Drafter, name="medusa"):
    """Medusa (Cai et al. 2024, https://arxiv.org/abs/2401.10774): every drafted token comes from a head of its own, at once.

    In sampled runs a chain's tokens are drawn from the heads' distributions; a tree's are always the likeliest ones. A model that
    scales or caps its logits after the LM head is served too: heads leave that out, which costs acceptance in sampled runs only.

    Args:
        heads: a file that `patchkit train-heads` wrote, "bundled" for those that ship for stdlib-7m, or `MedusaHeads`; None:
            untrained ones. In spec strings `medusa` is `medusa(heads=bundled)`, and `medusa()` has untrained ones.
        tree: None for a chain of each head's best token; else the nodes as paths of ranks, every node after its parent, such as
            ``((0,), (1,), (0, 0))``: the first head's two best tokens, and the second's best after the better one.
        init: of untrained heads: "tie", "copy" or "random", see `MedusaHeads.start`.
        n_heads: of untrained heads.

    Raises:
        ValueError: a tree with a node whose parent does not come before it, an unknown ``init``, or no heads.
    """

    bare: ClassVar[dict[str, str]] = {"heads": "bundled"}
    example = "medusa(n_heads=3, init=random)"

    heads: str | Path | MedusaHeads | None = None
    tree: tuple[tuple[int, ...], ...] | None = None
    init: Init = "tie"
    n_heads: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.heads, Path):
            object.__setattr__(self, "heads", str(self.heads))
        if self.init not in ("tie", "copy", "random"):
            raise ValueError(f"init={self.init!r} starts no heads: use 'tie', 'copy' or 'random'")
        if self.n_heads < 1:
            raise ValueError(f"n_heads={self.n_heads}: give at least one head")
        if self.tree is not None:
            nodes = [tuple(path) for path in self.tree]
            for index, path in enumerate(nodes):
                if not path or min(path) < 0 or path in nodes[:index] or (len(path) > 1 and path[:-1] not in nodes[:index]):
                    raise ValueError(f"the tree's node {path} has no parent before it, is there twice, or has no rank: see Medusa")
            if not nodes:
                raise ValueError("the tree has no node: give paths of ranks, such as ((0,), (1,), (0, 0)), or None for a chain")
            object.__setattr__(self, "tree", tuple(nodes))

    def check(self, target: Target) -> None:
        """Refuse a model that the heads were not trained for, and a tree that is deeper than there are heads."""
        TrainedFor.of(target.model)
        heads = self._heads(target.model)
        heads.check_fits(target.model)
        if self.tree is not None and max(map(len, self.tree)) > heads.options["n_heads"]:
            raise PatchError(f"the tree is {max(map(len, self.tree))} deep, and there are {heads.options['n_heads']} heads: cut the tree")

    def prepared(self, target: Target) -> Drafter:
        """Return the drafter with its heads loaded or made, on the model's device and in its precision."""
        return dataclasses.replace(self, heads=self._heads(target.model))

    def outdated(self, model: Any, adapters: bool) -> str | None:
        return self.heads.outdated(model, adapters) if isinstance(self.heads, MedusaHeads) else None

    def begin(self, model: Any, state: State) -> Session:
        """Return a session for one call of generate of ``model``."""
        return _MedusaSession(self._heads(model), model.get_output_embeddings(), self.tree)

    def _heads(self, model: Any) -> MedusaHeads:
        if self.heads is None:
            return MedusaHeads.start(model, self.n_heads, self.init)
        return heads_for(model, self.heads, MedusaHeads)


class _MedusaSession(Session):
    wants_hidden = True

    def __init__(self, heads: MedusaHeads, lm_head: Any, tree: tuple[tuple[int, ...], ...] | None):
        self.heads, self.lm_head, self.tree = heads, lm_head, tree
        self.hidden: torch.Tensor | None = None  # [R, D], at the last token that was fed

    @torch.no_grad()
    def propose(self, state: State, k: int) -> Proposal | None:
        if self.hidden is None:
            return None
        logits = self.heads.logits(self.hidden, self.lm_head)
        if self.tree is not None:
            nodes = self.tree[:k]
            best = logits.topk(1 + max(max(path) for path in nodes), dim=-1).indices
            tokens = torch.stack([best[:, len(path) - 1, path[-1]] for path in nodes], 1)
            parents = tuple(nodes.index(path[:-1]) if len(path) > 1 else -1 for path in nodes)
            return Proposal(tokens, [len(nodes)] * state.rows, parents=parents)
        logits = logits[:, :k]
        counts = [logits.shape[1]] * state.rows
        if state.greedy and state.likeliest is None:
            return Proposal(logits.argmax(-1), counts)
        draws = Draws(state)
        for i in range(logits.shape[1]):
            draws.draw(logits[:, i])
        return Proposal(draws.tokens, counts, draws.probabilities)

    @torch.no_grad()
    def observe(self, hidden: torch.Tensor, counts: list[int]) -> None:
        if len(counts) == 1:
            self.hidden = hidden[:, counts[0] - 1]
        else:
            self.hidden = hidden[torch.arange(len(counts), device=hidden.device), torch.tensor(counts, device=hidden.device) - 1]

    def select_rows(self, rows: list[int]) -> None:
        if self.hidden is not None:
            self.hidden = self.hidden[rows]

    def join(self, other: Any) -> None:
        if self.hidden is not None and other.hidden is not None:
            self.hidden = torch.cat([self.hidden, other.hidden])
