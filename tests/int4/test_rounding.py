"""Rounding to 4 bits: weights that are on a grid keep their values, others come as near as the rule says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from patchkit.int4.clipped import clipped
from patchkit.int4.error_feedback import influence_of, with_feedback
from patchkit.int4.grid import on_a_grid
from patchkit.int4.grouped import groups_of, unit_of
from patchkit.int4.importance import importance_of
from patchkit.int4.scheme import Int4Scheme

RANDOM = torch.Generator().manual_seed(0)


def bell(*shape: int) -> torch.Tensor:
    """Weights as models have them: bell-shaped, with a few large ones."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02
    weight.view(-1)[::97] *= 4
    return weight


def q4(kind: str, rows: int, columns: int) -> torch.Tensor:
    """A weight that llama.cpp's format has been through."""
    gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    packed = gguf.quantize(bell(rows, columns).numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(np.array(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
@pytest.mark.parametrize(("kind", "symmetric"), [("Q4_0", True), ("Q4_0", False), ("Q4_1", False)])
def test_blocks_of_gguf_keep_their_bits(kind: str, symmetric: bool, scale: float) -> None:
    """Whatever the size of the numbers, as far as fp16 lets the format have them."""
    weight = q4(kind, 48, 96)
    if scale != 1.0:
        weight = weight * 2.0 ** round(np.log2(scale))
    for squares in (None, torch.rand(96, generator=RANDOM).double()):
        assert torch.equal(Int4Scheme(symmetric=symmetric).quantize(weight, squares=squares).dequantize(), weight)


def test_one_weight_beside_the_grid_is_enough() -> None:
    weight = q4("Q4_1", 40, 64)
    groups = groups_of(weight, unit_of(weight), 32)
    assert on_a_grid(groups, False) is not None
    for where in ((0, 0), (13, 1), (39, 1)):
        other = groups.clone()
        other[where][5] += 0.3 * (other[where].max() - other[where].min()) / 15
        assert on_a_grid(other, False) is None
    assert on_a_grid(groups, True) is None, "blocks with minima are on no symmetric grid"


def test_grids_of_every_span_are_found() -> None:
    """Also where the levels at the ends are not used, or a group has one value."""
    step = torch.tensor(0.3).half().float()
    minimum = torch.tensor(-2.1).half().float()
    for low, high in ((0, 15), (0, 14), (1, 15), (0, 8), (8, 15), (5, 12), (7, 8), (2, 2), (8, 8), (15, 15)):
        levels = torch.randint(low, high + 1, (2, 2, 32), generator=RANDOM)
        for groups, symmetric in ((levels * step + minimum, False), ((levels - 8) * step, False), ((levels - 8) * step, True)):
            found = on_a_grid(groups, symmetric)
            assert found is not None and torch.equal(found.values(), groups), (low, high, symmetric)


def squared(weight: torch.Tensor, scheme: Int4Scheme) -> float:
    return float((scheme.quantize(weight).dequantize() - weight).double().square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_clipping_is_better_than_the_whole_range_and_no_grid_nearby_is_better(group: int, symmetric: bool) -> None:
    weight = bell(32, 256)
    groups = groups_of(weight, torch.ones(32), group)
    found = clipped(groups, torch.ones(groups.shape[1:]).double(), symmetric)
    assert found.levels.min() >= 0 and found.levels.max() <= 15 and torch.equal(found.levels, found.levels.round())
    error = (groups - found.values()).double().square().sum(-1)
    # By definition: the whole range.
    if symmetric:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        step = -extreme / 8
        naive = (groups / step).round().clamp(-8, 7) * step
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / 15
        naive = ((groups - low) / step).round() * step + low
    worst = (groups - naive).double().square().sum(-1)
    assert (error <= 1.001 * worst).all() and error.sum() < 0.95 * worst.sum()
    # Levels are the nearest of the grid.
    levels = torch.arange(16.0)
    grid = (levels - 8) * found.scale.float()[..., None] if found.minimum is None else (
        levels * found.scale.float()[..., None] + found.minimum.float()[..., None]
    )  # fmt: skip
    assert (error <= (groups[..., None] - grid[..., None, :]).abs().amin(-1).double().square().sum(-1) * (1 + 1e-6) + 1e-12).all()


def test_minima_and_small_groups_are_more_accurate() -> None:
    weight = bell(64, 256)
    error = {(group, symmetric): squared(weight, Int4Scheme(group, symmetric)) for group in (32, 128) for symmetric in (False, True)}
    assert error[32, False] < error[32, True] < error[128, True] and error[32, False] < error[128, False]
    assert error[32, False] < 0.008 * float(weight.double().square().sum())


def test_errors_of_large_inputs_count_more() -> None:
    weight = bell(64, 128)
    squares = torch.logspace(-2, 2, 128)[torch.randperm(128, generator=RANDOM)].double()
    plain, weighted = (Int4Scheme().quantize(weight, squares=given).dequantize() for given in (None, squares))
    by_input = [(found - weight).double().square().sum(0) for found in (plain, weighted)]
    assert (squares * by_input[1]).sum() < 0.7 * (squares * by_input[0]).sum() and by_input[1].sum() > by_input[0].sum()
    # Inputs that the text does not use count a little; no text, or one without a number, counts for nothing.
    assert importance_of(torch.zeros(64).double(), 64, 32, weight.device).eq(1).all()
    assert importance_of(squares * torch.nan, 128, 32, weight.device).eq(1).all()
    unused = importance_of(torch.tensor([0.0, 2.0] * 20), 40, 32, weight.device)
    assert torch.allclose(unused.flatten()[:40], torch.tensor([0.01, 2.01] * 20).double()) and not unused.flatten()[40:].any()


@pytest.mark.parametrize("symmetric", [False, True])
def test_error_feedback_makes_outputs_more_accurate(symmetric: bool) -> None:
    weight = bell(48, 128)
    mixing = torch.randn(30, 128, generator=RANDOM)  # inputs of a model are far from independent
    x, fresh = (torch.randn(400, 30, generator=RANDOM) @ mixing + torch.randn(400, 128, generator=RANDOM) for _ in range(2))
    groups, moment = groups_of(weight, torch.ones(48), 32), x.T @ x
    importance = importance_of(moment.diagonal(), 128, 32, weight.device)
    found = with_feedback(groups, importance, influence_of(moment), symmetric).values().flatten(1)
    plain = clipped(groups, importance, symmetric).values().flatten(1)
    for rows, share in ((x, 0.6), (fresh, 0.8)):
        assert ((found - weight) @ rows.T).square().sum() < share * ((plain - weight) @ rows.T).square().sum()
    assert (found - weight).square().sum() > (plain - weight).square().sum()


def test_inputs_that_never_occur_do_not_matter() -> None:
    groups = groups_of(bell(16, 64), torch.ones(16), 32)
    x = torch.randn(100, 64, generator=RANDOM)
    x[:, 10:20] = 0
    assert with_feedback(groups, torch.ones(2, 32).double(), influence_of(x.T @ x), False).values().isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_numbers_at_the_ends_of_the_range(symmetric: bool) -> None:
    scheme = Int4Scheme(symmetric=symmetric)
    weight = bell(6, 70)
    weight[1], weight[2], weight[3] = 0, weight[2] * 1e-35, weight[3] * 1e38
    found = scheme.quantize(weight).dequantize()
    for row in (0, 2, 3, 4, 5):
        assert (found[row] / weight[row].abs().max() - weight[row] / weight[row].abs().max()).abs().max() < 0.15, row
    assert not found[1].any()
    weight[4, 3], weight[5, 60] = torch.inf, torch.nan
    found = scheme.quantize(weight).dequantize()
    assert not found[4, :32].isfinite().any() and not found[5, 32:64].isfinite().any()
    assert found[:4].isfinite().all() and found[4, 32:].isfinite().all() and found[5, :32].isfinite().all()


def test_transposed_weights_and_16_bits_are_rounded_as_they_are() -> None:
    weight = bell(40, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = weight.to(dtype)
        found = Int4Scheme().quantize(given)
        turned = Int4Scheme().quantize(given.T.contiguous(), transposed=True)
        assert torch.equal(found.dequantize(), turned.dequantize().T) and turned.shape == (64, 40)
        assert found.dtype == dtype and torch.equal(found.qdata, Int4Scheme().quantize(given.float()).qdata)


def test_many_rows_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = bell(100, 64)
    whole = Int4Scheme().quantize(weight)
    monkeypatch.setattr("patchkit.int4.scheme._AT_ONCE", 64 * 32)
    monkeypatch.setattr("patchkit.int4.clipped._AT_ONCE", 7)
    parts = Int4Scheme().quantize(weight)
    assert torch.equal(whole.qdata, parts.qdata) and torch.equal(whole.scale, parts.scale)
