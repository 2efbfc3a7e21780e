"""Keys and values in int8, with one scale per token and kv head, and the rotation of keys to positions of their own.

Shapes: B rows, G kv heads, N tokens, D dimensions of a key or value, n rotated dimensions, C rows of a coarse table.

*Packed* tensors [..., D + 2] int8 hold a vector x [..., D] as its codes c and its scale s, ``x[d] = s c[d]``: c is a whole number from -127
to 127, the nearest one, and s is max |x| / 127 in bfloat16, whose two bytes come last, the low one first.

An *offset* is ``256 * row + column``, an angle: that of the coarse table's row plus that of the fine table's column. So the tables for N
positions have N / 256 and 256 rows, and no sine is computed for a single key. A table is [rows, 2, n/2] float32: cosines and sines.
"""

from __future__ import annotations

import torch

# Bytes of a scale.
SCALE = 2

# Rows of a fine table.
FINE = 256


def pack(x: torch.Tensor) -> torch.Tensor:
    """Pack ``x`` [..., D], of any floating dtype, into int8 [..., D + 2]."""
    x = x.float()
    bits = (x.abs().amax(-1, keepdim=True) / 127).view(torch.int32)
    # To the nearest bfloat16, ties to even. Not by a cast and a cast back, which a compiler leaves out.
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    scale = bits.view(torch.float32)
    codes = (x / torch.where(scale == 0, 1.0, scale)).round().clamp(-127, 127)
    # Shifted up and down again, a byte becomes a signed one.
    return torch.cat([codes.to(torch.int8), ((bits << 8) >> 24).to(torch.int8), (bits >> 24).to(torch.int8)], -1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Return [..., D] float32 of ``packed`` [..., D + 2] int8."""
    low, high = packed[..., -2:-1].int(), packed[..., -1:].int()
    scale = ((high << 24) | ((low & 0xFF) << 16)).view(torch.float32)
    return packed[..., :-SCALE].float() * scale


def angles_at(offsets: torch.Tensor, coarse: torch.Tensor, fine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [..., n/2] of the offsets [...], from tables [C, 2, n/2] and [256, 2, n/2]."""
    (a, b), (c, d) = coarse[offsets >> 8].unbind(-2), fine[offsets & 255].unbind(-2)
    return a * c - b * d, b * c + a * d


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int, interleaved: bool) -> torch.Tensor:
    """Rotate the n dimensions from ``start`` on of ``x`` [..., D] float32 by cosine and sine [..., n/2].

    Args:
        interleaved: dimensions 2d and 2d + 1 are a pair, else d and d + n/2.
    """
    width = 2 * cos.shape[-1]
    if not width:
        return x
    part = x[..., start : start + width]
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = part.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return turned if width == x.shape[-1] else torch.cat([x[..., :start], turned, x[..., start + width :]], -1)
