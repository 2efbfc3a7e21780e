"""Every private or moving name of transformers and torch that patchkit touches, in one place."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from patchkit.errors import PatchError

SUPPORTED = {"transformers": ">=5.15", "torch": ">=2.8"}
# The newest versions on which tests/acting has run, at least. Newer ones are used too, with a warning.
TESTED = {"transformers": "5.24", "torch": "2.14"}
_REMEDY = 'Install a supported pair: pip install "transformers{transformers}" "torch{torch}"'.format(**SUPPORTED)

_logger = logging.getLogger("patchkit")

try:
    from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, GenerationMixin, PreTrainedConfig
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionLayer,
    )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise PatchError(f"transformers {transformers.__version__} has no name that patchkit stands on ({error}). {_REMEDY}") from error

__all__ = [
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionLayer",
    "PreTrainedConfig",
    "and_masks",
]

_OLD_CACHE = "past_key_values"
# What this transformers calls the cache: the argument of forward, the entry in the model kwargs of generate, and the field of outputs.
# "past_key_values" up to 5.23; "cache" from 5.24 on, with the old name as an alias until 5.40.
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else _OLD_CACHE


def cache_of(output: Any) -> Any:
    """The cache in a model's output, None if it has none."""
    return getattr(output, CACHE, None)


def cache_given(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, under its old name too; None if there is none."""
    found = kwargs.get(CACHE)
    return kwargs.get(_OLD_CACHE) if found is None else found


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a forward are continuous batching's, which keeps keys and values in pages of its own."""
    return type(kwargs.get("cache")).__name__ == "PagedAttentionCache"


def speaks_old_names(module: Any) -> bool:
    """Whether ``module.forward`` takes its cache under a name that this transformers no longer uses."""
    names = argument_names(module)
    return CACHE not in names and _OLD_CACHE in names


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


def is_causal_rule(rule: Any) -> bool:
    """Whether a mask function of transformers shows no query a later key, as far as that can be told from how it is put together."""
    if rule is causal_mask_function:
        return True
    names = getattr(getattr(rule, "__code__", None), "co_freevars", ())
    held = dict(zip(names, (cell.cell_contents for cell in rule.__closure__ or ()), strict=True)) if names else {}
    if "mask_functions" in held:
        parts = map(is_causal_rule, held["mask_functions"])
        return any(parts) if rule.__qualname__.startswith("and_masks.") else all(parts)
    # One rule with other indices: with an offset, or those within a packed sequence.
    return "mask_function" in held and is_causal_rule(held["mask_function"])


def means_nothing_to_a_model(value: Any) -> bool:
    """Whether an argument of a forward is an object that no model computes with: transformers' generate leaves a tokenizer there."""
    return not isinstance(value, torch.Tensor | int | float | list | tuple | dict | Cache | type(None))


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


def register_experts(name: str, forward: Any) -> None:
    """Make ``name`` a known experts implementation."""
    ExpertsInterface.register(name, forward)


def experts_forward(module: Any, implementation: str) -> Any:
    """The forward that ``implementation`` names for an experts module: a registered function, or the module class's own."""
    return ALL_EXPERTS_FUNCTIONS.get(implementation, type(module).forward.__wrapped__)


def on_experts_interface(module: Any) -> bool:
    """Whether ``module`` holds fused expert weights and lets a registered experts implementation run them."""
    marks = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "down_proj", "config")
    return all(hasattr(module, mark) for mark in marks) and hasattr(type(module).forward, "__wrapped__")


def is_shared_by_processes(model: Any) -> bool:
    """Whether several processes hold one model between them (tensor parallel, FSDP, ZeRO-3), so that all must run the same forwards."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor
    from transformers.generation.utils import is_fsdp_managed_module
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model) or (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def has_adapters_by_row(model: Any) -> bool:
    """Whether PEFT's hooks are in place that give every row of the batch an adapter of its own."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(getattr(getattr(hook, "func", None), "__name__", "") == "_adapter_names_pre_forward_hook" for hook in hooks)


def continuous_batching(model: Any) -> list[str]:
    """The methods of ``model`` that generate with continuous batching, whose cache is paged."""
    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    return [name for name in names if callable(getattr(model, name, None))]


