"""Whether the installed transformers and torch are what patchkit was written for."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from functools import lru_cache
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from patchkit._compat.names import REMEDY, SUPPORTED, TESTED, GenerationConfig, GenerationMixin, PreTrainedConfig
from patchkit.errors import PatchError

_logger = logging.getLogger("patchkit")

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
    "transformers.integrations.moe:ExpertsInterface.register": ("key", "value"),
    # Used by patchkit/kernels/, which does without transformers.
    "torch:_int_mm": None,
    "torch.cpu:_is_vnni_supported": (),
    "torch._C:_len_torch_dispatch_stack": None,
    "torch.compiler:reset": (),
    "torch.nn.modules.module:_global_forward_hooks": None,
    "torch.nn.modules.module:_global_forward_pre_hooks": None,
}


def missing_facts() -> list[str]:
    """Each thing that patchkit sets or reads on instances of transformers' classes, and that is not there."""
    config, generation = PreTrainedConfig(), GenerationConfig.__annotations__
    facts = {
        f"PreTrainedConfig.{name}": hasattr(config, name) for name in ("_attn_implementation_internal", "_experts_implementation_internal")
    }
    facts["GenerationConfig._pad_token_tensor"] = "_pad_token_tensor" in generation
    facts["GenerationMixin.generate(custom_generate=)"] = "custom_generate" in inspect.signature(GenerationMixin.generate).parameters
    return [f"transformers' {name} is missing" for name, there in facts.items() if not there]


def _installed() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def wrong_versions() -> list[str]:
    """Each installed library that is outside `SUPPORTED`, as "transformers 5.14.1, needs >=5.15"."""
    installed = _installed()
    return [
        f"{name} {installed[name]}, needs {wanted}"
        for name, wanted in SUPPORTED.items()
        if not SpecifierSet(wanted).contains(installed[name], prereleases=True)
    ]


def untested_versions() -> list[str]:
    """Each installed library that is newer than what the tests ran on, as "transformers 5.25.0 (tested up to 5.24)"."""
    installed = _installed()
    return [
        f"{name} {installed[name]} (tested up to {newest})"
        for name, newest in TESTED.items()
        if Version(installed[name]).release[:2] > Version(newest).release
    ]


def changed_names(relied_on: dict[str, tuple[str, ...] | None] | None = None) -> list[str]:
    """Each name of ``relied_on`` (of `RELIED_ON`) that is missing or takes other arguments than patchkit was written for.

    Arguments that were added behind those are no change: patchkit hands on what it does not know.
    """
    problems = []
    for path, arguments in (RELIED_ON if relied_on is None else relied_on).items():
        module, _, name = path.partition(":")
        try:
            found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            problems.append(f"{module}.{name} is missing")
            continue
        if arguments is not None:
            parameters = inspect.signature(found).parameters
            actual = tuple(parameters)
            needs_more = any(parameters[name].default is inspect.Parameter.empty for name in _named(parameters, len(arguments)))
            if actual[: len(arguments)] != arguments or needs_more:
                problems.append(f"{module}.{name} takes ({', '.join(actual)}), expected ({', '.join(arguments)})")
    return problems


def _named(parameters: Any, start: int) -> list[str]:
    """The parameters from number ``start`` on that a caller can name."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in list(parameters.items())[start:] if parameter.kind not in variadic]


@lru_cache(maxsize=1)
def self_check() -> None:
    """Run once, by the first `patch_model`: are these the transformers and the torch that patchkit was written for?

    Raises:
        PatchError: a version is too old, or a name is missing or has changed; the message names each of them.
    """
    wrong = wrong_versions()
    if wrong:
        raise PatchError(f"patchkit cannot run on {' and '.join(wrong)}. {REMEDY}")
    changed = changed_names() + missing_facts()
    if changed:
        raise PatchError(
            f"transformers {transformers.__version__} and torch {torch.__version__} differ from what patchkit stands on: "
            f"{'; '.join(changed)}. {REMEDY}"
        )
    untested = untested_versions()
    if untested:
        _logger.warning(
            "patchkit: not tested on %s; every name that it stands on is there. `patchkit prove` checks a patch on your model",
            " and ".join(untested),
        )
