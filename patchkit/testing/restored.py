"""A check that nothing was left behind on a model: `snapshot`, and later `assert_restored`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patchkit._compat.attention import attention_named
from patchkit._compat.hooks import HOOK_REGISTRIES
from patchkit.freshness import parts_of
from patchkit.tolerance import logit_error

_PROBE_LENGTH = 12


@dataclass(frozen=True)
class Snapshot:
    """State of a model that ``assert_restored`` compares, with a copy of every tensor of the state dict."""

    modules: dict[str, nn.Module] = field(repr=False)
    attributes: dict[str, dict[str, Any]] = field(repr=False)
    hooks: dict[tuple[str, str], dict[int, Any]] = field(repr=False)
    tensors: dict[str, tuple[int | None, torch.Tensor]] = field(repr=False)
    buffers: dict[str, torch.Tensor] = field(repr=False)
    configs: dict[str, dict[str, Any]] = field(repr=False)
    logits: torch.Tensor = field(repr=False)


def snapshot(model: PreTrainedModel) -> Snapshot:
    """Record the state of ``model`` for a later ``assert_restored``: modules, hooks, attributes, tensors, config and probe logits.

    The model runs once on a probe input of 12 tokens. Every tensor of the state dict is copied: meant for small models.
    """
    # the probe runs first, here and in assert_restored: scaled rotary positions reset their buffers on a short input
    logits = _probe_logits(model)
    return Snapshot(
        modules=dict(model.named_modules()),
        attributes={name: dict(vars(module)) for name, module in model.named_modules()},
        hooks={(name, kind): dict(getattr(module, kind, {})) for name, module in model.named_modules() for kind in HOOK_REGISTRIES},
        tensors={key: (pointer, tensor.clone()) for key, (pointer, tensor) in _stored(model).items()},
        buffers={key: tensor.detach().clone() for key, tensor in model.named_buffers()},
        configs={name: _config_values(config) for name, config in _configs(model)},
        logits=logits,
    )


def assert_restored(before: Snapshot, model: PreTrainedModel) -> None:
    """Raise an AssertionError that lists every trace that was left on ``model`` since ``before`` was taken.

    Compared are the identity of every module; hooks of all kinds; the names of all instance attributes, and which function they
    hold where they hold one; keys, storage and bits of the state dict, and the bits of the other buffers; config, sub-configs
    and generation config, the attention implementation included; and the logits of a probe input, bit by bit.
    """
    logits = _probe_logits(model)
    found = list(_differences(before, model))
    if logits.shape != before.logits.shape or not _same_bits(logits, before.logits):
        found.append(f"logits of the probe input differ by {logit_error(logits, before.logits):.3e}")
    if found:
        shown = "\n  ".join(found[:20]) + (f"\n  and {len(found) - 20} more" if len(found) > 20 else "")
        raise AssertionError(f"{type(model).__name__} is not as it was before:\n  {shown}")


def _differences(before: Snapshot, model: PreTrainedModel) -> Iterator[str]:
    """One line per difference, except those of logits."""
    now = dict(model.named_modules())
    yield from _changed_names("module", before.modules, now)
    common = [name for name in before.modules if name in now]
    for name in common:
        label = name or "the model"
        if now[name] is not before.modules[name]:
            yield f"{label} is another object: {type(now[name]).__name__}, was {type(before.modules[name]).__name__}"
            continue
        yield from _changed_names(f"attribute of {label}", before.attributes[name], vars(now[name]))
        for key, old in before.attributes[name].items():
            new = vars(now[name]).get(key, old)
            if (callable(old) or callable(new) or isinstance(old, bool)) and new is not old:
                yield f"attribute {key!r} of {label} is {new!r}, was {old!r}"
        for kind in HOOK_REGISTRIES:
            old_hooks, new_hooks = before.hooks[name, kind], getattr(now[name], kind, {})
            if old_hooks != dict(new_hooks):
                added = [_name_of(hook) for key, hook in new_hooks.items() if key not in old_hooks]
                removed = [_name_of(hook) for key, hook in old_hooks.items() if key not in new_hooks]
                yield f"{kind} of {label}: added {added}, removed {removed}"
    stored = _stored(model)
    state = {key: tensor for key, (_, tensor) in stored.items()}
    yield from _changed_names("state_dict key", before.tensors, state)
    for key, (pointer, old_tensor) in before.tensors.items():
        if key not in state:
            continue
        new_tensor = state[key]
        if (new_tensor.dtype, new_tensor.shape, new_tensor.device) != (old_tensor.dtype, old_tensor.shape, old_tensor.device):
            yield f"{key} is {_describe(new_tensor)}, was {_describe(old_tensor)}"
        elif not _same_bits(new_tensor, old_tensor):
            yield f"{key} has other values, by up to {(new_tensor.double() - old_tensor.double()).abs().max().item():.3e}"
        elif stored[key][0] != pointer:
            yield f"{key} has moved to another storage"
    buffers = dict(model.named_buffers())
    yield from _changed_names("buffer", before.buffers, buffers)
    for key, old_tensor in before.buffers.items():
        if key not in state and key in buffers and not (buffers[key].shape == old_tensor.shape and _same_bits(buffers[key], old_tensor)):
            yield f"buffer {key} has other values"
    configs = {name: _config_values(config) for name, config in _configs(model)}
    yield from _changed_names("config", before.configs, configs)
    for name, old_values in before.configs.items():
        new_values = configs.get(name, old_values)
        yield from _changed_names(f"field of {name}", old_values, new_values)
        for key, value in old_values.items():
            if key in new_values and new_values[key] != value:
                yield f"{name}.{key} is {new_values[key]!r}, was {value!r}"


def _stored(model: PreTrainedModel) -> dict[str, tuple[int | None, torch.Tensor]]:
    """The tensors of the state dict with their addresses; None for the address of a copy that is made whenever the state dict is.

    A tensor of a subclass, as quantised weights are, is given by the tensors that it consists of.
    """
    return {
        key if part is tensor else f"{key}, part {place}": (part.data_ptr() if part.data_ptr() == again.data_ptr() else None, part.detach())
        for (key, tensor), second in zip(model.state_dict().items(), model.state_dict().values(), strict=True)
        for place, (part, again) in enumerate(zip(parts_of(tensor), parts_of(second), strict=True))
    }


def _changed_names(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line per name that came or went."""
    yield from (f"{what} {name!r} was added" for name in now if name not in before)
    yield from (f"{what} {name!r} is gone" for name in before if name not in now)


