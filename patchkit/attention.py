"""Aliases of attention implementations, through which patchkit's functions run before a model's attention, reversibly.

transformers looks up the attention function by ``config._attn_implementation`` at every call, and the function that
builds the mask by the same name. `alias_of` registers, for an implementation such as ``"sdpa"``, one alias that

* runs ``ours(original, module, query, ...)`` on attention modules with such a function (`set_attention`), and the unchanged original on
  every other module, so that of two models with one config only one may be patched;
* builds the original's mask, unless a patched forward in progress makes its own (`swap_mask_builder`).

The alias encodes the original in its name, because these functions receive only the module and the config.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import StreamError, UnsupportedModel

if TYPE_CHECKING:
    from patchkit.handle import Handle

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]
MaskBuilder = Callable[..., torch.Tensor | None]
MaskRule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

_this_thread = threading.local()
_PREFIX = "patchkit_"  # of every alias
_OURS = "_patchkit_attention"  # the attribute of an attention module
_aliased: dict[str, str] = {}  # alias -> original implementation


def alias_of(implementation: str) -> str:
    """Register the alias under which ``implementation`` runs with patchkit's functions before it, and return its name.

    The name avoids "sdpa", "flash" and "flex", which transformers looks for as substrings and treats specially. The alias of an alias is
    that of the original.
    """
    # Another model with the same config may have set an alias there.
    implementation = _aliased.get(implementation, implementation)
    alias = f"{_PREFIX}{zlib.crc32(implementation.encode()):08x}"
    _aliased[alias] = implementation
    _compat.register_attention(alias, _in_front_of(implementation), _mask_of(implementation))
    return alias


def original_name(config: Any) -> str:
    """The attention implementation that ``config`` names; for an alias, its original."""
    name = _compat.attention_named(config) or "eager"
    return _aliased.get(name, name)


def names_alias(config: Any) -> bool:
    """Whether ``config`` names one of patchkit's aliases."""
    return (_compat.attention_named(config) or "").startswith(_PREFIX)


def named_alias(implementation: str, suffix: str, mask: MaskBuilder) -> str:
    """Register another alias of ``implementation``, with masks from ``mask``, and return its name, which ends with ``suffix``."""
    alias = f"{alias_of(implementation)}_{suffix}"
    _aliased[alias] = implementation
    _compat.register_attention(alias, _in_front_of(implementation), mask)
    return alias


def set_alias(handle: Handle, config: Any, alias: str) -> None:
    """Name ``alias`` in a config, until the last patched model that shares it is unpatched."""
    # A copy of a patched model may have left an alias that no handle knows.
    original = original_name(config) if names_alias(config) else None
    handle.set_shared(config, _compat.ATTENTION_NAME, alias, original)


def set_attention(handle: Handle, module: nn.Module, function: AttentionFunction) -> None:
    """Make ``function(original, module, query, key, value, attention_mask, **kwargs)`` the attention of a module, until it is unpatched."""
    handle.set_attribute(module, _OURS, function)


@contextlib.contextmanager
def attending(functions: Iterable[tuple[nn.Module, AttentionFunction]]) -> Iterator[None]:
    """Make each of these functions the attention of its module within this context; for the arguments see `set_attention`."""
    given = list(functions)
    try:
        for module, function in given:
            vars(module)[_OURS] = function
        yield
    finally:
        for module, _ in given:
            vars(module).pop(_OURS, None)


def has_own_mask(config: Any) -> bool:
    """Whether ``config`` names the alias of an `AttentionPatch`, which makes its masks itself."""
    return names_alias(config) and _compat.attention_named(config) != alias_of(original_name(config))


def refuse_other_attention(configs: Sequence[Any]) -> None:
    """Check that the configs of patched attention modules still name an alias, through which patchkit's functions run.

    Raises:
        StreamError: another implementation was set after patching, which would switch the patch off silently.
    """
    for config in configs:
        implementation = _compat.attention_named(config)
        if not (implementation or "").startswith(_PREFIX):
            raise StreamError(
                f"the attention implementation was set to {implementation!r} after the model was patched, which switches off the "
                "attention of the patch: unpatch_model, set it, and patch again"
            )


