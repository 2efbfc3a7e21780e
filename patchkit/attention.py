"""How patchkit puts a function of its own between a model and its attention: by name, per model, reversibly.

transformers looks the attention function up by ``config._attn_implementation`` at every call, and the function that
builds the mask by the same name. `alias_of` registers, for an implementation such as ``"sdpa"``, one alias that

* runs ``ours(original, module, query, ...)`` on the attention modules that were given such a function (`set_attention`), and the
  original implementation, bit for bit, on every other module; so two models may share a config and only one of them be patched;
* builds the original's mask, unless a patched forward is under way that makes its own (`swap_mask_builder`).

The alias has the original encoded in its name, because nothing but the module and the config reaches these functions.
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
_aliased: dict[str, str] = {}  # alias -> what it stands for


def alias_of(implementation: str) -> str:
    """The registered name under which ``implementation`` runs with patchkit's functions in front of it.

    The name avoids "sdpa", "flash" and "flex", which transformers looks for as substrings and treats specially.
    """
    # That of an alias, which another model with the same config may have put there, is that of what it stands for.
    implementation = _aliased.get(implementation, implementation)
    alias = f"{_PREFIX}{zlib.crc32(implementation.encode()):08x}"
    _aliased[alias] = implementation
    _compat.register_attention(alias, _in_front_of(implementation), _mask_of(implementation))
    return alias


def original_name(config: Any) -> str:
    """The attention implementation that ``config`` names, or that the alias stands for which it names."""
    name = _compat.attention_named(config) or "eager"
    return _aliased.get(name, name)


def names_alias(config: Any) -> bool:
    """Whether ``config`` names one of patchkit's aliases."""
    return (_compat.attention_named(config) or "").startswith(_PREFIX)


def named_alias(implementation: str, suffix: str, mask: MaskBuilder) -> str:
    """Register another alias of ``implementation``, whose masks ``mask`` builds; returns its name, which ends with ``suffix``."""
    alias = f"{alias_of(implementation)}_{suffix}"
    _aliased[alias] = implementation
    _compat.register_attention(alias, _in_front_of(implementation), mask)
    return alias


def set_alias(handle: Handle, config: Any, alias: str) -> None:
    """Name ``alias`` in a config, until the last patched model that shares it is unpatched."""
    # A copy of a patched model may have left an alias of which nobody knows who put it there.
    original = original_name(config) if names_alias(config) else None
    handle.set_shared(config, _compat.ATTENTION_NAME, alias, original)


def set_attention(handle: Handle, module: nn.Module, function: AttentionFunction) -> None:
    """Let ``function(original, module, query, key, value, attention_mask, **kwargs)`` attend for a module, until it is unpatched."""
    handle.set_attribute(module, _OURS, function)


@contextlib.contextmanager
def attending(functions: Iterable[tuple[nn.Module, AttentionFunction]]) -> Iterator[None]:
    """Within this context, each of these functions attends for its module, as in `set_attention`."""
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
    """Look whether patched attention modules still reach patchkit's functions, through an alias that their configs name.

    Raises:
        StreamError: another implementation was set since; the patch would be off without a word.
    """
    for config in configs:
        implementation = _compat.attention_named(config)
        if not (implementation or "").startswith(_PREFIX):
            raise StreamError(
                f"the attention implementation was set to {implementation!r} after the model was patched, which puts the patch's own "
                "attention out of force: unpatch_model, set it, and patch again"
            )


def configs_of(modules: Iterable[nn.Module], model: Any) -> list[Any]:
    """The config objects through which these attention modules look their implementation up, each once."""
    return list({id(config): config for module in modules for config in [getattr(module, "config", model.config)]}.values())


class Masks(NamedTuple):
    """Where the masks of the models with ``configs`` come from: see `swap_mask_builder`."""

    builder: MaskBuilder | None
    configs: Sequence[Any]


def swap_mask_builder(masks: Masks | None) -> Masks | None:
    """From now on, in this thread, the masks of models with ``masks.configs`` come from ``masks.builder``.

    It is called as ``builder(implementation, ...)``, with the name of the original and the arguments of transformers' mask functions. None
    means the original's function. Other models are not concerned: KeyboardInterrupt can end a forward without anybody being told.

    Returns what was in force, for the caller to put back when its forward ends.
    """
    before = getattr(_this_thread, "masks", None)
    _this_thread.masks = masks
    return before


@contextlib.contextmanager
def masks_from(configs: list[Any], builder: MaskBuilder | None) -> Iterator[None]:
    """Within this context (and thread), models with these configs get their masks from ``builder``; None: from the usual functions.

    Each implementation ``"sdpa"`` then runs without copying keys for the heads that share them (`_grouped_sdpa`). Configs that name an
    alias already are left as they are, so that another thread may run a model with the same config.
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
    """Within this context (and thread) every attention call under an alias, and every mask built, is shown to the callbacks."""
    _this_thread.recorders = on_call, on_mask
    try:
        yield
    finally:
        _this_thread.recorders = None


def original_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """The attention function that ``module`` would call under ``implementation``.

    ``"eager"`` is not in transformers' registry: each modeling file defines its own.

    Raises:
        UnsupportedModel: an eager implementation is wanted, and the module's file defines none.
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
    """transformers' ``"sdpa"``, which copies all keys once per head of a group when there is a mask; on a CPU torch needs no copies."""
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
