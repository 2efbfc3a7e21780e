"""Log probabilities of texts under a patched model."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat
from patchkit.views import evaluating


@torch.no_grad()
def logprobs(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, new: int | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Return the log probability of each token under the model with its patches, whatever mode the model is in.

    A trainer scores texts under the weights that it trains, without patches. The difference to this is the logarithm of the importance
    weight that a text has which was generated under a lossy patch: ``(own - logprobs(model, ids, mask, new=n)).exp()``.

    Args:
        model: patched or not; in PEFT's wrapper or not.
        input_ids: [B, T] int64.
        attention_mask: [B, T], 0 for padding on the left or right; None for none.
        new: score the last ``new`` tokens only; None for all but the first, which follows nothing.
        temperature: that the texts were drawn at.

    Returns:
        [B, new] float32; 0 for padding.

    Raises:
        ValueError: no token to score, or a temperature that is not above 0.
    """
    new = input_ids.shape[1] - 1 if new is None else new
    if not 1 <= new < input_ids.shape[1]:
        raise ValueError(f"new={new}: give 1 to {input_ids.shape[1] - 1} of {input_ids.shape[1]} tokens")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: give a number above 0")
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    names = _compat.argument_names(base)
    given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
        if "position_ids" in names:
            given["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in names:
        given["logits_to_keep"] = new + 1
    with evaluating(base):
        logits = base(**given).logits[:, -(new + 1) : -1].float() / temperature
    targets = input_ids[:, -new:, None]
    found = logits.gather(-1, targets)[..., 0] - logits.logsumexp(-1)
    return found if attention_mask is None else found.masked_fill(attention_mask[:, -new:] == 0, 0)
