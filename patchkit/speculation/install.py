"""The edits of `Speculative` on a model: state that calls of generate share, a hook that keeps hidden states, and `generate`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import decoder_layers
from patchkit.anatomy.target import Target
from patchkit.attention import alias_of, has_own_mask, original_name, set_alias
from patchkit.errors import PatchConflict, UnsupportedModel
from patchkit.freshness import WeightWatch
from patchkit.handle import Handle
from patchkit.patch import Stage
from patchkit.speculation.acceptance import Acceptance
from patchkit.speculation.controllers import Controller
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.follow import follow_weights
from patchkit.speculation.generate import generate, generate_plainly
from patchkit.speculation.obstacles import find_obstacle
from patchkit.speculation.row_masks import takes_any_mask
from patchkit.speculation.shared import Speculation, keep_speculation, speculation_of


def check_target(target: Target) -> bool:
    """Refuse a model that cannot verify drafts; return whether the rows of a batch may advance by their own numbers of tokens.

    Raises:
        UnsupportedModel: forwards of several tokens are not exact, or the model is spread over devices.
        PatchConflict: the model has a ``generate`` of its own.
    """
    name = type(target.model).__name__
    obstacle, ragged = find_obstacle(target.model)
    if obstacle is not None:
        raise UnsupportedModel(f"{name} cannot verify drafts exactly: {obstacle}{_compat.loaded_by(target.model, 'by_token')}")
    if getattr(target.model.generate, "__func__", None) is not type(target.model).generate:
        raise PatchConflict(f"this {name} has a generate of its own, which speculative would hide: remove it first")
    devices = {str(parameter.device) for parameter in target.model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModel(f"{name} is spread over {', '.join(sorted(devices))}: speculative needs all of it on one device")
    return ragged


def install(target: Target, handle: Handle, drafter: Drafter, controller: Controller, acceptance: Acceptance, ragged: bool) -> None:
    """Make ``generate`` of the target's model speculative.

    Args:
        drafter: one that has passed `Drafter.check`.
        ragged: what `check_target` returned.
    """
    model, prepared, control = target.model, drafter.prepared(target), controller.begin()
    configs = _compat.attention_configs(model)
    # Masks for each row come through the alias. It stays, because to put it there for a forward would disturb other threads.
    aliased = sorted({original_name(config) for config in configs}) if ragged and takes_any_mask(configs) else []
    speculation = Speculation(
        prepared,
        str(drafter),
        acceptance,
        control,
        ragged,
        handle.record.hits,
        handle.record.warnings,
        tuple(aliased),
        compiled=any(patch.stage is Stage.COMPILE for patch in target.patches),
        layers=prepared.layers,
        weights=WeightWatch(model),
    )
    assert speculation.weights is not None
    handle.on_undo(speculation.weights.close)
    handle.on_refresh(functools.partial(follow_weights, model, speculation))
    for config in configs if aliased else []:
        if not has_own_mask(config):  # that of an attention patch must stay
            set_alias(handle, config, alias_of(original_name(config)))
    for module in (model, target.decoder):
        keep_speculation(handle, module, speculation)
    if prepared.layers:
        layers = decoder_layers(model)
        for index in prepared.layers:
            keep_speculation(handle, layers[index], speculation)
            handle.hook(layers[index], functools.partial(_keep_output, index))
    handle.hook(target.decoder, _keep_hidden)
    handle.set_attribute(model, "generate", functools.partial(generate, model, speculation))
    for name in _compat.continuous_batching(model):
        if name in vars(model):  # streaming refuses it, and has to go on doing so
            continue
        handle.set_attribute(model, name, functools.partial(generate_plainly, model, handle.record.warnings, name))
    handle.record.changed("generate methods")
    handle.record.note("drafts", prepared.note() or str(drafter))
    if not acceptance.lossless:
        handle.record.warn(f"acceptance={acceptance} changes the text")


def _keep_output(index: int, layer: nn.Module, args: Any, output: Any) -> None:
    speculation = speculation_of(layer)
    if speculation.watching:
        speculation.outputs[index] = output[0] if isinstance(output, tuple) else output


def _keep_hidden(decoder: nn.Module, args: Any, output: Any) -> None:
    speculation = speculation_of(decoder)
    if speculation.watching:
        outputs = [speculation.outputs[index] for index in speculation.layers]
        speculation.hidden = torch.cat([output[0], *outputs], -1) if outputs else output[0]
        speculation.outputs.clear()
