"""Every private or moving name of transformers, torch, torchao, peft and lm-eval that patchkit touches, in one place.

One module for each part of a library. It declares the names that it relies on next to the code that uses them; the first `patch_model`
checks them all (`self_check`). Importing this package loads no library: the public names of its modules, which are all available here,
are looked up when the first of them is used. `patchkit.kernels` imports `patchkit._compat.products` itself, and so needs no transformers.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit._compat.attention import ATTENTION_NAME as ATTENTION_NAME
    from patchkit._compat.attention import attention_configs as attention_configs
    from patchkit._compat.attention import attention_function as attention_function
    from patchkit._compat.attention import attention_named as attention_named
    from patchkit._compat.attention import attention_set_to as attention_set_to
    from patchkit._compat.attention import is_causal_rule as is_causal_rule
    from patchkit._compat.attention import mask_function as mask_function
    from patchkit._compat.attention import name_attention as name_attention
    from patchkit._compat.attention import register_attention as register_attention
    from patchkit._compat.attention import supports_sdpa as supports_sdpa
    from patchkit._compat.calls import CACHE as CACHE
    from patchkit._compat.calls import argument_names as argument_names
    from patchkit._compat.calls import by_name as by_name
    from patchkit._compat.calls import cache_given as cache_given
    from patchkit._compat.calls import cache_of as cache_of
    from patchkit._compat.calls import has_states_only as has_states_only
    from patchkit._compat.calls import is_paged as is_paged
    from patchkit._compat.calls import speaks_old_names as speaks_old_names
    from patchkit._compat.calls import supports_dynamic_cache as supports_dynamic_cache
    from patchkit._compat.calls import takes_tokens_back as takes_tokens_back
    from patchkit._compat.compiler import CompiledCalls as CompiledCalls
    from patchkit._compat.compiler import compile_errors as compile_errors
    from patchkit._compat.compiler import compiler_backends as compiler_backends
    from patchkit._compat.compiler import compiler_check as compiler_check
    from patchkit._compat.compiler import graphs_compiled as graphs_compiled
    from patchkit._compat.compiler import guard_options as guard_options
    from patchkit._compat.compiler import inductor_cache as inductor_cache
    from patchkit._compat.compiler import kept_guards as kept_guards
    from patchkit._compat.compiler import mark_static_address as mark_static_address
    from patchkit._compat.declared import changed_names as changed_names
    from patchkit._compat.declared import relied_on as relied_on
    from patchkit._compat.experts import EXPERTS_NAME as EXPERTS_NAME
    from patchkit._compat.experts import apply_gate as apply_gate
    from patchkit._compat.experts import experts_forward as experts_forward
    from patchkit._compat.experts import experts_named as experts_named
    from patchkit._compat.experts import is_expert_parallel as is_expert_parallel
    from patchkit._compat.experts import on_experts_interface as on_experts_interface
    from patchkit._compat.experts import register_experts as register_experts
    from patchkit._compat.generate import PREFILL as PREFILL
    from patchkit._compat.generate import PREPARE_CACHE as PREPARE_CACHE
    from patchkit._compat.generate import calling_processors as calling_processors
    from patchkit._compat.generate import mask_length as mask_length
    from patchkit._compat.generate import padding_token as padding_token
    from patchkit._compat.generate import prepare_stock_cache as prepare_stock_cache
    from patchkit._compat.generate import stock_prefill as stock_prefill
    from patchkit._compat.gguf import forget_quantizer as forget_quantizer
    from patchkit._compat.gguf import forget_title as forget_title
    from patchkit._compat.gguf import gguf_options as gguf_options
    from patchkit._compat.gguf import gguf_pre_tokenizers as gguf_pre_tokenizers
    from patchkit._compat.gguf import is_unpacked_gguf as is_unpacked_gguf
    from patchkit._compat.gguf import packed_gguf as packed_gguf
    from patchkit._compat.loaders import is_wrapped as is_wrapped
    from patchkit._compat.loaders import loaded_by as loaded_by
    from patchkit._compat.loaders import loader_of as loader_of
    from patchkit._compat.loaders import quantised_options as quantised_options
    from patchkit._compat.loaders import remedy_for as remedy_for
    from patchkit._compat.loaders import unpack_weights as unpack_weights
    from patchkit._compat.loaders import unpacked_int8 as unpacked_int8
    from patchkit._compat.loaders import unpacked_weight as unpacked_weight
    from patchkit._compat.models import continuous_batching as continuous_batching
    from patchkit._compat.models import decoder_of as decoder_of
    from patchkit._compat.models import has_adapters_by_row as has_adapters_by_row
    from patchkit._compat.models import is_shared_by_processes as is_shared_by_processes
    from patchkit._compat.models import means_nothing_to_a_model as means_nothing_to_a_model
    from patchkit._compat.models import rope_switch as rope_switch
    from patchkit._compat.models import rope_types as rope_types
    from patchkit._compat.modules import COMPILED_CALL as COMPILED_CALL
    from patchkit._compat.modules import buffers_of as buffers_of
    from patchkit._compat.modules import forward_hooks_of as forward_hooks_of
    from patchkit._compat.modules import parameters_of as parameters_of
    from patchkit._compat.modules import registry_with as registry_with
    from patchkit._compat.modules import run_hooks_and_forward as run_hooks_and_forward
    from patchkit._compat.modules import version_of as version_of
    from patchkit._compat.modules import weights_and_modules as weights_and_modules
    from patchkit._compat.names import SUPPORTED as SUPPORTED
    from patchkit._compat.names import TESTED as TESTED
    from patchkit._compat.names import Cache as Cache
    from patchkit._compat.names import CacheLayerMixin as CacheLayerMixin
    from patchkit._compat.names import Conv1D as Conv1D
    from patchkit._compat.names import DynamicCache as DynamicCache
    from patchkit._compat.names import DynamicLayer as DynamicLayer
    from patchkit._compat.names import DynamicSlidingWindowLayer as DynamicSlidingWindowLayer
    from patchkit._compat.names import LinearAttentionAndFullAttentionLayer as LinearAttentionAndFullAttentionLayer
    from patchkit._compat.names import LinearAttentionLayer as LinearAttentionLayer
    from patchkit._compat.names import PreTrainedConfig as PreTrainedConfig
    from patchkit._compat.names import and_masks as and_masks
    from patchkit._compat.peft import adapter_states as adapter_states
    from patchkit._compat.peft import follow_adapters as follow_adapters
    from patchkit._compat.tokens import shared_tokens as shared_tokens
    from patchkit._compat.torchao import has_torchao as has_torchao
    from patchkit._compat.torchao import saves_torchao as saves_torchao
    from patchkit._compat.torchao import to_torchao as to_torchao
    from patchkit._compat.torchao import torchao_int8 as torchao_int8
    from patchkit._compat.torchao import torchao_quantizer as torchao_quantizer
    from patchkit._compat.versions import self_check as self_check
    from patchkit._compat.versions import untested_versions as untested_versions
    from patchkit._compat.versions import wrong_versions as wrong_versions


def __getattr__(name: str) -> Any:
    modules = [each.name for each in pkgutil.iter_modules(__path__)]
    hidden = {*modules, "RELIED_ON", "RELIED_ON_WHEN_USED", "MAY_BE_MISSING"}  # those of one module are not those of another
    if name not in hidden and not name.startswith("_"):  # a module of this package is found by the import that asks for it
        for each in modules:
            found = vars(importlib.import_module(f"{__name__}.{each}"))
            globals().update({key: value for key, value in found.items() if not key.startswith("_") and key not in hidden})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
