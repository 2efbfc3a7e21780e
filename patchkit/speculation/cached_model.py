"""A causal language model and the cache of one batch, with rollback of fed tokens.

Shapes: R rows, T tokens of a forward, S slots of the cache, V vocabulary.

1. Rows advance by different numbers of tokens where the cache is a `RaggedCache` and attention goes through transformers' interface, so
   that each row can have its own mask (`patchkit.speculation.row_masks`).
2. Elsewhere (streaming windows, recurrent states, a model's own attention) all rows advance by the same number, the least of any row;
   tokens that other rows accepted beyond it are verified again.
3. A recurrent state cannot be cropped. A snapshot is taken before each verification; if only some drafts are accepted, it is restored and
   they are fed again (`patchkit.speculation.rollback`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch

from patchkit import _compat
from patchkit.attention import masks_from
from patchkit.errors import StreamError
from patchkit.speculation.ragged_cache import RaggedCache
from patchkit.speculation.rollback import rollback_of, snapshot_of
from patchkit.speculation.row_masks import row_mask, slot_positions, takes_any_mask
from patchkit.static_step import FixedCache


class CachedModel:
    """A model with its cache.

    Attributes:
        cache: None before the first forward of a model that makes its own.
        fed: number of tokens of each row in the cache, padding included.
        pads: left padding of each row, in tokens.
        ragged: rows may advance by different numbers of tokens, and trees may be verified.
        positions: number of positions in the model's table; None for a model without one.
    """

    def __init__(self, model: Any, cache: Any, pads: list[int], ragged: bool, fed: int = 0) -> None:
        self.model = model
        self.cache = cache
        self.pads = list(pads)
        self.fed = [fed] * len(pads)
        self.configs, self._arguments = _compat.attention_configs(model), _compat.argument_names(model)
        self.ragged = ragged and isinstance(cache, RaggedCache) and takes_any_mask(self.configs)
        self.positions = table_of_positions(model)
        self._rollback: str | None = None  # `rollback_of` the cache, once the prompt is in it
        self._snapshots: list[dict[str, Any]] = []  # of the layers, before the forward that may be rolled back
        self._pending: list[torch.Tensor] = []  # tokens fed since the last `keep`

    @property
    def pending(self) -> int:
        """Tokens fed since the last `keep`."""
        return sum(tokens.shape[1] for tokens in self._pending)

    @property
    def aligned(self) -> bool:
        """Whether all rows have to advance by the same number of tokens."""
        return not self.ragged and len(self.fed) > 1

    def forward(
        self, tokens: torch.Tensor, only_last: bool = False, depths: torch.Tensor | None = None, ancestors: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Feed T tokens to every row. `keep` or `keep_path` must follow, with the tokens that are accepted.

        Args:
            tokens: [R, T] int64.
            only_last: compute logits of the last token only, where the model can leave the others out.
            depths: [R or 1, T] int64, of trees, the distance of each node from the first; None for chains.
            ancestors: [R or 1, T, T] bool, of trees, whether node j is on node i's path, itself included; None for chains.

        Returns:
            Logits [R, T or 1, V].
        """
        rows, count = tokens.shape
        kwargs: dict[str, Any] = {"input_ids": tokens, _compat.CACHE: self.cache, "use_cache": True}
        uneven = len(set(self.fed)) > 1
        device = tokens.device
        offsets = torch.arange(count, device=device) if depths is None else depths
        pending = self.pending
        first = torch.tensor(self.fed, device=device)[:, None] if uneven else torch.full((rows, 1), self.fed[0], device=device)
        first = first + pending
        positions = first + offsets
        if "position_ids" in self._arguments:
            kwargs["position_ids"] = (
                (positions - torch.tensor(self.pads, device=device)[:, None]).clamp_(min=0) if any(self.pads) else positions
            )
        if only_last and "logits_to_keep" in self._arguments:
            kwargs["logits_to_keep"] = 1
        if self._rollback == "replay" and not pending:
            self._snapshots = [snapshot_of(layer) for layer in self.cache.layers]
        self._pending.append(tokens)
        if uneven or ancestors is not None:
            slots = torch.arange(max(self.fed) + pending + count, device=device)
            pads = torch.tensor(self.pads, device=device) if any(self.pads) else None
            builder = functools.partial(row_mask, positions, *slot_positions(slots, first, offsets, ancestors), pads)
            self.cache.verifying = False  # compiled code makes its own masks
            try:
                with masks_from(self.configs, builder):
                    logits = self.model(**kwargs).logits
            finally:
                self.cache.verifying = True
            if uneven:
                self.cache.advance_offsets(count)
            return logits
        if any(self.pads):
            kwargs["attention_mask"] = (
                torch.arange(self.fed[0] + pending + count, device=device)[None] >= torch.tensor(self.pads, device=device)[:, None]
            ).long()
        # Later chunks of a prompt: transformers masks them, and then copies all keys for every head that shares them. Bits are the same.
        in_chunks = self.ragged and self._rollback is None and count > 1 and self.fed[0] + pending > 0
        with masks_from(self.configs, None) if in_chunks else contextlib.nullcontext():
            output = self.model(**kwargs)
        if self.cache is None:
            self.cache = _compat.cache_of(output)
        return output.logits

    def keep(self, counts: list[int]) -> None:
        """Accept the first ``counts[r]`` tokens of row r since the last `keep`, roll back the others; `aligned` rows need equal counts."""
        count, fed = self.pending, self._pending
        self._pending = []
        if isinstance(self.cache, RaggedCache):
            self.cache.keep(count, counts)
        elif self._rollback == "crop":  # also if all are accepted, because here layers drop old keys
            self.cache.crop(counts[0] - count)
        elif counts[0] < count:
            assert self._rollback == "replay"
            for layer, snapshot in zip(self.cache.layers, self._snapshots, strict=True):
                vars(layer).update(snapshot)
            if counts[0]:
                self.forward(torch.cat(fed, 1)[:, : counts[0]], only_last=True)
                self._pending = []
        self.fed = [before + count for before, count in zip(self.fed, counts, strict=True)]

    def keep_path(self, paths: list[list[int]]) -> None:
        """Accept the nodes ``paths[r]`` of row r, from the first on, of the last forward's tree, and roll back the others."""
        assert isinstance(self.cache, RaggedCache)
        for row, path in enumerate(paths):
            if path != list(range(len(path))):
                source = torch.tensor(path, device=self.cache.layers[0].keys.device) + self.fed[row]
                self.cache.move(row, source, self.fed[row])
        self.keep([len(path) for path in paths])

    def record(self) -> None:
        """Record the past from now on, so that tokens can be rolled back. Call it after the prompt, which is never rolled back.

        Raises:
            StreamError: the cache cannot roll back.
        """
        self._rollback = rollback_of(self.cache)
        if self._rollback is None:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in getattr(self.cache, "layers", [])})) or "its own"
            raise StreamError(
                f"a {type(self.cache).__name__} with layers of type {kinds} cannot roll tokens back, which speculation needs: leave "
                f"{_compat.CACHE} and cache_implementation out, or unpatch speculative"
            )
        if self._rollback == "crop":
            self.cache.activate_past_recording()
            if isinstance(self.cache, RaggedCache):
                self.cache.verifying = True

    def feed_prompts(self, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Feed prompts of different lengths in one forward, and keep them; nothing was fed before.

        The filler after a prompt is rolled back. No token of the prompt sees it, because tokens see none that come after them.

        Args:
            tokens: [R, T] int64; of row r the first ``lengths[r]`` are the prompt.

        Returns:
            Logits [R, 1, V] after the last token of each prompt.
        """
        ends = torch.tensor(lengths, device=tokens.device) - 1
        wanted, number = ends.unique(return_inverse=True)
        kwargs: dict[str, Any] = {"input_ids": tokens, _compat.CACHE: self.cache, "use_cache": True}
        if "position_ids" in self._arguments:
            kwargs["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        if "logits_to_keep" in self._arguments:
            kwargs["logits_to_keep"] = wanted
        logits = self.model(**kwargs).logits
        if logits.shape[1] == len(wanted):
            ends = number
        self.cache.keep(tokens.shape[1], lengths)
        self.fed = list(lengths)
        return logits[torch.arange(len(lengths), device=tokens.device), ends][:, None]

    @property
    def is_unfed(self) -> bool:
        """Whether `gather` can be called: nothing was fed, no row is padded, and rows may advance by different numbers of tokens."""
        return self.ragged and not any(self.fed + self.pads)

    def gather(self, other: CachedModel) -> None:
        """Have the rows of another cache of the same model too, for `feed_prompts`."""
        if other.cache.room > self.cache.room:
            self.cache = other.cache
        self.fed, self.pads = self.fed + other.fed, self.pads + other.pads

    def joins(self, other: CachedModel) -> bool:
        """Whether `join` can be called: both have been fed, and let rows advance by different numbers of tokens."""
        return self.ragged and other.ragged and self._rollback == other._rollback == "crop"

    def padding(self, lengths: list[int]) -> int:
        """Bytes of the slots without a token, of which every round reads all, if rows of these lengths joined those of a `RaggedCache`."""
        every = self.fed + lengths
        return (len(every) * max(every) - sum(every)) * int(self.cache.slot_bytes)

    def join(self, other: CachedModel) -> None:
        """Go on with the rows of another cache of the same model too, after one's own."""
        self.cache.adopt(other.cache)
        self.fed, self.pads = self.fed + other.fed, self.pads + other.pads

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        if isinstance(self.cache, RaggedCache):
            self.cache.keep_rows(rows)
        elif self.cache is not None:
            self.cache.reorder_cache(torch.tensor(rows, device=self.model.device))  # batch_select_indices is not on all layers
        self.fed = [self.fed[row] for row in rows]
        self.pads = [self.pads[row] for row in rows]


def table_of_positions(model: Any) -> int | None:
    """Number of positions that a model has embeddings for; None if positions are rotary, which do not end."""
    config = model.config.get_text_config(decoder=True)
    return None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)


def make_cache(model: Any, tokens: int = 1, compiled: bool = True) -> Any:
    """Make a cache for ``model``: a `RaggedCache` with room for ``tokens`` if all layers hold keys and values only, else transformers'.

    Args:
        compiled: steps may be compiled, so that there should be few different rooms.
    """
    stock = _compat.DynamicCache(config=model.config)
    plain = {_compat.DynamicLayer, _compat.DynamicSlidingWindowLayer}
    if stock.layers and {type(layer) for layer in stock.layers} <= plain:
        return RaggedCache(len(stock.layers), tokens, compiled)
    return stock


def keeps_own_cache(model: Any) -> bool:
    """Whether a patch of ``model`` makes its own kind of cache (a streaming window, say), which `make_cache` cannot."""
    with torch.no_grad():
        made = _compat.cache_of(model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True))
    return type(made) not in (_compat.DynamicCache, FixedCache)
