"""Rotary position embeddings: angles, and rotations of keys and queries by them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary position embedding (Su et al. 2021, RoFormer) as one attention module applies it.

    Attributes:
        style: "half" pairs dimension d with d + n/2, "interleaved" pairs 2d with 2d + 1.
        frequencies: [n/2] float64, radians per position.
        start: first of the n rotated dimensions, in the queries and keys that the attention function receives.
        slot: which of the two tensors given to ``Cache.update`` is rotated: "values" only for multi-head latent attention.
        cached_start: first rotated dimension in that tensor.
        buffer: name of the module buffer that holds the frequencies.
    """

    style: Literal["half", "interleaved"]
    frequencies: torch.Tensor
    start: int
    slot: Literal["keys", "values"]
    cached_start: int
    buffer: str

    def follow(self, buffer: torch.Tensor) -> None:
        """Read the frequencies from the module's ``buffer`` [n/2] again: the model was moved to another dtype, which rounds them."""
        sign = -1 if self.buffer.startswith("-") else 1  # see `run_probe`
        object.__setattr__(self, "frequencies", sign * buffer.detach().double().cpu())

    @property
    def width(self) -> int:
        """Number n of rotated dimensions."""
        return 2 * self.frequencies.numel()

    def angles(self, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [..., n] (float32) that rotate by ``offsets`` [...] positions; exact for any offset up to 2^53."""
        angle = offsets.to(torch.float64)[..., None] * self.frequencies.to(offsets.device)
        angle = torch.cat([angle, angle], -1) if self.style == "half" else angle.repeat_interleave(2, -1)
        return angle.cos().float(), angle.sin().float()

    def quarter_rotated(self, x: torch.Tensor) -> torch.Tensor:
        """Every pair (a, b) of the last dimension n becomes (-b, a), so that a rotation by t is ``x cos t + quarter_rotated(x) sin t``."""
        if self.style == "half":
            a, b = x.chunk(2, -1)
            return torch.cat([-b, a], -1)
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)

    def rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate the dimensions start .. start + n of ``x`` [..., K], computed in float32, by cosine and sine [..., n]; keep x's dtype."""
        part = x[..., start : start + self.width].float()
        rotated = (part * cos + self.quarter_rotated(part) * sin).to(x.dtype)
        if self.width == x.shape[-1]:
            return rotated
        return torch.cat([x[..., :start], rotated, x[..., start + self.width :]], -1)

    def cached_part(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A view of the n rotated dimensions [..., n] of what ``Cache.update`` is given, in keys [..., K] or values [..., V]."""
        x = keys if self.slot == "keys" else values
        return x[..., self.cached_start : self.cached_start + self.width]

    def rotate_cached(
        self, keys: torch.Tensor, values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, G, T, K] and values [B, G, T, V] as ``Cache.update`` is given them, with those of the two that rotate rotated."""
        cos, sin = cos.to(keys.device), sin.to(keys.device)
        if self.slot == "keys":
            return self.rotate(keys, cos, sin, self.cached_start), values
        return keys, self.rotate(values, cos, sin, self.cached_start)


def same_rotary(a: Rotary | None, b: Rotary | None) -> bool:
    """Whether two layers rotate their keys in the same way, so that angles computed for one serve the other."""
    if a is None or b is None:
        return a is b
    mine, other = dataclasses.astuple(a), dataclasses.astuple(b)
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(mine, other, strict=True))
