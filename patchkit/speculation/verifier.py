"""Verification: one forward of the target over all drafts of a round, and the rollback of the cache after it.

Shapes: R rows, T = 1 + n positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch

from patchkit.speculation.cached_model import CachedModel
from patchkit.speculation.drafter import Proposal, Session
from patchkit.speculation.judge import Verdict
from patchkit.speculation.ragged_cache import VERIFIED_LENGTHS, RaggedCache
from patchkit.speculation.rows import Rows
from patchkit.speculation.tree import tree_shape


def verify(cached: CachedModel, rows: Rows, proposal: Proposal | None, compiled: bool) -> torch.Tensor:
    """Run the target; return logits [R, 1 + n, V] after the last known token and after each of n drafts.

    Args:
        compiled: forwards of `VERIFIED_LENGTHS` tokens are compiled steps, so chains are padded to one of these lengths.
    """
    last = rows.last()
    if proposal is None:
        return cached.forward(last)
    tokens = torch.cat([last, proposal.tokens], 1)
    if proposal.parents is not None:
        depths, ancestors = tree_shape(proposal, tokens.device)
        return cached.forward(tokens, depths=depths, ancestors=ancestors)
    width = tokens.shape[1]
    if compiled and isinstance(cached.cache, RaggedCache):
        rounded = min((length for length in VERIFIED_LENGTHS if length >= width), default=width)
        least = min(row.stops.room(fed) for row, fed in zip(rows.rows, cached.fed, strict=True))
        if least >= rounded:  # otherwise there may be no positions beyond
            tokens = torch.nn.functional.pad(tokens, (0, rounded - width))
    return cached.forward(tokens)[:, :width]


def show_logits(session: Session, rows: Rows, proposal: Proposal | None, logits: torch.Tensor) -> None:
    """Show a session that wants them the logits [R, 1 + n, V] of a verification, before its verdict moves the ends of the rows."""
    if session.wants_logits:
        tokens = rows.last() if proposal is None else torch.cat([rows.last(), proposal.tokens], 1)
        session.observe_logits(tokens, logits, [1] * len(tokens) if proposal is None else [1 + count for count in proposal.counts])


def in_step(verdict: Verdict, rows: Rows) -> Verdict:
    """Cut a verdict to the smallest number of tokens of any row, for caches whose rows advance by the same number."""
    pairs = list(zip(verdict.tokens, rows.rows, strict=True))
    least = min((len(new) for new, row in pairs if row.finish is None), default=max(map(len, verdict.tokens)))
    for new, row in pairs:
        if len(new) > least:  # a row that ended beyond that is rolled back too: to keep drawn ends would make ends likelier than they are
            row.finish = None
    return Verdict(
        [new[:least] for new in verdict.tokens],
        [(path + path[-1:] * least)[:least] for path in verdict.paths],
        [min(count, least - 1) for count in verdict.accepted],
    )


def keep_accepted(cached: CachedModel, proposal: Proposal | None, verdict: Verdict) -> None:
    """Roll the cache back to the accepted drafts."""
    if proposal is not None and proposal.parents is not None:
        cached.keep_path(verdict.paths)
    elif cached.aligned:
        cached.keep([max(map(len, verdict.tokens))] * len(verdict.tokens))
    else:
        cached.keep([len(path) for path in verdict.paths])


def accepted_hidden(hidden: torch.Tensor, proposal: Proposal | None, paths: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    """Return hidden states [R, T, D] of a verification, reordered so that accepted nodes come first, and their number in each row."""
    counts = [len(path) for path in paths]
    if proposal is None or proposal.parents is None:
        return hidden, counts
    longest = max(counts)
    index = torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths], device=hidden.device)
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1])), counts


def near_ties(logits: torch.Tensor, paths: list[list[int]]) -> int:
    """Number of nodes, among ``paths[row]`` of logits [R, T, V], whose two best logits are closer than one step of their dtype."""
    best = logits.float().topk(2, -1).values
    close = (best[..., 0] - best[..., 1]) <= torch.finfo(logits.dtype).eps * best[..., 0].abs()
    return sum(int(close[row, path].sum()) for row, path in enumerate(paths))