def takes_tokens_back(layer: Any) -> bool:
    """Whether a cache layer's ``crop`` brings back what it was. Layers of transformers 5.15 do not say so: there, those of keys and values
    do, and recurrent ones do not."""
    said = getattr(layer, "is_croppable", None)
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) if said is None else bool(said)


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
    """All arguments of a call of ``module.forward`` by name; the cache is `CACHE`, also where it was given under its old name."""
    named = {**dict(zip(argument_names(module), args, strict=False)), **kwargs}
    if CACHE != _OLD_CACHE and _OLD_CACHE in named:
        old = named.pop(_OLD_CACHE)
        if named.get(CACHE) is None:
            named[CACHE] = old
    return named


def decoder_of(model: Any) -> Any:
    """The module under the language-modelling head."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return found if isinstance(found, torch.nn.Module) and found is not model else model.base_model


def rope_switch(config: Any) -> int | None:
    """The number of positions beyond which a model chooses other rotary frequencies for all tokens; None if it never does."""
    if not {"dynamic", "longrope"} & set(rope_types(config)):
        return None
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "original_max_position_embeddings")]
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        limits.append(each.get("original_max_position_embeddings"))
    return min(limit for limit in limits if isinstance(limit, int))


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def torchao_int8(weight: Any) -> tuple[torch.Tensor, torch.Tensor, str] | None:
    """What a torchao `Int8Tensor` with one symmetric scale per row holds: values int8 [N, K], scale fp32 [N], and the activation
    mode of `int8_linear`. None for any other tensor, and for what that op cannot express."""
    if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    plain = weight.ndim == 2 and list(weight.block_size) == [1, weight.shape[1]]
    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    static = weight.act_quant_scale is not None or weight.act_pre_scale is not None
    dynamic = weight.act_quant_kwargs
    if not plain or shifted or static or (dynamic is not None and type(dynamic.granularity).__name__ != "PerRow"):
        return None
    return weight.qdata, weight.scale.reshape(-1).float(), "float" if dynamic is None else "int8"


def to_torchao(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, dynamic: bool) -> Any:
    """The torchao `Int8Tensor` of int8 values [N, K] and fp32 scales [N].

    Raises:
        PatchError: torchao is not installed.
    """
    if not has_torchao():
        raise PatchError("saving int8 weights needs torchao: pip install torchao, or unpatch_model(model) and save the original")
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    column = scale.reshape(-1, 1)
    return Int8Tensor(
        values.contiguous(),
        column,
        [1, values.shape[1]],
        dtype,
        zero_point=torch.zeros_like(column, dtype=torch.int8),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic else None,
    )


def torchao_quantizer(dynamic: dict[str, bool]) -> tuple[Any, Any]:
    """transformers' quantization config and quantizer for the linear layers named; their values say which quantise activations."""
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    of_mode = {False: Int8WeightOnlyConfig(version=2), True: Int8DynamicActivationInt8WeightConfig(version=2)}
    config = TorchAoConfig(FqnToConfig({name: of_mode[mode] for name, mode in dynamic.items()}))
    return config, AutoHfQuantizer.from_config(config, pre_quantized=True)


# What transformers leaves on a model that it has loaded from a GGUF file (since 5.24), and on its config. No other loader leaves these
# on a model whose weights are ordinary tensors.
_MARKS_OF_GGUF = ("hf_quantizer", "quantization_method", "is_quantized")
_MARKS_ON_CONFIG = ("quantization_config", "_is_quantized")


def gguf_options() -> dict[str, Any]:
    """The options of `from_pretrained` with which a GGUF file becomes a model of ordinary tensors, wherever it is loaded."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def gguf_pre_tokenizers() -> set[str]:
    """The names under tokenizer.ggml.pre by which this transformers splits text as they say."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # before 5.24 it goes by the architecture
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def is_unpacked_gguf(model: Any) -> bool:
    """Whether ``model`` is called quantised because it comes from a GGUF file, although all its weights are ordinary tensors."""
    return _is_called_gguf(model) and all(parameter.is_floating_point() for parameter in model.parameters())