def configs_of(modules: Iterable[nn.Module], model: Any) -> list[Any]:
    """The config objects through which these attention modules look up their implementation, each once."""
    return list({id(config): config for module in modules for config in [getattr(module, "config", model.config)]}.values())


class Masks(NamedTuple):
    """The builder of the masks of models with ``configs``; for its arguments see `swap_mask_builder`."""

    builder: MaskBuilder | None
    configs: Sequence[Any]


def swap_mask_builder(masks: Masks | None) -> Masks | None:
    """Set the builder of this thread's masks, and return the previous one, for the caller to restore when its forward ends.

    It serves models with ``masks.configs``, and no others, because KeyboardInterrupt can end a forward before the caller restores it. It
    is called as ``builder(implementation, ...)``, with the name of the original and the arguments of transformers' mask functions. None
    means the original's function.
    """
    before = getattr(_this_thread, "masks", None)
    _this_thread.masks = masks
    return before


@contextlib.contextmanager
def masks_from(configs: list[Any], builder: MaskBuilder | None) -> Iterator[None]:
    """Build the masks of models with these configs by ``builder``, within this context and thread; None: by the usual functions.

    Each implementation ``"sdpa"`` then runs without copying keys for the heads that share them (`_grouped_sdpa`). Configs that already
    name an alias are not changed, so that another thread may run a model with the same config.
    """
    outer, grouped = swap_mask_builder(Masks(builder, tuple(configs))), getattr(_this_thread, "grouped", False)
    configs = [config for config in configs if not names_alias(config)]
    before = [_compat.attention_named(config) for config in configs]
    _this_thread.grouped = True
    try:
        for config, implementation in zip(configs, before, strict=True):
            _compat.name_attention(config, alias_of(implementation or "eager"))
        yield
    finally:
        _this_thread.grouped = grouped
        swap_mask_builder(outer)
        for config, implementation in zip(configs, before, strict=True):
            _compat.name_attention(config, implementation)


@contextlib.contextmanager
def recorded(on_call: Callable[[dict[str, Any]], None], on_mask: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call ``on_call`` for every attention call under an alias, and ``on_mask`` for every mask built, in this context and thread."""
    _this_thread.recorders = on_call, on_mask
    try:
        yield
    finally:
        _this_thread.recorders = None


def original_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """Return the attention function that ``module`` would call under ``implementation``.

    ``"eager"`` is not in transformers' registry: each modeling file defines its own.

    Raises:
        UnsupportedModel: ``implementation`` is "eager", and the module's file defines no such function.
    """
    if implementation != "eager":
        return _compat.attention_function(implementation)
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UnsupportedModel(
        f"{type(module).__name__} has no eager attention function in its modeling file. Load the model with attn_implementation='sdpa'."
    )


def _in_front_of(implementation: str) -> AttentionFunction:
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> AttentionOutput:
        original = original_function(implementation, module)
        if implementation == "sdpa" and getattr(_this_thread, "grouped", False):
            original = functools.partial(_grouped_sdpa, original)
        recorders = getattr(_this_thread, "recorders", None)
        if recorders is not None:
            recorders[0](dict(module=module, query=query, key=key, value=value, attention_mask=attention_mask, kwargs=kwargs))
        ours = module.__dict__.get(_OURS)
        if ours is None:
            return original(module, query, key, value, attention_mask, **kwargs)
        return ours(original, module, query, key, value, attention_mask, **kwargs)

    return attention


def _grouped_sdpa(
    sdpa: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> AttentionOutput:
    """Run transformers' ``"sdpa"`` without the copy of all keys for each head of a group, which it makes under a mask, on a CPU."""
    asked = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux"))
    if attention_mask is None or key.device.type != "cpu" or key.shape[1] == query.shape[1] or asked:
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return attended.transpose(1, 2).contiguous(), None


def _mask_of(implementation: str) -> Callable[..., torch.Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        masks = getattr(_this_thread, "masks", None)
        if masks is not None and masks.builder is not None:
            config = kwargs.get("config")
            if config is None or any(config is each for each in masks.configs):
                return masks.builder(implementation, *args, **kwargs)
        built = _compat.mask_function(implementation)(*args, **kwargs)
        recorders = getattr(_this_thread, "recorders", None)
        if recorders is not None and torch.is_tensor(built):
            recorders[1](built)
        return built

    return mask
