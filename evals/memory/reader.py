"""A bare forward of smollm2 (any Llama of transformers) whose attention is given from outside: what the trials of memory rules run on.

Shapes: B batch rows, T tokens, H query heads, G kv heads, K key dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

# attend(layer, q, k, v): q [B, H, T, K], k and v [B, G, T, K], none of them rotated; returns [B, H, T, K].
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Reader:
    """The weights of a Llama, and its rotary embedding."""

    def __init__(self, model: Any, longest: int = 40960) -> None:
        self.decoder, self.head = model.model, model.lm_head
        config = model.config
        self.heads, self.groups, self.layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        cos, sin = self.decoder.rotary_emb(torch.zeros(1), torch.arange(longest)[None])
        self.cos, self.sin = cos[0], sin[0]

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x [..., T, K] to ``positions`` [..., T]."""
        cos, sin = self.cos[positions], self.sin[positions]
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def hidden(self, ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Last hidden states [B, T, E] of token ids [B, T]."""
        batch, tokens = ids.shape
        h = self.decoder.embed_tokens(ids)
        for index, layer in enumerate(self.decoder.layers):
            x = layer.input_layernorm(h)
            attention = layer.self_attn
            q, k, v = (
                project(x).view(batch, tokens, -1, self.dim).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            o = attend(index, q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
            h = h + attention.o_proj(o)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.decoder.norm(h)


class Full:
    """Attention to everything; keeps unrotated keys [B, G, n, K], values and, if asked for, queries [B, H, n, K]."""

    def __init__(self, reader: Reader, room: int, batch: int, queries: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.reader, self.seen = reader, 0
        shape = (batch, reader.groups, room, reader.dim)
        self.k = [torch.empty(shape, dtype=dtype) for _ in range(reader.layers)]
        self.r = [torch.empty(shape, dtype=dtype) for _ in range(reader.layers)]  # rotated
        self.v = [torch.empty(shape, dtype=dtype) for _ in range(reader.layers)]
        wide = (batch, reader.heads, room, reader.dim)
        self.q = [torch.empty(wide, dtype=torch.bfloat16) for _ in range(reader.layers)] if queries else None

    def __call__(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        start, tokens = self.seen, q.shape[2]
        end = start + tokens
        at = torch.arange(start, end)
        self.k[index][:, :, start:end], self.v[index][:, :, start:end] = k, v
        self.r[index][:, :, start:end] = self.reader.rotate(k, at)
        if self.q is not None:
            self.q[index][:, :, start:end] = q
        mask = (torch.arange(end)[None] <= at[:, None])[None, None]
        return F.scaled_dot_product_attention(
            self.reader.rotate(q, at), self.r[index][:, :, :end], self.v[index][:, :, :end], attn_mask=mask, enable_gqa=True
        )

    def read(self, ids: torch.Tensor, chunk: int = 512, progress: bool = False) -> torch.Tensor:
        """Read ids [B, T]; returns the last hidden state of each row [B, E]."""
        for part in ids.split(chunk, 1):
            h = self.reader.hidden(part, self)
            self.seen += part.shape[1]
            if progress:
                print("read", self.seen, flush=True)
        return h[:, -1]


class Asked:
    """Attention of a question over some of the tokens read: ``visible`` [B, G, n] per layer, and the question itself."""

    def __init__(self, read: Full, end: int, visible: list[torch.Tensor]) -> None:
        self.read, self.end, self.visible, self.seen = read, end, list(visible), 0
        self.r: list[Any] = [None] * read.reader.layers
        self.v: list[Any] = [None] * read.reader.layers
        for index in range(read.reader.layers):
            # Only the tokens that some row sees: the widest row's number of them.
            seen = visible[index]
            most = int(seen.sum(-1).max())
            rank = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
            self.r[index] = read.r[index][:, :, :end].gather(2, rank[..., None].expand(-1, -1, -1, read.reader.dim))
            self.v[index] = read.v[index][:, :, :end].gather(2, rank[..., None].expand(-1, -1, -1, read.reader.dim))

            self.visible[index] = seen.gather(2, rank)

    def __call__(self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        reader, tokens = self.read.reader, q.shape[2]
        at = torch.arange(self.end + self.seen, self.end + self.seen + tokens)
        self.r[index] = torch.cat([self.r[index], reader.rotate(k, at)], 2)
        self.v[index] = torch.cat([self.v[index], v], 2)
        past = self.visible[index].repeat_interleave(reader.heads // reader.groups, 1)[:, :, None].expand(-1, -1, tokens, -1)
        own = torch.arange(self.seen + tokens)[None] <= self.seen + torch.arange(tokens)[:, None]
        mask = torch.cat([past, own.expand(*past.shape[:2], -1, -1)], -1)
        return F.scaled_dot_product_attention(reader.rotate(q, at), self.r[index], self.v[index], attn_mask=mask, enable_gqa=True)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, vocabulary] after ids [B, T]."""
        h = self.read.reader.hidden(ids, self)
        self.seen += ids.shape[1]
        return self.read.reader.head(h)
