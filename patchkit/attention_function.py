"""`attention_patch`: one attention function becomes a patch in a few lines; `examples/write_a_patch.py` shows it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.attention import (
    AttentionFunction,
    AttentionOutput,
    MaskRule,
    configs_of,
    named_alias,
    original_name,
    refuse_other_attention,
    set_alias,
    set_attention,
)
from patchkit.errors import UnsupportedModel
from patchkit.handle import Handle
from patchkit.patch import Patch, Stage, register_patch


def attention_patch(name: str, mask: MaskRule | None = None) -> Callable[[AttentionFunction], type[AttentionPatch]]:
    """Decorate one function with transformers' attention signature, which becomes a patch, called ``name`` in spec strings.

        @attention_patch("nearest", mask=lambda batch, head, query, key: key > query - 8)
        def nearest(module, query, key, value, attention_mask, scaling=None, **kwargs): ...

        patch_model(model, "nearest")          # or patch_model(model, nearest())

    The function is called as ``function(module, query, key, value, attention_mask, scaling=..., **kwargs)``:

    * query [B, H, T, K]; key [B, G, S, K] and value [B, G, S, V] from the cache, where G divides H;
    * attention_mask [B, 1, T, S] to add to the scores, 0 where visible and the lowest number of the queries' dtype elsewhere; never None.

    It returns the output [B, T, H, V], and the attention weights or None.

    Args:
        name: the patch's name in spec strings.
        mask: bool function of index tensors (batch, head, query, key) that broadcast against each other: whether a key that the model's
            own rule shows stays visible; None for all. Padding and sliding windows are in the model's rule.

    Raises:
        ValueError: the name is not an identifier.
        PatchConflict: another patch has the name.
    """

    def decorate(function: AttentionFunction) -> type[AttentionPatch]:
        body = {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "function": staticmethod(function),
            "rule": None if mask is None else staticmethod(mask),
        }
        return register_patch(name)(dataclass(frozen=True)(type(function.__name__, (AttentionPatch,), body)))

    return decorate


@dataclass(frozen=True)
class AttentionPatch(Patch):
    """Base class of the patches that `attention_patch` makes: every attention module calls ``function``."""

    stage = Stage.ATTENTION
    function: ClassVar[AttentionFunction]
    rule: ClassVar[MaskRule | None]

    def check(self, target: Target) -> None:
        for layer in target.attention_layers:
            if not layer.interface:
                raise UnsupportedModel(
                    f"{type(target.model).__name__} computes attention itself in layer {layer.index} ({layer.name}) instead of calling "
                    "transformers' attention interface, so no attention function can replace it"
                )

    def apply(self, target: Target, handle: Handle) -> None:
        modules = {id(layer.module): layer.module for layer in target.attention_layers}
        for config in _compat.attention_configs(target.model):
            original = original_name(config)
            set_alias(handle, config, named_alias(original, self.name, functools.partial(_additive_mask, type(self).rule)))
        for module in modules.values():
            set_attention(handle, module, functools.partial(_run_patch, type(self), handle.record.hits))
        configs = configs_of(modules.values(), target.model)
        handle.pre_hook(target.decoder, functools.partial(_before_patched_forward, configs))
        handle.record.changed("attention modules", len(modules))


def _before_patched_forward(configs: list[Any], decoder: nn.Module, args: Any) -> None:
    refuse_other_attention(configs)


def _run_patch(cls: type[AttentionPatch], hits: Counter[str], original: AttentionFunction, *args: Any, **kwargs: Any) -> AttentionOutput:
    if not torch.compiler.is_compiling():  # a count that changes would need a new graph for every call
        hits["attention calls"] += 1
    return cls.function(*args, **kwargs)


def _additive_mask(rule: MaskRule | None, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    if rule is not None:
        kwargs["mask_function"] = _compat.and_masks(kwargs["mask_function"], rule)
    return _compat.mask_function("eager")(*args, **kwargs)
