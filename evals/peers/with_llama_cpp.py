"""llama.cpp, through llama-cpp-python built for this processor: the model's GGUF file as it is (Q4_1), and requantised from it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import llama_cpp
from peer import Answer, Clock, Made, Way

THREADS, CONTEXT = 2, 4096
CPUINFO = Path("/proc/cpuinfo")
# llama_ftype of each type of weights; None is the file as it is.
TYPES = {"Q4_1": None, "Q8_0": 7, "F16": 1, "F32": 0}


def ways(made: Made) -> dict[str, Callable[[], Way]]:
    return {kind: functools.partial(way, made, kind) for kind in TYPES}


def way(made: Made, kind: str) -> Way:
    if CPUINFO.is_file() and "amx_int8" in CPUINFO.read_text():
        without_amx()
    path = made.gguf if TYPES[kind] is None else requantised(made, kind)
    model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    facts = {key.rpartition(".")[2]: value for key, value in model.metadata.items()}
    heads, kv_heads = int(facts["head_count"]), int(facts["head_count_kv"])
    width = int(facts["embedding_length"]) // heads * kv_heads

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        model.reset()  # else the part of the prompt that the last one shares is not computed again
        clock, ids = Clock(), []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            clock.note(len(ids))
            if len(ids) == new_tokens or token in made.ends:
                break
        return clock.answer(ids)

    # Keys and values are kept in fp16.
    return Way(answer, weights_of(model), int(facts["block_count"]) * 2 * width * 2, kind)


def weights_of(model: llama_cpp.Llama) -> int:
    """Bytes of all tensors of a model whose head is its embedding: what one token reads."""
    return int(llama_cpp.llama_model_size(model._model.model))


def requantised(made: Made, kind: str) -> Path:
    path = made.folder / f"smollm2-{kind}.gguf"
    if not path.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.pure = TYPES[kind], True, True
        new = path.with_suffix(".new")
        if llama_cpp.llama_model_quantize(str(made.gguf).encode(), str(new).encode(), ctypes.byref(options)) != 0:
            raise RuntimeError(f"llama.cpp could not requantise {made.gguf.name} to {kind}")
        new.replace(path)
    return path


@functools.cache
def without_amx() -> None:
    """Switch repacking off: llama.cpp repacks weights for AMX wherever the processor names it, and dies of an illegal instruction on
    virtual machines that name it and do not allow it."""
    bindings = llama_cpp.llama_cpp  # the module that `Llama` reads
    defaults = bindings.llama_model_default_params

    def without() -> llama_cpp.llama_model_params:
        chosen = defaults()
        chosen.use_extra_bufts = False
        return chosen

    bindings.llama_model_default_params = without
