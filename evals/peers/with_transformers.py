"""transformers' own ways to decode, and torchao's int8 weights under them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from generating import bytes_per_pass, load, passes_counted, way_of
from peer import Answer, Clock, Made, Way
from transformers import AutoTokenizer, CompileConfig, StaticCache

# Tokens of the static caches: for the short prompts, and for the long one.
LENGTHS = (256, 2112)


def ways(made: Made) -> dict[str, Callable[[], Way]]:
    loaded = functools.cache(functools.partial(load, made.model))
    return {
        "plain": lambda: way_of(loaded(), cache=True),
        "plain, bf16": lambda: way_of(load(made.model, torch.bfloat16)),
        "static cache": lambda: way_of(loaded(), Static(loaded()), slots=LENGTHS[0]),
        # A model keeps its compiled call: each of these has a model of its own.
        "static cache + compile": lambda: compiled(load(made.model), "float32"),
        "prompt lookup": lambda: way_of(loaded(), lambda prompt, new_tokens: {"prompt_lookup_num_tokens": 8}),
        "assisted (stdlib-1m-draft, another tokenizer)": lambda: assisted(made, loaded()),
        "torchao int8 weight-only": lambda: way_of(quantised(made, "Int8WeightOnlyConfig"), dtype="int8"),
        "torchao int8 weight-only + compile": lambda: compiled(quantised(made, "Int8WeightOnlyConfig"), "int8"),
        "torchao int8 dynamic": lambda: way_of(quantised(made, "Int8DynamicActivationInt8WeightConfig"), dtype="int8"),
        "torchao int8 dynamic + compile": lambda: compiled(quantised(made, "Int8DynamicActivationInt8WeightConfig"), "int8"),
    }


class Static:
    """A static cache for each of two lengths, emptied before each call: one made anew for every prompt would have another length each time,
    and every length is compiled for."""

    def __init__(self, model: Any, compiled: bool = False) -> None:
        self.caches = {length: StaticCache(model.config, max_cache_len=length) for length in LENGTHS}
        self.compiled = compiled

    def __call__(self, prompt: int, new_tokens: int) -> dict[str, Any]:
        cache = self.caches[min(length for length in LENGTHS if length >= prompt + new_tokens)]
        cache.reset()
        if not self.compiled:
            return {"past_key_values": cache, "disable_compile": True}
        config = CompileConfig(mode="default", fullgraph=False, dynamic=False)
        config._compile_all_devices = True  # else transformers compiles on accelerators only
        return {"past_key_values": cache, "compile_config": config}


def compiled(model: Any, dtype: str) -> Way:
    return way_of(model, Static(model, compiled=True), counted=False, dtype=dtype, slots=LENGTHS[0])


def quantised(made: Made, config: str) -> Any:
    from torchao import quantization

    model = load(made.model)
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def assisted(made: Made, model: Any) -> Way:
    """Assisted generation: no smaller model of this family comes from a package index, so the assistant has a tokenizer of its own."""
    assistant, plain = load(made.draft), way_of(model)
    options = {
        "assistant_model": assistant,
        "tokenizer": AutoTokenizer.from_pretrained(made.model),
        "assistant_tokenizer": AutoTokenizer.from_pretrained(made.draft),
    }
    way = way_of(model, lambda prompt, new_tokens: options)

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        drafted = Clock()
        with passes_counted(assistant, drafted):
            found = way.answer(prompt, new_tokens)
        return Answer(**{**found.__dict__, "drafting_bytes": drafted.passes * bytes_per_pass(assistant)})

    return Way(answer, plain.weight_bytes, plain.kv_bytes, plain.dtype)
