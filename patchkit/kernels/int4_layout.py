"""The layout of int4 weights in memory: blocks of 16 outputs by one group of inputs, in the order in which they are read.

A block is, in bytes: 16 scales in fp16, 16 minima in fp16 unless the weight is symmetric, and group / 8 chunks of 64 bytes. Byte
``4 o + j`` of a chunk holds the level of output o and input j in its low half, and of input ``4 + j`` in its high half.
"""

from __future__ import annotations

import torch

# Outputs of a block: lanes of a vector of 512 bits.
OUTPUTS = 16
GROUPS = (32, 128)


def is_symmetric(packed: torch.Tensor, group: int) -> bool:
    """Whether packed weights have no minima: then level l stands for ``(l - 8) * scale``, otherwise for ``l * scale + minimum``."""
    return packed.shape[2] == OUTPUTS * (2 + group // 2)


def pack(levels: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, group: int) -> torch.Tensor:
    """Pack a weight of N outputs and K inputs, in G groups; a last group that is not full is filled up with zeros.

    Args:
        levels: [N, K] uint8, 0 to 15.
        scale: [N, G] fp16.
        minimum: [N, G] fp16, or None for a symmetric weight.
        group: inputs of a group, 32 or 128.

    Returns:
        [ceil(N / 16), G, bytes of a block] uint8.
    """
    (n, k), groups = levels.shape, scale.shape[1]
    blocks = -(-n // OUTPUTS)
    filled = levels.new_zeros(blocks * OUTPUTS, groups * group)
    filled[:n, :k] = levels
    # output o, chunk c, half h, input j of four
    halves = filled.view(blocks, OUTPUTS, groups, group // 8, 2, 4).permute(0, 2, 3, 4, 1, 5)
    nibbles = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).reshape(blocks, groups, -1)
    headings = [_by_block(each, blocks) for each in (scale, minimum) if each is not None]
    return torch.cat([*headings, nibbles], -1).contiguous()


def unpack(packed: torch.Tensor, n: int, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return levels [N, K] uint8, scale [N, G] fp16, and minimum [N, G] fp16 or None: what `pack` was given."""
    blocks, groups, _ = packed.shape
    heading = 2 * OUTPUTS
    headings = packed[:, :, : packed.shape[2] - OUTPUTS * group // 2]
    scale, *rest = (part.contiguous().view(torch.float16).transpose(1, 2).reshape(-1, groups)[:n] for part in headings.split(heading, -1))
    nibbles = packed[:, :, headings.shape[2] :].reshape(blocks, groups, group // 8, 1, OUTPUTS, 4)
    halves = torch.cat([nibbles & 15, nibbles >> 4], 3)
    levels = halves.permute(0, 4, 1, 2, 3, 5).reshape(blocks * OUTPUTS, groups * group)[:n, :k]
    return levels, scale, rest[0] if rest else None


def values(packed: torch.Tensor, unit: torch.Tensor, k: int, group: int) -> torch.Tensor:
    """The weight [N, K] in fp32: ``(level * scale + minimum) * unit``.

    Args:
        unit: [N] fp32, a power of two for each output.
    """
    levels, scale, minimum = unpack(packed, len(unit), k, group)
    wide = levels.float()
    if minimum is None:
        weight = (wide - 8) * _by_input(scale, k, group)
    else:
        weight = wide * _by_input(scale, k, group) + _by_input(minimum, k, group)
    return weight * unit[:, None].float()


def _by_block(each: torch.Tensor, blocks: int) -> torch.Tensor:
    n, groups = each.shape
    filled = each.new_zeros(blocks * OUTPUTS, groups)
    filled[:n] = each
    return filled.view(blocks, OUTPUTS, groups).transpose(1, 2).contiguous().view(torch.uint8)


def _by_input(each: torch.Tensor, k: int, group: int) -> torch.Tensor:
    return each.float().repeat_interleave(group, 1)[:, :k]
