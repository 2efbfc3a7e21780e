"""Calls of `generate` that the loop does not serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from patchkit import _compat
from patchkit.speculation.rollback import rollback_of
from patchkit.speculation.stops import KNOWN_CRITERIA, is_by_row

# Arguments of a forward that the loop supplies. A call with any other falls back to the stock method.
_OURS = {"attention_mask", "position_ids", _compat.CACHE, "use_cache", "logits_to_keep"}


class Unserved(Exception):
    """The loop cannot serve this call of generate, for the reason in the message. Raised before anything is computed."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of generate; `speculate` describes them."""

    model: Any
    input_ids: torch.Tensor
    processors: Any
    criteria: Any
    config: Any
    model_kwargs: dict[str, Any]
    own_cache: bool


def refuse_call(call: Call, has_streamer: bool) -> None:
    """Raise `Unserved` for a call that the loop cannot serve."""
    input_ids, config, model_kwargs = call.input_ids, call.config, call.model_kwargs
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise Unserved(mode.replace("_", " "))
    if input_ids.ndim != 2 or input_ids.shape[1] == 0 or model_kwargs.get("inputs_embeds") is not None:
        raise Unserved("a prompt of embeddings")
    asked = [name for name, value in model_kwargs.items() if value is not None and name not in _OURS]
    if asked:
        raise Unserved(f"arguments of the model itself ({', '.join(asked)})")
    cache = model_kwargs.get(_compat.CACHE)
    if model_kwargs.get("use_cache") is False or cache is None:
        raise Unserved("generation without a cache")
    if not call.own_cache and rollback_of(cache) is None:
        raise Unserved(f"a {type(cache).__name__}, which cannot roll tokens back")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise Unserved(f"cache_implementation={config.cache_implementation!r}")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise Unserved("output_attentions and output_hidden_states")
    if any(type(each).__name__.startswith("UnbatchedClassifierFreeGuidance") for each in call.processors):
        raise Unserved("classifier-free guidance")
    limit = _compat.rope_switch(call.model.config.get_text_config(decoder=True))
    if limit is not None and (config.max_length or limit) >= limit:
        raise Unserved(f"texts that may pass the {limit} positions at which this model changes all its rotary frequencies")
    if len(input_ids) > 1:
        if has_streamer:
            raise Unserved("a streamer on a batch")
        if not call.own_cache:
            raise Unserved(f"{_compat.CACHE} on a batch, whose rows leave when they end")
        unknown = [type(each).__name__ for each in call.processors if not is_by_row(each)]
        unknown += [type(each).__name__ for each in call.criteria if type(each).__name__ not in KNOWN_CRITERIA]
        if unknown:
            raise Unserved(f"{', '.join(unknown)} on a batch, which may hold state for each row")
        kinds = {type(each).__name__ for each in call.criteria}
        if "EosTokenCriteria" not in kinds and kinds - {"MaxLengthCriteria"}:
            # There the stock method goes on with rows that have stopped, until all have.
            raise Unserved(f"{', '.join(sorted(kinds - {'MaxLengthCriteria'}))} on a batch without an EOS token")
    past, mask = cache.get_seq_length(), model_kwargs.get("attention_mask")
    length = mask.shape[1] if mask is not None else _compat.mask_length(config, input_ids.shape[1])
    if past and (length != input_ids.shape[1] or past >= length):
        raise Unserved("a prompt that leaves out what the cache holds")
    if mask is not None:
        real = mask.bool()
        if not bool(real[:, -1].all()) or bool((real.int().diff(dim=1) < 0).any()):
            raise Unserved("an attention_mask with zeros elsewhere than on the left")
