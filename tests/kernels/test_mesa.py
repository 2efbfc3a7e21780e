"""mesa against ridge regression, token by token."""

from __future__ import annotations

import pytest
import torch

from patchkit.errors import KernelError
from patchkit.kernels.op import VARIABLE
from patchkit.kernels.research.mesa import mesa
from patchkit.testing import TOLERANCES

TOLERANCE = TOLERANCES[torch.float32].ratio


def drawn(b=2, h=4, g=2, t=50, k=12, v=20):
    generator = torch.Generator().manual_seed(0)
    shapes = (b, h, t, k), (b, g, t, k), (b, g, t, v)
    return *(torch.randn(shape, generator=generator) for shape in shapes), torch.rand(g, k, generator=generator) + 0.5


def ridge_regression(q, k, v, regularizer):
    """Least squares of [keys; sqrt(regularizer)] on [values; 0], and what it predicts for the query."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            penalty = regularizer[g].double().sqrt().diag()
            for t in range(q.shape[2]):
                seen = torch.cat([k[b, g, : t + 1].double(), penalty])
                wanted = torch.cat([v[b, g, : t + 1].double(), torch.zeros(len(penalty), v.shape[-1], dtype=torch.float64)])
                out[b, h, t] = q[b, h, t].double() @ torch.linalg.lstsq(seen, wanted).solution
    return out


def off(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)


@pytest.mark.parametrize("tokens", [1, 16, 17, 50])
def test_it_is_ridge_regression(tokens):
    q, k, v, regularizer = drawn(t=tokens)
    out = mesa(q, k, v, regularizer, None, None, None, 16)[0]
    assert off(out, ridge_regression(q, k, v, regularizer)) < TOLERANCE
    # A token late is another thing, and so is another penalty.
    assert off(out, ridge_regression(q, k, v, 2 * regularizer)) > 100 * TOLERANCE
    if tokens > 1:
        assert off(out[:, :, 1:], ridge_regression(q, k, v, regularizer)[:, :, :-1]) > 0.1


def test_it_recalls_what_it_has_seen():
    _, k, v, regularizer = drawn(h=2, t=12)
    out = mesa(k, k, v, regularizer * 1e-6)[0]
    assert off(out, v) < 1e-3  # 12 keys of 12 dimensions, almost no penalty: the value of the newest key


@pytest.mark.parametrize("split", [1, 16, 37])
def test_split_here_and_resumed_there_is_the_whole(split):
    q, k, v, regularizer = drawn()
    whole = mesa(q, k, v, regularizer, None, None, None, 16)
    first = mesa(*(x[:, :, :split] for x in (q, k, v)), regularizer, None, None, None, 16)
    second = mesa(*(x[:, :, split:] for x in (q, k, v)), regularizer, *first[1:], None, 16)
    assert off(torch.cat([first[0], second[0]], 2), whole[0]) < TOLERANCE
    assert off(second[1], whole[1]) < TOLERANCE and off(second[2], whole[2]) < TOLERANCE


def test_padding_is_as_if_it_were_not_there():
    q, k, v, regularizer = drawn()
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) > 0.4
    out = mesa(q, k, v, regularizer, None, None, mask)[0]
    for row in range(2):
        alone = mesa(*(x[row : row + 1, :, mask[row]] for x in (q, k, v)), regularizer)[0]
        assert off(out[row : row + 1, :, mask[row]], alone) < TOLERANCE


def test_a_regularizer_that_is_not_positive_is_refused():
    q, k, v, regularizer = drawn()
    with pytest.raises(KernelError, match="has to be positive"):
        mesa(q, k, v, regularizer - regularizer.min())
