"""Definitions of ops in float64 against plain Python and figures worked out by hand."""

from __future__ import annotations

import torch

from patchkit.kernels.int8_linear import int8_linear
from patchkit.kernels.kv_append import kv_append
from patchkit.kernels.verify_prefix import verify_prefix
from patchkit.kernels.verify_prefix_sampled import verify_prefix_sampled
from patchkit.testing import TOLERANCES


def test_int8_linear_against_plain_python():
    # A step of 1/64, and a tie.
    x, scale, bias = [[32.5 / 64, -127 / 64, 1.26], [0.0, 0.0, 0.0]], [0.25, 2.0], [1.0, -1.0]
    weight = [[1, -127, 5], [7, 0, 2]]
    args = torch.tensor(x, dtype=torch.float64), torch.tensor(weight, dtype=torch.int8), torch.tensor(scale), torch.tensor(bias)
    for activation in ("float", "int8"):
        rows = x if activation == "float" else [[round(a * 64) / 64 for a in row] for row in x]
        by_hand = [
            [sum(a * w for a, w in zip(row, ws, strict=True)) * s + b for ws, s, b in zip(weight, scale, bias, strict=True)] for row in rows
        ]
        (exact,) = int8_linear.exact(*args, activation)
        torch.testing.assert_close(exact, torch.tensor(by_hand, dtype=torch.float64), rtol=TOLERANCES[torch.float64].ratio, atol=0)
    groups = torch.tensor([[1.0, 10.0], [1.0, 1.0]])
    (y,) = int8_linear.exact(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]], dtype=torch.int8), groups)
    assert y.tolist() == [[73.0, 10.0]]


def test_verification_and_kv_append_by_hand():
    logits = torch.tensor([[[1.0, 3.0, 3.0], [2.0, 0.0, 1.0], [0.0, 0.0, 5.0]]] * 2)
    choice, accepted = verify_prefix.exact(logits, torch.tensor([[1, 0], [2, 0]]), torch.tensor([2, 2]))
    assert choice.tolist() == [[1, 0, 2]] * 2 and accepted.tolist() == [2, 0]

    p, q = torch.tensor([[[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]] * 3), torch.tensor([[[1.0, 0.0, 0.0]]] * 3)
    given = p, q, torch.zeros(3, 1, dtype=torch.int64), torch.tensor([1, 1, 0]), torch.tensor([[0.4], [0.5], [0.0]])
    accepted, token = verify_prefix_sampled.exact(*given, torch.tensor([0.4, 0.6, 0.6]))
    # after a rejection from (0, 1/4, 1/4), after an acceptance from the second position, without a draft from the first
    assert accepted.tolist() == [1, 0, 0] and token.tolist() == [1, 2, 1]

    cache, new = torch.zeros(1, 1, 3, 3), torch.tensor([[[[1.0, 2.0, 3.0]]]])
    keys, values = kv_append.exact(cache, cache + 1, new, new + 1, torch.tensor([1]))
    assert keys.tolist() == [[[[0.0] * 3, [1.0, 2.0, 3.0], [0.0] * 3]]] and values.tolist() == [[[[1.0] * 3, [2.0, 3.0, 4.0], [1.0] * 3]]]
    assert not cache.any()
