"""Vocabularies of two tokenizers: which of their tokens are the same string."""

from __future__ import annotations

from typing import Any

from patchkit._compat.declared import Names

_TRANSLATOR = "transformers.generation.candidate_generator:AssistantToTargetTranslator"

RELIED_ON: Names = {
    f"{_TRANSLATOR}.__init__": ("self", "target_tokenizer", "assistant_tokenizer", "target_vocab_size"),
}


def shared_tokens(target: Any, draft: Any, target_size: int) -> dict[int, int]:
    """Ids of the draft's tokenizer by the ids of the target's, for tokens of the same string (``AssistantToTargetTranslator``).

    Args:
        target, draft: tokenizers.
        target_size: vocabulary size of the target model.
    """
    from transformers.generation.candidate_generator import AssistantToTargetTranslator

    return dict(AssistantToTargetTranslator(target, draft, target_size).target_to_assistant_input_ids)
