"""The test whether a model can be fed in blocks: it is run on a few tokens, not known by name."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat
from patchkit.tolerance import TOLERANCES, logit_error
from patchkit.views import evaluating

# Tokens of the probe, and of one of its blocks.
_TOKENS, _BLOCK = 12, 4


def find_obstacle_to_blocks(model: Any) -> str | None:
    """Feed a short sequence as a whole and in blocks, and compare the logits of its last block. None if there is no obstacle."""
    if not _compat.supports_dynamic_cache(model):
        return "it has a cache class of its own"
    if _compat.has_states_only(_compat.DynamicCache(config=model.config.get_text_config(decoder=True))):
        return "it keeps recurrent states only, of which generate cannot tell how many tokens they hold"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(_TOKENS, device=model.device)[None] * 7 + 3) % vocabulary
    with evaluating(model), torch.no_grad():
        try:
            whole = model(input_ids=ids, use_cache=True).logits[:, -_BLOCK:]
            cache = None
            for start in range(0, _TOKENS, _BLOCK):
                given: dict[str, Any] = {} if cache is None else {_compat.CACHE: cache}
                out = model(input_ids=ids[:, start : start + _BLOCK], use_cache=True, **given)
                cache = _compat.cache_of(out)
        except Exception as error:
            return f"it failed when it was fed in blocks ({type(error).__name__}: {error})"
        if cache is None:
            return "it returned no cache"
    found = logit_error(out.logits, whole)
    return None if found <= TOLERANCES[model.dtype].logits else f"fed in blocks it gives other logits than fed as a whole (by {found:.2g})"