def packed_gguf(model: Any) -> str | None:
    """Why weights of ``model`` that are still blocks of a GGUF file cannot be changed or saved; None if it has none."""
    if not _is_called_gguf(model) or is_unpacked_gguf(model):
        return None
    return "its weights are packed blocks of a GGUF file: load it with quantization_config=GgufConfig(dequantize=True)"


def _is_called_gguf(model: Any) -> bool:
    return type(getattr(model, "hf_quantizer", None)).__name__ == "GgufHfQuantizer"


def forget_quantizer(model: Any) -> Callable[[], None]:
    """Take from a model of ordinary tensors, and from its config, what calls it quantised; the result puts it back."""
    marks = {name: vars(model).pop(name) for name in _MARKS_OF_GGUF if name in vars(model)}
    on_config = {name: vars(model.config).pop(name) for name in _MARKS_ON_CONFIG if name in vars(model.config)}
    return functools.partial(_remember_quantizer, model, marks, on_config)


def _remember_quantizer(model: Any, marks: dict[str, Any], on_config: dict[str, Any]) -> None:
    vars(model).update(marks)
    vars(model.config).update(on_config)


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
        raise PatchError(f"patchkit cannot run on {' and '.join(wrong)}. {_REMEDY}")
    changed = changed_names() + missing_facts()
    if changed:
        raise PatchError(
            f"transformers {transformers.__version__} and torch {torch.__version__} differ from what patchkit stands on: "
            f"{'; '.join(changed)}. {_REMEDY}"
        )
    untested = untested_versions()
    if untested:
        _logger.warning(
            "patchkit: not tested on %s; every name that it stands on is there. `patchkit prove` checks a patch on your model",
            " and ".join(untested),
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


# -- torch.compile: what only the patch `compile` needs, because dynamo takes a second to import ------------------------------

COMPILER_NAMES: dict[str, tuple[str, ...] | None] = {
    "torch.nn:Module._call_impl": None,
    "torch.nn:Module._compiled_call_impl": None,
    "torch.compiler:cudagraph_mark_step_begin": (),
    "torch.compiler:list_backends": None,
    "torch._dynamo:mark_static_address": ("t", "guard"),
    "torch._dynamo.exc:TorchDynamoException": None,
    "torch._dynamo.utils:counters": None,
    "torch._inductor.runtime.cache_dir_utils:cache_dir": (),
}

# Guards of dynamo that ask whether hooks were added, attributes were set on a module, or functions were replaced.
_DROPPED_GUARDS = {
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "NOT_PRESENT_IN_GENERIC_DICT",
    "HASATTR",
    "DICT_NOT_CONTAINS",
    "CLOSURE_MATCH",
    "FUNCTION_MATCH",
    "BUILTIN_MATCH",
    "CLASS_MATCH",
    "MODULE_MATCH",
}


@lru_cache(maxsize=1)
def compiler_check() -> None:
    """`self_check` for what the patch `compile` touches.

    Raises:
        PatchError: a name is missing or has changed.
    """
    changed = changed_names(COMPILER_NAMES)
    if changed:
        raise PatchError(f"torch {torch.__version__} differs from what patchkit's compile stands on: {'; '.join(changed)}. {_REMEDY}")


def compiler_backends() -> list[str]:
    """The backends of torch.compile, debugging ones included."""
    return list(torch.compiler.list_backends(exclude_tags=()))


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises when something does not compile."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def graphs_compiled() -> int:
    """How many graphs dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def inductor_cache() -> str:
    """Where inductor keeps compiled code between runs (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that ``tensor`` stays where it is, and may be written in place."""
    torch._dynamo.mark_static_address(tensor, guard=False)


def guard_options() -> dict[str, Any]:
    """The option of torch.compile that leaves guards out (`kept_guards`); none on torch 2.8, which fails on guards about missing names."""
    return {"guard_filter_fn": kept_guards} if Version(torch.__version__).release >= (2, 9) else {}


def kept_guards(guards: Any) -> list[bool]:
    """Which guards of compiled code are checked at every call."""
    return [guard.guard_type not in _DROPPED_GUARDS for guard in guards]


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary scaling that ``config`` names, for all kinds of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {parameters["rope_type"] for parameters in every if "rope_type" in parameters}
