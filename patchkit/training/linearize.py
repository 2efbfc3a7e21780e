"""Conversion of a softmax model to hybrid attention in one call: `linearize`.

Three stages, each optional: a closed-form readout per head and a gradient fit of the feature maps (`patchkit.training.transfer`), and
low-rank recovery on the language-modelling loss (`patchkit.training.recovery`). After each, the model is scored as a user will run it:
patched, streamed through one cache. An interrupted run can be resumed, with the same result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patchkit import _compat
from patchkit.anatomy.layers import BAKED_IN
from patchkit.anatomy.target import Target
from patchkit.api import _ATTRIBUTE, _causal_lm
from patchkit.errors import PatchConflict, PatchError, UnsupportedModel
from patchkit.linear.state import LinearState
from patchkit.measure.texts import encode
from patchkit.training.conversion import Conversion, Rates
from patchkit.training.run import ConversionRun
from patchkit.views import frozen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_EVALUATED = 16384  # tokens

# Context of models without a position limit.
_CONTEXT = 2048


def linearize(
    model: Any,
    texts: Sequence[str] | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    feature_map: str = "hedgehog",
    window: int = 64,
    sinks: int = 0,
    layers: Sequence[int] | None = None,
    horizon: int | None = None,
    closed_form: bool = True,
    transfer_steps: int = 40,
    lora_steps: int = 200,
    rank: int = 8,
    distill: float = 0.5,
    keep_softmax: int = 0,
    batch: int = 4,
    length: int = 1024,
    rates: Rates | None = None,
    seed: int = 0,
    heldout: torch.Tensor | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Conversion:
    """Convert the softmax attention of a model to a softmax window over a linear memory. The model is not changed.

    Args:
        model: a causal language model of transformers, unpatched.
        texts: texts to learn on, or token ids [n].
        tokenizer: the model's tokenizer; needed for texts that are not token ids.
        feature_map: name of a map of `patchkit.linear.feature_maps`.
        window: W, last tokens that keep softmax attention.
        sinks: S, first tokens of every sequence that keep softmax attention too.
        layers: indices of the attention layers to convert; None for all with full attention.
        horizon: number of old tokens beyond which their weight grows no more; None for the model's trained context, or ``length`` if
            that is shorter.
        closed_form: whether to fit a readout per head in closed form, on 32 sequences.
        transfer_steps: steps of the gradient fit of the feature maps; 0 omits the stage.
        lora_steps: steps of the recovery; 0 omits the stage.
        rank: rank of the adapters.
        distill: share of the softmax model's own distribution in the recovery's loss, within its context; 0 for the text alone.
        keep_softmax: number of layers, those with the largest error after the transfer, that keep softmax attention.
        batch: sequences per step.
        length: tokens of each sequence in the recovery, best more than the model's context. The other stages use at most the context.
        heldout: token ids [n] to score on; None holds out the last 20th of the texts, at most 16384 tokens.
        checkpoint: a file that is written every 25 steps and after each stage; training resumes from it if it exists.
        progress: whether to show bars.

    Raises:
        UnsupportedModel: its attention cannot be converted.
        PatchConflict: it is patched.
        PatchError: options or texts that cannot be used, peft is missing, or a checkpoint of another run.
    """
    rates = rates or Rates()
    _check(batch, length, window, sinks, rank, transfer_steps, lora_steps, keep_softmax, distill)
    model = _causal_lm(model)
    if _ATTRIBUTE in vars(model):
        raise PatchConflict("this model is patched: unpatch_model first, the conversion learns from its own softmax attention")
    _compat.self_check()
    target = Target(model)
    chosen = _layers(target, feature_map, window, sinks, layers)
    if keep_softmax >= len(chosen):
        raise PatchError(f"keep_softmax={keep_softmax} of {len(chosen)} layers leaves none to convert: keep fewer")
    limit = target.position_limit or _CONTEXT
    _check_length(target, length)
    tokens, heldout = _tokens(texts, tokenizer, heldout)
    context = min(limit, max(length, window + sinks + 1))
    if any(layer.obstacle == BAKED_IN for layer in target.attention_layers):
        heldout = heldout[: limit + 1]  # learned positions end there
    if len(tokens) < max(length, context) + 1:
        raise PatchError(
            f"{len(tokens)} tokens of text are fewer than one piece of {max(length, context) + 1}: give more, or smaller pieces"
        )

    state = LinearState.start(target, feature_map, window, sinks, horizon or context, chosen)
    run = ConversionRun(model, target, state, tokens, heldout, context, limit, batch, length, rates, seed, progress)
    facts = dict(
        model=state.trained_for.fingerprint, tokens=len(tokens), feature_map=feature_map, window=window, sinks=sinks, horizon=state.horizon,
        layers=chosen, closed_form=closed_form, transfer_steps=transfer_steps, lora_steps=lora_steps, rank=rank, distill=distill,
        keep_softmax=keep_softmax, batch=batch, length=length, rates=list(dataclasses.astuple(rates)), seed=seed,
    )  # fmt: skip
    run.open(None if checkpoint is None else Path(checkpoint), facts)
    with frozen(model):
        if run.report.stages == [] and run.partial is None:
            run.begin()
        if closed_form:
            run.closed_form()
        if transfer_steps:
            run.transfer(transfer_steps)
        run.keep_worst(keep_softmax)
        if lora_steps:
            run.recovery(lora_steps, rank, distill)
    return run.finish()


def _layers(target: Target, feature_map: str, window: int, sinks: int, layers: Sequence[int] | None) -> list[int]:
    """Indices of the layers to convert; raises whatever error the patch would raise."""
    from patchkit.patches.linear import LinearAttention

    LinearAttention(feature_map=feature_map, window=window, sinks=sinks, layers=None if layers is None else tuple(layers)).check(target)
    full = [layer.index for layer in target.attention_layers if layer.kind == "full"]
    return full if layers is None else sorted(set(layers))


def _check_length(target: Target, length: int) -> None:
    """Refuse a ``length`` that two kinds of model cannot use; others may exceed the context, as only relative positions matter."""
    name, switch = type(target.model).__name__, _compat.rope_switch(target.config)
    if switch is not None and length > switch:
        raise UnsupportedModel(f"length={length}: {name} switches to other rotary frequencies beyond {switch} tokens, so use at most that")
    learned = any(layer.obstacle == BAKED_IN for layer in target.attention_layers)
    if learned and target.position_limit is not None and length > target.position_limit:
        raise UnsupportedModel(f"length={length}: the learned positions end at {target.position_limit} tokens, so use at most that")


def _tokens(
    texts: Sequence[str] | torch.Tensor, tokenizer: PreTrainedTokenizerBase | None, heldout: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to learn on and to score on, [n] each."""
    if isinstance(texts, str):
        raise PatchError("texts is one string: give a list of texts")
    if isinstance(texts, torch.Tensor):
        tokens = texts.flatten()
    elif tokenizer is None:
        raise PatchError("texts need the model's tokenizer: linearize(model, texts, tokenizer), or give token ids")
    else:
        tokens = torch.tensor([token for text in texts for token in encode(tokenizer, text)], dtype=torch.long)
    if heldout is not None:
        return tokens, heldout.flatten()
    kept = min(_EVALUATED + 1, len(tokens) // 20)
    return tokens[: len(tokens) - kept], tokens[len(tokens) - kept :].long()


def _check(
    batch: int, length: int, window: int, sinks: int, rank: int, transfer_steps: int, lora_steps: int, keep_softmax: int, distill: float
) -> None:
    least = {"batch": (batch, 1), "window": (window, 1), "sinks": (sinks, 0), "rank": (rank, 1), "length": (length, 2)}
    least |= {"transfer_steps": (transfer_steps, 0), "lora_steps": (lora_steps, 0), "keep_softmax": (keep_softmax, 0)}
    if not 0 <= distill <= 1:
        raise PatchError(f"distill={distill}: give a share between 0 and 1")
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise PatchError(f"{name}={value}: give at least {smallest}")
