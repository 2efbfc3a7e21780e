"""The names of transformers that patchkit relies on, and the versions that have them."""

from __future__ import annotations

import transformers

from patchkit.errors import PatchError

SUPPORTED = {"transformers": ">=5.15", "torch": ">=2.8"}
# The newest versions on which tests/acting has run, at least. Newer ones are used too, with a warning.
TESTED = {"transformers": "5.24", "torch": "2.14"}
REMEDY = 'Install a supported pair: pip install "transformers{transformers}" "torch{torch}"'.format(**SUPPORTED)

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
    raise PatchError(f"transformers {transformers.__version__} has no name that patchkit relies on ({error}). {REMEDY}") from error

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_EXPERTS_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "ExpertsInterface",
    "GenerationConfig",
    "GenerationMixin",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionLayer",
    "PreTrainedConfig",
    "REMEDY",
    "SUPPORTED",
    "TESTED",
    "and_masks",
    "causal_mask_function",
]
