"""int4_linear and its layout against arithmetic on plain numbers, on every kind of instructions that it is written for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from patchkit.kernels import native
from patchkit.kernels.int4_layout import is_symmetric, pack, unpack, values
from patchkit.kernels.int4_linear import _kernel, _level, int4_linear

# Of the machine's own instructions these are left out.
LEVELS = {"all": [], "AVX2": ["-mno-avx512f"], "plain": ["-mno-avx", "-mno-avx2"]}


def parts(
    n: int, k: int, group: int, symmetric: bool, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Levels, scales, minima and units."""
    generator = torch.Generator().manual_seed(seed)
    scale = (torch.rand(n, -(-k // group), generator=generator) + 0.1).half()
    minimum = None if symmetric else (-7 * scale + torch.randn(scale.shape, generator=generator)).half()
    levels = torch.randint(16, (n, k), generator=generator, dtype=torch.uint8)
    return levels, scale, minimum, 2.0 ** torch.randint(-6, -3, (n,), generator=generator)


def by_hand(levels: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None, unit: torch.Tensor, group: int) -> torch.Tensor:
    """The weight in float64, number by number."""
    weight = torch.zeros(levels.shape, dtype=torch.float64)
    for n in range(levels.shape[0]):
        for k in range(levels.shape[1]):
            level, step = int(levels[n, k]), float(scale[n, k // group])
            value = (level - 8) * step if minimum is None else level * step + float(minimum[n, k // group])
            weight[n, k] = value * float(unit[n])
    return weight


def weight_of(n: int, k: int, group: int = 32, symmetric: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed levels, units, and the weight in float64."""
    levels, scale, minimum, unit = parts(n, k, group, symmetric)
    return pack(levels, scale, minimum, group), unit, by_hand(levels, scale, minimum, unit, group)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run over these instructions only."""
    if (reason := _kernel()[1]) is not None:
        pytest.skip(reason)
    best = _level()
    monkeypatch.setattr(native, "_FLAGS", native._FLAGS + LEVELS[request.param])
    _clear()
    wanted = {"all": best, "AVX2": 2, "plain": 1}[request.param]
    if _kernel()[1] is not None or _level() != wanted:
        pytest.skip(f"this compiler or processor has no such level ({_kernel()[1]})")
    yield request.param
    monkeypatch.undo()
    _clear()


def _clear() -> None:
    _kernel.cache_clear()
    _level.cache_clear()


def native_run(*args: Any) -> torch.Tensor:
    return int4_linear.backends["native"].run(*args)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 32), (17, 67, 32), (33, 300, 128)])
def test_packing_is_undone_and_has_the_bytes_that_it_says(n: int, k: int, group: int, symmetric: bool) -> None:
    levels, scale, minimum, unit = parts(n, k, group, symmetric)
    packed = pack(levels, scale, minimum, group)
    assert packed.shape == (-(-n // 16), -(-k // group), 16 * (2 if symmetric else 4) + 8 * group)
    assert is_symmetric(packed, group) == symmetric
    for found, given in zip(unpack(packed, n, k, group), (levels, scale, minimum), strict=True):
        assert found is given is None or torch.equal(found, given)
    assert error(values(packed, unit, k, group), by_hand(levels, scale, minimum, unit, group)) < 1e-6


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_every_level_of_instructions_gives_the_same_bits(level: str, activation: str) -> None:
    """And those are the product with the weight, of rounded activations in "int8"."""
    for n, k, group, symmetric in ((40, 96, 32, False), (33, 67, 32, True), (16, 300, 128, False), (5, 256, 128, True)):
        packed, unit, weight = weight_of(n, k, group, symmetric)
        x = torch.randn(11, k, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 11)[:, None]
        bias = torch.randn(n, generator=torch.Generator().manual_seed(2))
        found = native_run(x, packed, unit, bias, group, activation)
        rows = x.double()
        if activation == "int8":
            for first in range(0, k, group):
                step = (x[:, first : first + group].abs().amax(1, keepdim=True) / 127).double()
                rows[:, first : first + group] = (rows[:, first : first + group] / step).round() * step
        assert error(found, rows @ weight.T + bias) < 5e-5
        known = _seen.setdefault((n, k, group, symmetric, activation), found)
        assert torch.equal(found, known), "another level has other bits"


_seen: dict[Any, torch.Tensor] = {}


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_a_row_has_the_same_bits_whatever_is_beside_it(level: str, activation: str) -> None:
    packed, unit, _ = weight_of(70, 160)
    x = torch.randn(19, 160, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([native_run(row[None], packed, unit, None, 32, activation) for row in x])
    for rows in range(1, 20):
        assert torch.equal(native_run(x[:rows].contiguous(), packed, unit, None, 32, activation), alone[:rows]), rows


def test_many_rows_and_any_number_of_threads() -> None:
    """More rows than are quantised at once, and more threads than blocks of outputs."""
    packed, unit, weight = weight_of(50, 40)
    x = torch.randn(600, 40, generator=torch.Generator().manual_seed(4))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            found.append(int4_linear(x, packed, unit))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert error(found[0], x.double() @ weight.T) < 5e-5


def test_activations_are_rounded_by_group_and_not_by_token() -> None:
    packed, unit, weight = weight_of(24, 64)
    quiet = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    loud = 1e4 * quiet
    quiet[0, :32] = loud[0, 32:] = 0
    found = int4_linear(loud + quiet, packed, unit, None, 32, "int8") - int4_linear(loud, packed, unit, None, 32, "int8")
    assert error(found, quiet.double() @ weight.T) < 0.05
    assert not (quiet / (loud.abs().max() / 127)).round().any(), "one step for the token would lose the second group"


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_rows_that_are_not_finite_show_it(level: str, activation: str) -> None:
    packed, unit, _ = weight_of(8, 64)
    x = torch.ones(3, 64)
    x[0, 3], x[2, 40] = float("inf"), float("nan")
    y = native_run(x, packed, unit, None, 32, activation)
    assert not y[0].isfinite().any() and y[1].isfinite().all() and not y[2].isfinite().any()


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_fp16_does_not_overflow(activation: str) -> None:
    """|y| = 60 with 2560 inputs, of levels whose sum without scales is far beyond fp16's 65504."""
    k = 2560
    packed = pack(torch.full((4, k), 15, dtype=torch.uint8), torch.full((4, k // 32), 1024.0).half(), None, 32)
    unit = torch.full((4,), 2.0**-17)
    x = torch.full((1, k), 60 / (k * 7 * 1024 * 2.0**-17), dtype=torch.float16)
    y = int4_linear(x, packed, unit, None, 32, activation)
    assert y.dtype == torch.float16 and (y - 60).abs().max() < 0.1


def test_units_may_be_of_any_dtype() -> None:
    """As `model.to(torch.bfloat16)` leaves them: a power of two is the same number in all of them."""
    packed, unit, _ = weight_of(20, 96)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(6))
    assert torch.equal(int4_linear(x, packed, unit.bfloat16()), int4_linear(x, packed, unit))


def test_what_the_native_backend_refuses() -> None:
    packed, unit, _ = weight_of(20, 64)
    x = torch.ones(3, 64)
    reasons = {
        "empty": (x[:0], packed, unit, None, 32),
        "groups of 16": (x, packed, unit, None, 16),
        "no linear layer's shapes": (torch.ones(3, 96), packed, unit, None, 32),
        "unit [40]": (x, packed, torch.ones(40), None, 32),
        "bias [3]": (x, packed, unit, torch.ones(3), 32),
        "meta tensors": (x.to("meta"), packed, unit, None, 32),
    }
    for word, args in reasons.items():
        assert word in str(int4_linear.explain(*args)["native"])


def test_the_definition_by_hand() -> None:
    # Of one output and two groups: (3 - 8) * 0.5, (15 - 8) * 0.5, and after 32 inputs (0 - 8) * 2.
    levels = torch.full((1, 33), 8, dtype=torch.uint8)
    levels[0, 0], levels[0, 1], levels[0, 32] = 3, 15, 0
    x = torch.zeros(1, 33, dtype=torch.float64)
    x[0, 0], x[0, 1], x[0, 32] = 1.0, 10.0, 127.0
    packed, unit = pack(levels, torch.tensor([[0.5, 2.0]]).half(), None, 32), torch.tensor([0.25])
    assert int4_linear.exact(x, packed, unit)[0].tolist() == [[0.25 * (-2.5 + 35.0 - 127 * 16.0)]]
    minimum = torch.tensor([[1.0, -3.0]]).half()
    packed = pack(levels, torch.tensor([[0.5, 2.0]]).half(), minimum, 32)
    assert int4_linear.exact(x, packed, unit)[0].tolist() == [[0.25 * (2.5 + 85.0 - 127 * 3.0)]]
    # A step of 1 / 64 in the first group, and a tie.
    x[0, 0], x[0, 1] = 32.5 / 64, 127 / 64
    assert int4_linear.exact(x, packed, unit, None, 32, "int8")[0].tolist() == [[0.25 * (2.5 * 32 / 64 + 8.5 * 127 / 64 - 127 * 3.0)]]
