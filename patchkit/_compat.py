"""Every private or moving name of transformers and torch that patchkit touches, in one place."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet

from patchkit.errors import PatchError

SUPPORTED = {"transformers": ">=5.15,<5.24", "torch": ">=2.8"}
_REMEDY = 'Install a supported pair: pip install "transformers{transformers}" "torch{torch}"'.format(**SUPPORTED)

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    raise PatchError(f"transformers {transformers.__version__} has no name that patchkit stands on ({error}). {_REMEDY}") from error

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionLayer",
    "and_masks",
]


def register_attention(name: str, attention: Any, mask: Any) -> None:
    """Make ``name`` a known attention implementation. A name without a mask function would silently lose the causal mask."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_function(implementation: str) -> Any:
    """The registered attention function of ``implementation`` (not "eager", which every modeling file defines for itself)."""
    return ALL_ATTENTION_FUNCTIONS[implementation]


def mask_function(implementation: str) -> Any:
    """The function that builds masks for ``implementation``; one without any gets None, as in transformers."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation, lambda *args, **kwargs: None)


def attention_configs(model: Any) -> list[Any]:
    """Every config object through which a module of ``model`` looks its attention implementation up, each once."""
    configs: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)]
    while waiting:
        config = waiting.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            waiting += [sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None]
    return list(configs.values())


@contextlib.contextmanager
def attention_set_to(model: Any, names: Callable[[str], str]) -> Iterator[None]:
    """Within this context every config of ``model`` names ``names(implementation)`` instead of its implementation."""
    before = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
    try:
        for config, implementation in before:
            config._attn_implementation_internal = names(implementation or "eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def supports_dynamic_cache(model: Any) -> bool:
    """Whether ``model`` takes a `DynamicCache`, as almost all do, or has a cache class of its own."""
    return bool(type(model)._supports_default_dynamic_cache())


def argument_names(module: Any) -> tuple[str, ...]:
    """The names of ``module.forward``'s arguments, in order, without ``self``."""
    return _argument_names(type(module).forward)


@lru_cache(maxsize=256)
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``module.forward`` by name."""
    return {**dict(zip(argument_names(module), args, strict=False)), **kwargs}


# Where a name lives, and its arguments where patchkit passes or overrides them. A row of None only has to exist.
RELIED_ON: dict[str, tuple[str, ...] | None] = {
    "transformers:AttentionInterface.register": ("key", "value"),
    "transformers:AttentionMaskInterface.register": ("key", "value"),
    "transformers.cache_utils:Cache.__init__": None,
    "transformers.cache_utils:CacheLayerMixin.lazy_initialization": ("self", "key_states", "value_states"),
    "transformers.cache_utils:CacheLayerMixin.update": ("self", "key_states", "value_states", "args", "kwargs"),
    "transformers.cache_utils:CacheLayerMixin.get_mask_sizes": ("self", "query_length"),
    "transformers.cache_utils:CacheLayerMixin.get_seq_length": ("self",),
    "transformers.cache_utils:CacheLayerMixin.get_max_length": ("self",),
    "transformers.cache_utils:DynamicLayer.crop": ("self", "tokens_to_remove"),
    "transformers.cache_utils:Cache.crop": ("self", "tokens_to_remove"),
    "transformers.cache_utils:Cache.activate_past_recording": ("self",),
    "transformers.generation:GenerationMixin._prepare_cache_for_generation": (
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "transformers:PreTrainedModel.get_decoder": None,
    "transformers.generation:GenerationMixin._supports_default_dynamic_cache": None,
    "transformers:PreTrainedConfig._attn_implementation": None,
    "torch.compiler:reset": (),
}


def wrong_versions() -> list[str]:
    """Each installed library that is outside `SUPPORTED`, as "transformers 5.24.0, needs >=5.15,<5.24"."""
    installed = {"transformers": transformers.__version__, "torch": torch.__version__}
    # A development build of the first unsupported version is unsupported; one of a supported version is not.
    return [
        f"{name} {installed[name]}, needs {wanted}"
        for name, wanted in SUPPORTED.items()
        if not SpecifierSet(wanted).contains(installed[name], prereleases=True)
    ]


def changed_names() -> list[str]:
    """Each name of `RELIED_ON` that is missing or takes other arguments than patchkit was written for."""
    problems = []
    for path, arguments in RELIED_ON.items():
        module, _, name = path.partition(":")
        try:
            found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            problems.append(f"{module}.{name} is missing")
            continue
        if arguments is not None:
            actual = tuple(inspect.signature(found).parameters)
            if actual != arguments:
                problems.append(f"{module}.{name} takes ({', '.join(actual)}), expected ({', '.join(arguments)})")
    return problems


@lru_cache(maxsize=1)
def self_check() -> None:
    """Run once, by the first `patch_model`: are these the transformers and the torch that patchkit was written for?

    Raises:
        PatchError: a version is not supported, or a name is missing or has changed; the message names each of them.
    """
    wrong = wrong_versions()
    if wrong:
        raise PatchError(f"patchkit cannot run on {' and '.join(wrong)}. {_REMEDY}")
    changed = changed_names()
    if changed:
        raise PatchError(
            f"transformers {transformers.__version__} and torch {torch.__version__} differ from what patchkit stands on: "
            f"{'; '.join(changed)}. {_REMEDY}"
        )


class CompiledCalls:
    """The compiled forwards that a model keeps, set aside while it is patched.

    Two facts force this. A compiled callable does not notice hooks that were added after its compilation; and dynamo keeps
    compiled code by code object, not by callable, so that even a new ``model.compile()`` would run the code of the other state.
    """

    _NAMES = ("_compiled_call", "_compiled_call_impl", "_last_compile_config")

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: dict[str, Any] = {}

    def set_aside(self) -> bool:
        """Take the compiled callables off the model and forget all compiled code.

        Returns:
            Whether ``model.compile()`` was in force. What `generate` compiles, it compiles again by itself.
        """
        attributes = vars(self._model)
        self._kept = {name: attributes.pop(name) for name in self._NAMES if name in attributes}
        _forget_compiled_code()
        return self._kept.get("_compiled_call_impl") is not None

    def restore(self) -> None:
        """Drop what was compiled since, and put back what was there before; it compiles again when it is next called."""
        attributes = vars(self._model)
        for name in self._NAMES:
            attributes.pop(name, None)
        attributes.update(self._kept)
        _forget_compiled_code()

    def __getstate__(self) -> dict[str, Any]:
        # A compiled callable cannot be pickled, and a deep copy of one would run the first model.
        return {"_model": self._model, "_kept": {}}


def _forget_compiled_code() -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
