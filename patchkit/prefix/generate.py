"""The prompt of transformers' own `generate`: found in the store or fed block by block, once for each different row."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat
from patchkit.handle import refresh_patches
from patchkit.prefix.shared import Lookups, Prefixes
from patchkit.prefix.snapshot import can_join, copied, joined, repeat_rows

# Arguments of a forward that a prompt of token ids may have.
_PLAIN = {"attention_mask", "position_ids", "cache_position", _compat.CACHE, "use_cache", "logits_to_keep"}
_BY_ROW = ("attention_mask", "position_ids")


def prefill(
    model: Any, prefixes: Prefixes, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Replace `stock_prefill`: put what is kept into the cache, feed the other blocks, and let it feed the rest, once for equal rows."""
    refresh_patches(model)
    reason = _obstacle(prefixes, input_ids, generation_config, model_kwargs)
    if reason is not None:
        prefixes.leave_alone(reason)
        return _compat.stock_prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)
    rows, order = distinct(input_ids)
    cache = model_kwargs[_compat.CACHE]
    _fill(model, prefixes, input_ids[rows].tolist(), cache)
    repeats = len(order) - len(rows)
    if repeats:
        prefixes.hits["repeated rows"] += repeats
        by_row = {name: model_kwargs[name] for name in _BY_ROW if model_kwargs.get(name) is not None}
        model_kwargs = model_kwargs | {name: value[rows] for name, value in by_row.items() if len(value) == len(order)}
    size, generation_config.prefill_chunk_size = generation_config.prefill_chunk_size, None  # the rest is less than a chunk
    try:
        outputs = _compat.stock_prefill(model, input_ids[rows] if repeats else input_ids, generation_config, model_kwargs, *args, **kwargs)
    finally:
        generation_config.prefill_chunk_size = size
    if repeats:
        repeat_rows(cache, order)
        outputs.logits = outputs.logits[order]
    return outputs


def _fill(model: Any, prefixes: Prefixes, prompts: list[list[int]], cache: Any) -> None:
    """Fill an empty cache with prompts of equal lengths, one for each row, up to their last border."""
    lookups = prefixes.lookups(cache)
    caches = [cache, *(copied(cache) for _ in prompts[1:])] if prefixes.last_border(len(prompts[0])) else [cache] * len(prompts)
    fed = [_feed(model, lookups, ids, own) for ids, own in zip(prompts, caches, strict=True)]
    if fed[0]:
        joined(caches)


def distinct(input_ids: torch.Tensor) -> tuple[list[int], list[int]]:
    """Return the first row of each different prompt in [B, L], and for all B rows the number of their prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    order = [numbers.setdefault(tuple(ids), len(numbers)) for ids in input_ids.tolist()]
    return [order.index(number) for number in range(len(numbers))], order


@torch.no_grad()
def _feed(model: Any, lookups: Lookups, ids: list[int], cache: Any) -> int:
    """Fill an empty cache of one row up to the last border, and keep what is new. Returns the number of tokens in it."""
    prompt = lookups.begin(ids, cache)
    prompt.thaw(cache)
    names, device, fed = _compat.argument_names(model), model.device, prompt.past
    while (border := prompt.border(fed)) is not None:
        given: dict[str, Any] = {"input_ids": torch.tensor([ids[fed:border]], device=device), _compat.CACHE: cache, "use_cache": True}
        if "attention_mask" in names:
            given["attention_mask"] = torch.ones(1, border, dtype=torch.int64, device=device)
        if "position_ids" in names:
            given["position_ids"] = torch.arange(fed, border, device=device)[None]
        if "logits_to_keep" in names:
            given["logits_to_keep"] = 1
        model(**given)
        fed = border
        prompt.freeze(cache, fed)
    return fed


def _obstacle(prefixes: Prefixes, input_ids: torch.Tensor, config: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why a prompt is left to transformers; None if it is not."""
    if model_kwargs.get("inputs_embeds") is not None or input_ids.ndim != 2 or not input_ids.shape[1]:
        return "a prompt of embeddings"
    asked = [name for name, value in model_kwargs.items() if value is not None and name not in _PLAIN]
    if asked:
        return f"arguments of the model itself ({', '.join(asked)})"
    if model_kwargs.get("use_cache") is False:
        return "generation without a cache"
    if config.is_assistant:
        return "the assistant of another model"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "output_attentions and output_hidden_states, which want all of the prompt fed"
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is None and _compat.mask_length(config, -1) != input_ids.shape[1]:
        return "a prompt without an attention_mask"
    if mask is not None and (mask.shape != input_ids.shape or not bool(mask.all())):
        return "a batch with padding"
    if positions is not None and not bool((positions == torch.arange(input_ids.shape[1], device=positions.device)).all()):
        return "position_ids of one's own"
    cache = model_kwargs.get(_compat.CACHE)
    reason = prefixes.obstacle(input_ids.shape[1], cache, config.prefill_chunk_size)
    if reason is None and not can_join(cache) and len(distinct(input_ids)[0]) > 1:
        return "different prompts in one batch of this kind of cache"
    return reason
