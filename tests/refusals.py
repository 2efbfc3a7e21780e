"""Which tiny families each patch refuses, and by which words: a family that is served no more, or all at once, is a red test.

A patch that is not here serves every family of `patchkit.testing`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from transformers.models.gptj import modeling_gptj

from patchkit.errors import NothingMatched, UnsupportedModel

_OUTSIDE = "computes attention itself"
_BAKED_IN = "positions are baked into its keys or values"
_NO_ATTENTION = "no attention layers with a key-value cache"
_OWN_WINDOW = "already has its own window"
# From transformers 5.24 on GPT-J calls the attention interface; what it turns its keys by is still nowhere to be found.
_GPTJ_CALLS_THE_INTERFACE = hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS")

REFUSED: dict[str, dict[str, str]] = {
    "compile": {
        "falcon_h1": "cache layers of type LinearAttentionAndFullAttentionLayer",
        "jamba": "cache layers of type LinearAttentionLayer",
        "lfm2": "cache layers of type LinearAttentionLayer",
        "llama_dynamic": "rope_type 'dynamic'",
        "mamba": "cache layers of type LinearAttentionLayer",
        "mpt": "cuts its ALiBi bias",
        "nemotron_h": "cache layers of type",
        "qwen3_next": "cache layers of type LinearAttentionLayer",
    },
    "int4": {"mamba": "no linear layer that can be converted"},
    "int8": {"mamba": "no linear layer that can be converted"},
    "linear": {
        "bloom": "ALiBi",
        "deepseek_v2": "latent attention",
        "deepseek_v3": "latent attention",
        "falcon": _OUTSIDE,
        "falcon_alibi": _OUTSIDE,
        "gemma2": "`softcap`",
        "gpt_oss": "`s_aux`",
        "hunyuan_v1_dense": _BAKED_IN,
        "mamba": _NO_ATTENTION,
        "mistral": _OWN_WINDOW,
        "mpt": "ALiBi",
        **({} if _GPTJ_CALLS_THE_INTERFACE else {"gptj": _OUTSIDE}),
    },
    "memory": {
        "bloom": "ALiBi",
        "deepseek_v2": "latent attention",
        "deepseek_v3": "latent attention",
        "falcon": _OUTSIDE,
        "falcon_alibi": _OUTSIDE,
        "gpt2": _BAKED_IN,
        "gptj": _BAKED_IN if _GPTJ_CALLS_THE_INTERFACE else _OUTSIDE,
        "hunyuan_v1_dense": _BAKED_IN,
        "mamba": _NO_ATTENTION,
        "mistral": _OWN_WINDOW,
        "mpt": "ALiBi",
        "opt": _BAKED_IN,
    },
    "prefix_cache": {
        "jamba": "fed in blocks it gives other logits than fed as a whole",
        "mamba": "it keeps recurrent states only",
    },
    "mlp_int8": {"mamba": "no feed-forward linear that can be converted"},
    "speculative": {
        "jamba": "a forward of several tokens gives other logits than one token at a time",
        "mamba": "failed when a forward of several tokens was rolled back",
    },
    "streaming": {
        "falcon": _OUTSIDE,
        "falcon_alibi": _OUTSIDE,
        "gpt2": _BAKED_IN,
        "gptj": _BAKED_IN if _GPTJ_CALLS_THE_INTERFACE else _OUTSIDE,
        "hunyuan_v1_dense": _BAKED_IN,
        "mamba": _NO_ATTENTION,
        "mistral": _OWN_WINDOW,
        "opt": _BAKED_IN,
    },
}


@contextlib.contextmanager
def refusal(patch: str, family: str) -> Iterator[None]:
    """Within this context ``family`` is refused by ``patch``, in the words of `REFUSED`."""
    with pytest.raises((UnsupportedModel, NothingMatched), match=re.escape(REFUSED[patch][family])):
        yield


def is_refused(patch: str, family: str) -> bool:
    """Whether ``patch`` refuses ``family``."""
    return family in REFUSED.get(patch, {})
