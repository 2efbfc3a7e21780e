"""The standard library of this Python as tokens of the bundled models: the whole stream of a split, and batches for training."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from patchkit.measure.stdlib_text import Split, read_texts, stdlib_files

MODELS = Path(__file__).resolve().parents[1] / "patchkit" / "models"
CONTEXT = 512
BOUNDARY = "<|endoftext|>"
SEQUENCES = 16  # per step, of CONTEXT tokens each


def batch_of(tokens: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Blocks [SEQUENCES, CONTEXT] int64 of a permuted epoch; the offset of the blocks differs between epochs."""
    per_epoch = (len(tokens) - CONTEXT) // CONTEXT // SEQUENCES
    epoch, index = divmod(step, per_epoch)
    random = torch.Generator().manual_seed(1000 * seed + epoch)
    offset = int(torch.randint(CONTEXT, (), generator=random))
    order = torch.randperm(per_epoch * SEQUENCES, generator=random)[index * SEQUENCES : (index + 1) * SEQUENCES]
    return torch.stack([tokens[offset + i * CONTEXT : offset + (i + 1) * CONTEXT] for i in order.tolist()]).long()


def load_tokens(split: Split) -> tuple[torch.Tensor, int]:
    """Token stream [N] uint16 of all files of a split, each preceded by the boundary token, and its number of bytes."""
    bpe = Tokenizer.from_file(str(MODELS / "stdlib-7m" / "tokenizer.json"))
    boundary = bpe.token_to_id(BOUNDARY)
    ids: list[int] = []
    n_bytes = 0
    for text in read_texts(stdlib_files(split)):
        ids += [boundary, *bpe.encode(text).ids]
        n_bytes += len(text.encode())
    return torch.tensor(ids, dtype=torch.uint16), n_bytes
