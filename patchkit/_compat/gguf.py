"""Models that transformers has unpacked from a GGUF file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers

# What transformers leaves on a model that it has loaded from a GGUF file (since 5.24), and on its config. No other loader leaves these
# on a model whose weights are ordinary tensors.
_MARKS_OF_GGUF = ("hf_quantizer", "quantization_method", "is_quantized")

MAY_BE_MISSING = {
    "_is_quantized": "it is taken away where it is there",
    "_model_name_or_path": "transformers before 5.24, or of another file, does not write it",
}

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


def forget_title(config: Any) -> None:
    """Take the title that a GGUF file gives its model from a config (``_model_name_or_path``), which would be saved as an option."""
    vars(config).pop("_model_name_or_path", None)


def _remember_quantizer(model: Any, marks: dict[str, Any], on_config: dict[str, Any]) -> None:
    vars(model).update(marks)
    vars(model.config).update(on_config)