def _name_of(hook: Any) -> str:
    """Readable name of a hook, for messages."""
    return getattr(hook, "__qualname__", None) or type(hook).__name__


def _describe(tensor: torch.Tensor) -> str:
    """Dtype, shape and device, for messages."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of the stored bytes, so that NaN equals NaN and 0.0 differs from -0.0."""
    return torch.equal(left.detach().contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def _configs(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The config, its sub-configs and the generation config, each with a name for messages."""
    pending: list[tuple[str, Any]] = [("config", model.config)]
    while pending:
        name, config = pending.pop(0)
        yield name, config
        for key in getattr(config, "sub_configs", {}):
            if isinstance(vars(config).get(key), PreTrainedConfig):
                pending.append((f"{name}.{key}", vars(config)[key]))
    if getattr(model, "generation_config", None) is not None:
        yield "generation_config", model.generation_config


def _config_values(config: Any) -> dict[str, Any]:
    """A copy of the fields of one config, sub-configs left out."""
    values = {key: copy.deepcopy(value) for key, value in vars(config).items() if not isinstance(value, PreTrainedConfig)}
    if isinstance(config, PreTrainedConfig):
        values["attention implementation"] = attention_named(config)
    return values


def _probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits ``[1, 12, V]`` of a fixed input, computed without gradient, cache or dropout, from a fixed random state."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    ids = (torch.arange(_PROBE_LENGTH) * 7 + 3).remainder(embeddings.shape[0])[None].to(model.device)
    training = model.training
    try:
        # some models draw random numbers in eval mode too (Reformer's hashing)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model.train(False)(input_ids=ids, use_cache=False).logits
    finally:
        if training:
            model.train(True)
