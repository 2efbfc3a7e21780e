"""transformers' own ways to decode, and torchao's int8 weights under them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from generating import bytes_per_pass, load, passes_counted, way_of
from peer import Answer, Clock, Made, Way
from transformers import AutoTokenizer, CompileConfig


def ways(made: Made) -> dict[str, Callable[[], Way]]:
    loaded = functools.cache(functools.partial(load, made.model))
    return {
        "plain": lambda: way_of(loaded()),
        "plain, bf16": lambda: way_of(load(made.model, torch.bfloat16)),
        "static cache": lambda: way_of(loaded(), static),
        # A model keeps its compiled call: each of these has a model of its own.
        "static cache + compile": lambda: way_of(load(made.model), compiled, counted=False),
        "static cache + compile, bf16": lambda: way_of(load(made.model, torch.bfloat16), compiled, counted=False),
        "prompt lookup": lambda: way_of(loaded(), lambda: {"prompt_lookup_num_tokens": 8}),
        "assisted (stdlib-1m-draft, another tokenizer)": lambda: assisted(made, loaded()),
        "torchao int8 weight-only": lambda: quantised(made, "Int8WeightOnlyConfig"),
        "torchao int8 weight-only + compile": lambda: quantised(made, "Int8WeightOnlyConfig", compiled),
        "torchao int8 dynamic": lambda: quantised(made, "Int8DynamicActivationInt8WeightConfig"),
        "torchao int8 dynamic + compile": lambda: quantised(made, "Int8DynamicActivationInt8WeightConfig", compiled),
    }


def static() -> dict[str, Any]:
    return {"cache_implementation": "static", "disable_compile": True}


def compiled() -> dict[str, Any]:
    config = CompileConfig(mode="default", fullgraph=False)
    config._compile_all_devices = True  # else transformers compiles on accelerators only
    return {"cache_implementation": "static", "compile_config": config}


def quantised(made: Made, config: str, options: Callable[[], dict[str, Any]] | None = None) -> Way:
    from torchao import quantization

    model = load(made.model)
    quantization.quantize_(model, getattr(quantization, config)())
    return way_of(model, options or dict, counted=options is None, dtype="int8")


def assisted(made: Made, model: Any) -> Way:
    """Assisted generation: no smaller model of this family comes from a package index, so the assistant has a tokenizer of its own."""
    assistant, plain = load(made.draft), way_of(model)
    options = {
        "assistant_model": assistant,
        "tokenizer": AutoTokenizer.from_pretrained(made.model),
        "assistant_tokenizer": AutoTokenizer.from_pretrained(made.draft),
    }
    way = way_of(model, lambda: options)

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        drafted = Clock()
        with passes_counted(assistant, drafted):
            found = way.answer(prompt, new_tokens)
        return Answer(**{**found.__dict__, "drafting_bytes": drafted.passes * bytes_per_pass(assistant)})

    return Way(answer, plain.weight_bytes, plain.kv_bytes, plain.dtype)
