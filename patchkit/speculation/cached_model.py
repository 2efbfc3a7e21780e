"""A causal language model and the cache of one batch, fed with tokens that it may take back.

Shapes: R rows, T tokens of a forward, S slots of the cache, V vocabulary.

Rows advance by their own numbers of tokens where the cache is a `RaggedCache` and the attention goes through transformers'
interface, so that masks can be made per row. Elsewhere (streaming windows, recurrent states, attention of the model's own) all
rows advance by the same number: the least of any row; what was accepted beyond it is verified again.

A recurrent state cannot be cropped. Before every forward it is copied; when only some of the tokens stand, the copy is put back
and those are fed once more.

`find_obstacle` decides what a model can do by running it, not by its name.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from patchkit import _compat
from patchkit.attention import has_own_mask, masks_from, original_name
from patchkit.errors import StreamError
from patchkit.speculation.ragged_cache import RaggedCache
from patchkit.static_step import FixedCache
from patchkit.tolerance import TOLERANCES, logit_error
from patchkit.views import evaluating

# Attention implementations that take a mask of any form.
_MASKABLE = ("eager", "sdpa")


class CachedModel:
    """A model with its cache.

    Attributes:
        cache: None before the first forward of a model that makes its own.
        fed: tokens of each row in the cache, padding included.
        pads: left padding of each row.
        ragged: rows may advance by different numbers of tokens, and trees may be verified.
    """

    def __init__(self, model: Any, cache: Any, pads: list[int], ragged: bool, fed: int = 0) -> None:
        self.model = model
        self.cache = cache
        self.pads = list(pads)
        self.fed = [fed] * len(pads)
        self.configs, self._arguments = _compat.attention_configs(model), _compat.argument_names(model)
        self.ragged = ragged and isinstance(cache, RaggedCache) and takes_any_mask(self.configs)
        self._rollback: str | None = None  # how tokens are taken back once the prompt is in: "crop" or "replay"
        self._saved: list[dict[str, Any]] = []
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
        """Feed T tokens [R, T] to every row; `keep` or `keep_path` says later which of them stand.

        Args:
            tokens: int64.
            only_last: logits of the last token only, where the model can leave the others out.
            depths, ancestors: of a tree, [T] int64 distance of each node to the first, and [T, T] bool whether node j is on node i's
                path, itself included.

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
        places = first + offsets
        if "position_ids" in self._arguments:
            kwargs["position_ids"] = (places - torch.tensor(self.pads, device=device)[:, None]).clamp_(min=0) if any(self.pads) else places
        if only_last and "logits_to_keep" in self._arguments:
            kwargs["logits_to_keep"] = 1
        if self._rollback == "replay" and not pending:
            self._saved = [_state_of(layer) for layer in self.cache.layers]
        self._pending.append(tokens)
        if uneven or ancestors is not None:
            slots = torch.arange(max(self.fed) + pending + count, device=device)
            pads = torch.tensor(self.pads, device=device) if any(self.pads) else None
            builder = functools.partial(_row_mask, places, *_slot_places(slots, first, offsets, ancestors), pads)
            self.cache.verifying = False  # compiled code makes its own masks
            try:
                with masks_from(self.configs, builder):
                    logits = self.model(**kwargs).logits
            finally:
                self.cache.verifying = True
            if uneven:
                self.cache.place(count)
            return logits
        if any(self.pads):
            kwargs["attention_mask"] = (
                torch.arange(self.fed[0] + pending + count, device=device)[None] >= torch.tensor(self.pads, device=device)[:, None]
            ).long()
        output = self.model(**kwargs)
        if self.cache is None:
            self.cache = _compat.cache_of(output)
        return output.logits

    def keep(self, counts: list[int]) -> None:
        """Of the tokens fed since the last `keep`, the first ``counts[r]`` of row r stand; in an `aligned` batch all counts are equal."""
        count, fed = self.pending, self._pending
        self._pending = []
        if isinstance(self.cache, RaggedCache):
            self.cache.keep(count, counts)
        elif self._rollback == "crop":  # layers that drop old keys do so here, so also when everything stands
            self.cache.crop(counts[0] - count)
        elif counts[0] < count:
            assert self._rollback == "replay"
            for layer, saved in zip(self.cache.layers, self._saved, strict=True):
                vars(layer).update(saved)
            if counts[0]:
                self.forward(torch.cat(fed, 1)[:, : counts[0]], only_last=True)
                self._pending = []
        self.fed = [before + count for before, count in zip(self.fed, counts, strict=True)]

    def keep_path(self, paths: list[list[int]]) -> None:
        """Of the last forward's tree, the nodes ``paths[r]`` of row r stand, from the first on."""
        assert isinstance(self.cache, RaggedCache)
        for row, path in enumerate(paths):
            if path != list(range(len(path))):
                source = torch.tensor(path, device=self.cache.layers[0].keys.device) + self.fed[row]
                self.cache.move(row, source, self.fed[row])
        self.keep([len(path) for path in paths])

    def record(self) -> None:
        """From now on, tokens may be taken back. Call it after the prompt, which is never taken back.

        Raises:
            StreamError: the cache cannot roll back.
        """
        self._rollback = rollback_of(self.cache)
        if self._rollback is None:
            kinds = ", ".join(sorted({type(layer).__name__ for layer in getattr(self.cache, "layers", [])})) or "its own"
            raise StreamError(
                f"a {type(self.cache).__name__} with layers of type {kinds} cannot take tokens back, which speculation needs: leave "
                f"{_compat.CACHE} and cache_implementation out, or unpatch speculative"
            )
        if self._rollback == "crop":
            self.cache.activate_past_recording()
            if isinstance(self.cache, RaggedCache):
                self.cache.verifying = True

    def select_rows(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        if self.cache is not None:
            self.cache.reorder_cache(torch.tensor(rows, device=self.model.device))  # batch_select_indices is not on all layers
        self.fed = [self.fed[row] for row in rows]
        self.pads = [self.pads[row] for row in rows]


def _slot_places(
    slots: torch.Tensor, first: torch.Tensor, offsets: torch.Tensor, ancestors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[R or 1, S] the place in its text of the token in each slot, and [R, T, S] which slots a tree lets its nodes see."""
    if ancestors is None:
        return slots[None], None
    count = len(offsets)
    node = slots[None] - first  # [R, S] which node of the tree is in the slot
    inside = (node >= 0) & (node < count)
    node = node.clamp(0, count - 1)
    places = torch.where(inside, first + offsets[node], slots[None])
    on_path = ancestors[:, node].transpose(0, 1)  # [R, T, S]
    return places, on_path | ~inside[:, None]


def _row_mask(
    queries: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor | None,
    pads: torch.Tensor | None,
    implementation: str,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """[R, 1, T, S] the layer's own rule between the places [R, T] of the queries and [R or 1, S] of the keys, row by row."""
    rows = torch.arange(len(queries), device=queries.device)[:, None, None, None]
    key = keys[:, None, None, :]
    origin = torch.zeros_like(rows) if pads is None else pads[:, None, None, None]  # chunks are counted from a row's first token
    mask = kwargs["mask_function"](rows, torch.zeros_like(rows), queries[:, None, :, None] - origin, key - origin)
    if seen is not None:
        mask = mask & seen[:, None]
    if pads is not None:
        mask = mask & (key >= pads[:, None, None, None])
    if implementation == "sdpa":
        return mask
    dtype = kwargs["dtype"]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def takes_any_mask(configs: list[Any]) -> bool:
    """Whether the attention implementations that these configs name take a mask of any form."""
    return all(original_name(config) in _MASKABLE and not has_own_mask(config) for config in configs)


# Cache layers whose states are copied; their keys and values are never written in place, so those are only remembered.
_REPLAYED = (_compat.DynamicLayer, _compat.LinearAttentionLayer)


def _state_of(layer: Any) -> dict[str, Any]:
    """The attributes of a cache layer, with copies of the states that forwards overwrite."""
    return {name: _copied(value) if name.endswith("_states") else value for name, value in vars(layer).items()} | {
        name: dict(value) for name, value in vars(layer).items() if name.startswith(("is_", "has_")) and isinstance(value, dict)
    }


def _copied(states: Any) -> Any:
    if isinstance(states, dict):
        return {index: _copied(state) for index, state in states.items()}
    return states.clone() if torch.is_tensor(states) else states


# -- what a model can do ---------------------------------------------------------------------------------------------------


def make_cache(model: Any, tokens: int = 1) -> Any:
    """A fresh cache for ``model``: a `RaggedCache` with room for ``tokens`` where all layers hold keys and values, else transformers'."""
    stock = _compat.DynamicCache(config=model.config)
    plain = {_compat.DynamicLayer, _compat.DynamicSlidingWindowLayer}
    if stock.layers and {type(layer) for layer in stock.layers} <= plain:
        return RaggedCache(len(stock.layers), tokens)
    return stock


def rollback_of(cache: Any) -> str | None:
    """How ``cache`` takes tokens back: by "crop", by "replay" of what stands, or None if it cannot."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    if all(map(_is_croppable, layers)):
        return "crop"
    if type(cache) is _compat.DynamicCache and all(isinstance(layer, _REPLAYED) or _is_croppable(layer) for layer in layers):
        return "replay"
    return None


def _is_croppable(layer: Any) -> bool:
    # The recurrent layers of transformers 5.15 do not say that they are not.
    return bool(getattr(layer, "is_croppable", False))


def keeps_own_cache(model: Any) -> bool:
    """Whether a patch of ``model`` makes caches of a kind of its own (a streaming window, say), which `make_cache` cannot."""
    with torch.no_grad():
        made = _compat.cache_of(model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True))
    return type(made) not in (_compat.DynamicCache, FixedCache)


def find_obstacle(model: Any, drafts: bool = False) -> tuple[str | None, bool]:
    """Feed a short text in pieces, taking tokens back in between, and compare with one token at a time.

    Args:
        drafts: the model only drafts. It may then round in another way where it is fed several tokens (int8 activations do), but what
            was taken back must not show: the comparison is with the same pieces, of which other tokens were taken back.

    Returns:
        Why nothing can be verified exactly, or None; and whether rows may advance by their own numbers of tokens.
    """
    probe = _probe_taken_back if drafts else _probe
    with evaluating(model), torch.no_grad():
        errors: dict[bool, float] = {}
        for ragged in (True, False):
            try:
                errors[ragged] = probe(model, ragged)
            except Exception as error:
                if not ragged:
                    return f"it failed when a forward of several tokens was taken back ({type(error).__name__}: {error})", False
                errors[ragged] = float("inf")
            if errors[ragged] <= TOLERANCES[model.dtype].logits:
                return None, ragged
    if drafts:
        return f"tokens that were taken back change what follows (logits by {errors[False]:.2g})", False
    return f"a forward of several tokens gives other logits than one token at a time (by {errors[False]:.2g})", False


def _probe_taken_back(model: Any, ragged: bool) -> float:
    """How far the tokens that are taken back show in the logits of what follows; rows and counts as in `_probe`."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text, pads, counts = _probe_text(model, vocabulary), [0, 2], [1, 3] if ragged else [1, 1]

    def run(wrong: int) -> torch.Tensor:
        fed = CachedModel(model, make_cache(model), pads, ragged)
        if ragged and not fed.ragged:
            return text.new_full((1,), torch.inf, dtype=torch.float32)
        fed.forward(text[:, :9])
        fed.keep([9, 9])
        fed.record()
        fed.forward((text[:, 9:13] + wrong) % vocabulary)
        fed.keep([0, 0])
        piece = text[:, 9:13].clone()
        for row, count in enumerate(counts):
            piece[row, count:] = (piece[row, count:] + wrong) % vocabulary
        fed.forward(piece)
        fed.keep(counts)
        return fed.forward(torch.stack([row[9 + count : 13 + count] for row, count in zip(text, counts, strict=True)]))

    first, second = run(1), run(2)
    return logit_error(first, second) if bool(first.isfinite().all()) else float("inf")


def _probe_text(model: Any, vocabulary: int) -> torch.Tensor:
    return (torch.arange(40, device=model.device).reshape(2, 20) * 7 + 3) % vocabulary


def _probe(model: Any, ragged: bool) -> float:
    """The largest error of logits after taking back; 2 rows, the second left-padded, that keep 1 and 3 tokens of 4, or both 1."""
    pads = [0, 2]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text = _probe_text(model, vocabulary)
    fed = CachedModel(model, make_cache(model), pads, ragged)
    if ragged and not fed.ragged:
        return float("inf")
    fed.forward(text[:, :9])
    fed.keep([9, 9])
    fed.record()
    fed.forward((text[:, 9:13] + 1) % vocabulary)  # wrong ones
    fed.keep([0, 0])
    fed.forward(text[:, 9:13])
    counts = [1, 3] if ragged else [1, 1]
    fed.keep(counts)
    got = fed.forward(torch.stack([row[9 + count : 13 + count] for row, count in zip(text, counts, strict=True)]))

    plain = CachedModel(model, _compat.DynamicCache(config=model.config), pads, ragged=False)
    steps = []
    for start, end in [(0, 9), *((i, i + 1) for i in range(9, 16))]:
        steps.append(plain.forward(text[:, start:end])[:, -1])
        plain.keep([end - start] * 2)
    wanted = torch.stack([torch.stack(steps, 1)[row, 1 + count : 5 + count] for row, count in enumerate(counts)])
    return logit_error(got, wanted)
