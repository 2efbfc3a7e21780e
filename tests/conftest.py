"""What several test folders need."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.models import bundled_path


@pytest.fixture(autouse=True)
def log_levels_stay() -> Iterator[None]:
    """A command quiets the loggers of its process, which here is that of the tests after it."""
    loggers = [logger for logger in logging.Logger.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    before = {logger: logger.level for logger in loggers}
    yield
    for logger, level in before.items():
        if logger.level != level:
            logger.setLevel(level)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama of 2 layers and 512 positions with the bundled tokenizer. Tests must not write into it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        # Random logits of a tiny model are nearly flat; a larger spread makes positions and patches matter.
        initializer_range=0.3,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    for file in bundled_path().glob("tokenizer*"):
        shutil.copy(file, path)
    return path
