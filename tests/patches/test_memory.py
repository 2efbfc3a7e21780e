"""Memory against a decoder written out here, in every way of feeding tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cache_of, cached, fast_first, feed

from patchkit import patch_model, report, unpatch_model
from patchkit.errors import StreamError
from patchkit.patches.memory import Memory
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model

SINKS, WINDOW, SLOTS, BLOCK, TOKENS = 2, 8, 5, 4, 60
LOGITS, DIFFERS = TOLERANCES[torch.float32].logits, TOLERANCES[torch.float32].differs
WAYS = [[1] * TOKENS, [7] * 8 + [4], [13] + [1] * 5 + [30, 11, 1], [TOKENS]]


def tokens(rows: int = 1, length: int = TOKENS, seed: int = 3) -> torch.Tensor:
    return torch.randint(4, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def memory(shared=2, **options) -> Memory:
    return Memory(**{**dict(sinks=SINKS, window=WINDOW, slots=SLOTS, block=BLOCK, shared=shared), **options})


def remembering(family="llama", **options):
    return patch_model(tiny_model(family), memory(**options), verbose=False)


def close(actual, expected):
    assert logit_error(actual, expected) <= LOGITS


@torch.no_grad()
def by_definition(model, ids, sinks=SINKS, window=WINDOW, slots=SLOTS, block=BLOCK, shared=2, rotated=False):
    """A Llama written out, token by token, with lists of what each kv head keeps: no cache, no mask, no ring."""
    config = model.config
    dim, heads, groups = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2).double() / dim)

    def turned(x, position):
        angle = (position * frequencies).repeat(2)
        return x * angle.cos() + torch.cat([-x[dim // 2 :], x[: dim // 2]]) * angle.sin()

    layers = [dict(k=[], v=[], kept=[[] for _ in range(groups // shared)]) for _ in model.model.layers]
    logits = []
    for t, token in enumerate(ids[0]):
        hidden = model.model.embed_tokens(token)
        for layer, held in zip(model.model.layers, layers, strict=True):
            if t and t % block == 0:
                keys = torch.stack([torch.stack([turned(k[g], j) if rotated else k[g] for g in range(groups)]) for j, k in enumerate(held["k"])])
                for pool, kept in enumerate(held["kept"]):
                    for j in range(max(sinks, t - window), t - window + block):
                        for g in range(pool * shared, (pool + 1) * shared):
                            cosine = torch.cosine_similarity(keys[j, g], keys[:, g].mean(0), dim=0)
                            kept.append((-round(cosine.item() * 4096), j, g))
                    kept.sort(key=lambda item: (-item[0], *item[1:]))
                    del kept[slots * shared :]
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            q = attention.q_proj(x).view(heads, dim).double()
            k, v = (p(x).view(groups, dim).double() for p in (attention.k_proj, attention.v_proj))
            held["k"].append(k)
            held["v"].append(v)
            mixed = []
            for head in range(heads):
                g = head // (heads // groups)
                seen = {j: t - j for j in range(max(0, t - window + 1), t + 1)}
                seen |= {j: t - j for _, j, its in held["kept"][g // shared] if its == g and j <= t - window}
                seen |= {j: min(t, sinks + window - 1) - j for j in range(min(sinks, t + 1))}
                scores = torch.stack([held["k"][j][g] @ turned(q[head], distance) for j, distance in seen.items()])
                mixed.append((scores * dim**-0.5).softmax(0) @ torch.stack([held["v"][j][g] for j in seen]))
            hidden = hidden + attention.o_proj(torch.cat(mixed).float())
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(model.model.norm(hidden)))
    return torch.stack(logits)[None]


# -- what it computes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"shared": 1}, {"slots": 1, "block": 6}], ids=str)
def test_every_way_of_feeding_gives_the_logits_of_the_definition(family, options):
    model, ids = tiny_model(family), tokens()
    expected = by_definition(model, ids, **options)
    window = by_definition(model, ids, slots=0)
    assert (window - expected)[:, SINKS + WINDOW :].abs().max() > DIFFERS, "the slots change nothing here"
    patch_model(model, memory(**options), verbose=False)
    for way in WAYS:
        close(feed(model, ids, way)[0], expected)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False)
    close(out.logits, expected)
    assert cache_of(out) is None
