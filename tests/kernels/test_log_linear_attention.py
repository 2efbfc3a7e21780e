"""log_linear_attention against a full T x T matrix of weights, its levels found by cutting the past as the paper says."""

from __future__ import annotations

import pytest
import torch

from patchkit.errors import KernelError
from patchkit.kernels.linear_attention import linear_attention
from patchkit.kernels.op import VARIABLE
from patchkit.kernels.research.log_linear_attention import log_linear_attention
from patchkit.testing import TOLERANCES

TOLERANCE = TOLERANCES[torch.float32].ratio


def drawn(b=2, h=4, g=2, t=75, k=12, v=20, levels=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (b, h, t, k), (b, g, t, k), (b, g, t, v), (b, h, t, levels)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def spans(t):
    """(level, first, last + 1) of what token t sees: the largest power of two that fits comes first, then the rest likewise."""
    found, first = [(0, t, t + 1)], 0
    while first < t:
        size = 1
        while first + 2 * size <= t:
            size *= 2
        found.append((size.bit_length(), first, first + size))
        first += size
    return found


def matrix_form(q, k, v, weights):
    tokens, shared = q.shape[2], q.shape[1] // k.shape[1]
    factor = torch.zeros(*q.shape[:3], tokens, dtype=torch.float64)
    for t in range(tokens):
        for level, first, last in spans(t):
            factor[:, :, t, first:last] = weights[:, :, t, level, None].double()
    scores = q.double() @ k.double().repeat_interleave(shared, 1).mT
    return (scores * factor) @ v.double().repeat_interleave(shared, 1)


def off(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)


def test_the_spans_of_a_token():
    assert spans(0) == [(0, 0, 1)]
    assert spans(6) == [(0, 6, 7), (3, 0, 4), (2, 4, 6)]


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 75])
def test_it_is_the_matrix_form(tokens):
    q, k, v, weights = drawn(t=tokens)
    out, _ = log_linear_attention(q, k, v, weights, None, 0, None, 16)
    assert off(out, matrix_form(q, k, v, weights)) < TOLERANCE
    if tokens > 2:  # one weight for all levels is another thing
        assert off(out, matrix_form(q, k, v, weights[..., :1].expand_as(weights))) > 0.1


def test_with_all_weights_1_it_is_linear_attention():
    q, k, v, weights = drawn()
    expected, _, state, _ = linear_attention(q, k, v, None, None, None, "identity", False)
    out, states = log_linear_attention(q, k, v, torch.ones_like(weights))
    assert off(out, expected) < TOLERANCE and off(states.sum(2), state) < TOLERANCE


@pytest.mark.parametrize("split", [1, 16, 37, 64])
def test_split_here_and_resumed_there_is_the_whole(split):
    given = drawn()
    whole, last = log_linear_attention(*given, None, 0, None, 16)
    first, states = log_linear_attention(*(x[:, :, :split] for x in given), None, 0, None, 16)
    second, states = log_linear_attention(*(x[:, :, split:] for x in given), states, split, None, 16)
    assert off(torch.cat([first, second], 2), whole) < TOLERANCE and off(states, last) < TOLERANCE


def test_a_masked_key_is_0():
    q, k, v, weights = drawn()
    mask = torch.rand(2, 75, generator=torch.Generator().manual_seed(1)) > 0.4
    out, _ = log_linear_attention(q, k, v, weights, None, 0, mask)
    assert off(out, matrix_form(q, k * mask[:, None, :, None], v, weights)) < TOLERANCE


def test_bad_input_is_refused_by_name():
    q, k, v, weights = drawn()
    with pytest.raises(KernelError, match="75 tokens have 8 levels, weights are given for 7"):
        log_linear_attention(q, k, v, weights[..., :7])
    with pytest.raises(KernelError, match="chunk=24: give a power of two"):
        log_linear_attention(q, k, v, weights, None, 0, None, 24)
