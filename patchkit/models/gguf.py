"""GGUF files as ordinary dense models: transformers unpacks the weights, and two of its gaps are closed here.

It marks the unpacked model as quantised, and it does not read all tokenizer settings of the file.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit import _compat
from patchkit.models.names import SMOLLM2, SMOLLM2_COMMAND, ModelUnavailable, first_line

_logger = logging.getLogger("patchkit")

# Names under tokenizer.ggml.pre. llama.cpp splits text of the first group as GPT-2 does. For the second group it isolates digits first.
_LIKE_GPT2 = {"gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class GGUFFacts:
    """GGUFFacts in a GGUF file that transformers does not read.

    Attributes:
        name: the name that the user gave.
        special_tokens: {"eos_token": "<|im_end|>", ...}.
        model: kind of tokenizer, "gpt2" for byte-level BPE.
        pre: name of the pre-tokenizer, such as "smollm"; None if the file has none.
        scaled_positions: the key or tensor that scales rotary frequencies; None if there is none.
    """

    name: str
    special_tokens: dict[str, str]
    model: str | None
    pre: str | None
    scaled_positions: str | None


def read(file: Path, name: str) -> GGUFFacts:
    """Read the header of a GGUF file.

    Raises:
        ModelUnavailable: the packages that read it are not installed, or it is no GGUF file.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            command = SMOLLM2_COMMAND if (name, package) == (SMOLLM2, "gguf") else f"pip install {package}"
            raise ModelUnavailable(f"the package {package} is not installed, with which {name} is read: {command}")
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        tokens = reader.get_field("tokenizer.ggml.tokens")
        special_tokens = {}
        for attribute, key in _SPECIAL_TOKENS.items():
            index = _value(reader, f"tokenizer.ggml.{key}_token_id")
            if index is not None and tokens is not None:
                special_tokens[attribute] = tokens.contents(index)
        return GGUFFacts(
            name,
            special_tokens,
            _value(reader, "tokenizer.ggml.model"),
            _value(reader, "tokenizer.ggml.pre"),
            _scaled_positions(reader, _value(reader, "general.architecture")),
        )
    except Exception as error:  # foreign bytes: the reader raises nearly anything
        raise ModelUnavailable(f"{file} cannot be read as a GGUF file ({first_line(error)}): download it again") from error


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _scaled_positions(reader: Any, architecture: str) -> str | None:
    kind = _value(reader, f"{architecture}.rope.scaling.type")
    factor = _value(reader, f"{architecture}.rope.scaling.factor")
    if kind not in (None, "none") and factor not in (None, 1.0):
        return f"{architecture}.rope.scaling.type = {kind}"
    for tensor in reader.tensors:
        # One factor per frequency, all 1 where nothing is scaled.
        if tensor.name.startswith("rope_f") and (tensor.data != 1).any():
            return f"the tensor {tensor.name}"
    return None


def make_dense(model: PreTrainedModel, facts: GGUFFacts) -> None:
    """Remove the marks of quantisation from a loaded model.

    Raises:
        ModelUnavailable: it is not dense, or transformers has dropped settings of the file that change its answers.
    """
    packed = [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]
    if packed:
        raise ModelUnavailable(f"{facts.name} was loaded with packed weights ({packed[0]}): save it as safetensors elsewhere")
    if facts.scaled_positions and _compat.rope_types(model.config) <= {"default"}:
        raise ModelUnavailable(
            f"{facts.name} scales its rotary positions ({facts.scaled_positions}), which transformers does not read from GGUF files: "
            "its answers would be wrong. Give the same model as safetensors"
        )
    _compat.forget_quantizer(model)
    # Saved checkpoints have this field.
    model.config.architectures = [type(model).__name__]
    _compat.forget_title(model.config)


def mend_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, facts: GGUFFacts) -> None:
    """Correct a tokenizer that transformers has built from a GGUF file by the settings in the file."""
    wrong = {name: token for name, token in facts.special_tokens.items() if getattr(tokenizer, name) != token}
    if wrong:
        tokenizer.add_special_tokens({**wrong})
    longest = getattr(model.config, "max_position_embeddings", None)
    if isinstance(longest, int):
        tokenizer.model_max_length = longest
    if facts.model != "gpt2":
        return
    # Byte-level tokens are exact text, including spaces before full stops.
    tokenizer.clean_up_tokenization_spaces = False
    backend: Any = tokenizer.backend_tokenizer
    if facts.pre in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif facts.pre not in _LIKE_GPT2 | _compat.gguf_pre_tokenizers():
        _logger.warning(
            "patchkit: it is not known how the tokenizer of %s splits text (tokenizer.ggml.pre = %s): it is split as GPT-2 does, "
            "and some words may become other tokens than in training",
            facts.name,
            facts.pre,
        )
