"""Loss of draft heads against the model's own distribution, and how often drafts are its choice."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from patchkit.anatomy.layers import decoder_layers
from patchkit.speculation.heads import EagleHead, Heads, MedusaHeads

_FEATURE_WEIGHT = 0.5  # weight of the smooth L1 distance between EAGLE's features and the model's, relative to the cross-entropy


_LATER = 0.8  # factor on the weight of each head that drafts one token further, as in Medusa


def loss_of(
    heads: Heads, model: Any, tokens: torch.Tensor, hidden: torch.Tensor, depth: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Training loss of draft heads, and which drafted tokens are the model's choice.

    Args:
        tokens: sequences [B, T].
        hidden: the model's last hidden states [B, T, D], with the outputs behind them that `hidden_states` gives for the heads' layers.
        depth: tokens per draft.
        positions: [n], all below T - depth, after which drafts begin.

    Returns:
        The loss, and [depth, B, n] bool: whether each drafted token is the model's most likely one.
    """
    head = model.get_output_embeddings()
    if isinstance(heads, EagleHead):
        embedded = model.get_input_embeddings()(tokens[:, 1:]).float()
        features = heads.unrolled(embedded, heads.features(hidden[:, :-1].float()), depth)
        hidden = hidden[..., : heads.options["hidden_size"]]
        drafts = [features[j][:, positions + j] for j in range(depth)]
        if heads.layers:  # EAGLE-3 does not ask that features be the model's own
            distances = [hidden.new_zeros(())] * depth
        else:
            distances = [F.smooth_l1_loss(features[j][:, j:], hidden[:, j + 1 :].float()) for j in range(depth)]
    else:
        assert isinstance(heads, MedusaHeads)
        drafts = list(heads(hidden[:, positions].float()).unbind(-2))[:depth]
        distances = [hidden.new_zeros(())] * depth
    losses, agrees = [], []
    for j, draft in enumerate(drafts):
        with torch.no_grad():
            logits = head(hidden[:, positions + j + 1]).float()
            choice = logits.argmax(-1)
            wanted = 0.5 * logits.softmax(-1)
            wanted.scatter_add_(-1, choice[..., None], wanted.new_full((*choice.shape, 1), 0.5))
        drafted = head(draft.to(head.weight.dtype)).float()
        losses.append(F.cross_entropy(drafted.flatten(0, 1), wanted.flatten(0, 1)) + _FEATURE_WEIGHT * distances[j])
        agrees.append(drafted.argmax(-1) == choice)
    weights = [_LATER**j for j in range(depth)]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights), torch.stack(agrees)


def layers_of(heads: Heads) -> tuple[int, ...]:
    """Decoder layers whose outputs the heads read."""
    return heads.layers if isinstance(heads, EagleHead) else ()


def accepted_by_position(agrees: torch.Tensor) -> torch.Tensor:
    """Share of drafts [depth] whose first 1, 2, ... tokens are all the model's choice, from ``agrees`` [depth, ...]."""
    return agrees.int().cumprod(0).flatten(1).float().mean(1).cpu()


@torch.no_grad()
def agreement(heads: Heads, model: Any, texts: torch.Tensor, depth: int, first: int = 0) -> torch.Tensor:
    """Which drafted tokens are the model's choice, for drafts that begin after each position from ``first`` on in texts [N, T].

    Returns:
        [depth, N, n] bool, with n = T - depth - 1 - first.
    """
    agrees = []
    for batch in texts.long().to(model.device).split(16):
        positions = torch.arange(first, batch.shape[1] - depth - 1, device=model.device)
        agrees.append(loss_of(heads, model, batch, hidden_states(model, batch, layers_of(heads)), depth, positions)[1])
    return torch.cat(agrees, 1)


@torch.no_grad()
def hidden_states(model: Any, tokens: torch.Tensor, layers: Sequence[int] = ()) -> torch.Tensor:
    """Inputs of the LM head for sequences [B, T], and the outputs of decoder layers behind them: [B, T, (1 + len(layers)) D]."""
    seen: list[torch.Tensor] = []
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int, layer: Any, args: Any, output: Any) -> None:
        outputs[index] = output[0] if isinstance(output, tuple) else output

    hooks = [model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))]
    if layers:
        modules = decoder_layers(model)
        hooks += [modules[index].register_forward_hook(functools.partial(keep, index)) for index in layers]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([seen[0], *(outputs[index] for index in layers)], -1) if layers else seen[0]
