"""linear_attention against definitions that share no code with it: a full T x T matrix of weights, and autograd in float64."""

from __future__ import annotations

import inspect

import pytest
import torch

from patchkit.errors import KernelError
from patchkit.kernels.linear_attention import Inputs, linear_attention
from patchkit.kernels.op import VARIABLE
from patchkit.kernels.research.linear_attention_step import linear_attention_step
from patchkit.testing import TOLERANCES

TOLERANCE = TOLERANCES[torch.float32].ratio
MAPS = {"elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "relu": lambda x: x.clamp(min=0), "identity": lambda x: x}


def drawn(b=2, h=4, g=2, t=45, k=12, v=20, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, heads, t, width, generator=generator, dtype=dtype) for heads, width in ((h, k), (g, k), (g, v)))


def matrix_form(q, k, v, mask=None, feature_map="elu1", normalize=True):
    """out and denominator from the matrix of all weights ``f(q_i) . f(k_j)``, j <= i."""
    q, k, v = q.double(), k.double(), v.double()
    f, shared = MAPS[feature_map], q.shape[1] // k.shape[1]
    weights = torch.einsum("bhik,bhjk->bhij", f(q), f(k).repeat_interleave(shared, 1)).tril()
    if mask is not None:
        weights = weights * mask[:, None, None]
    denominator = weights.sum(-1)
    out = weights @ v.repeat_interleave(shared, 1)
    return (out / denominator[..., None]).nan_to_num() if normalize else out, denominator


def off(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv(VARIABLE, request.param)


def test_inputs_have_the_names_and_defaults_of_the_op():
    parameters = inspect.signature(linear_attention.reference).parameters
    assert list(Inputs._fields) == list(parameters)
    assert Inputs._field_defaults == {name: each.default for name, each in parameters.items() if each.default is not each.empty}


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 100])
@pytest.mark.parametrize(("feature_map", "normalize"), [("elu1", True), ("elu1", False), ("relu", True), ("identity", False)])
def test_it_is_the_matrix_form(tokens, feature_map, normalize):
    q, k, v = drawn(t=tokens)
    out, denominator, _, _ = linear_attention(q, k, v, None, None, None, feature_map, normalize, 32)
    expected, sums = matrix_form(q, k, v, None, feature_map, normalize)
    assert off(out, expected) < TOLERANCE and off(denominator, sums) < TOLERANCE
    # A weight on the own token too few, which a wrong diagonal would give, is seen.
    if tokens > 1:
        late = matrix_form(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], None, feature_map, normalize)[0]
        assert off(out[:, :, 1:], late) > 100 * TOLERANCE


def test_state_and_normalizer_are_the_sums_over_all_tokens():
    q, k, v = drawn()
    _, _, state, normalizer = linear_attention(q, k, v)
    f = MAPS["elu1"](k.double())
    assert off(state, f.mT @ v.double()) < TOLERANCE and off(normalizer, f.sum(2)) < TOLERANCE


@pytest.mark.parametrize("split", [1, 20, 32, 44])
def test_split_here_and_resumed_there_is_the_whole(split):
    q, k, v = drawn()
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) > 0.3
    whole = linear_attention(q, k, v, None, None, mask, "elu1", True, 16)
    first = linear_attention(*(x[:, :, :split] for x in (q, k, v)), None, None, mask[:, :split], "elu1", True, 16)
    second = linear_attention(*(x[:, :, split:] for x in (q, k, v)), *first[2:], mask[:, split:], "elu1", True, 16)
    assert off(torch.cat([first[0], second[0]], 2), whole[0]) < TOLERANCE
    assert off(torch.cat([first[1], second[1]], 2), whole[1]) < TOLERANCE
    assert off(second[2], whole[2]) < TOLERANCE and off(second[3], whole[3]) < TOLERANCE
    forgotten = linear_attention(*(x[:, :, split:] for x in (q, k, v)), None, None, mask[:, split:], "elu1", True, 16)
    assert off(forgotten[0], whole[0][:, :, split:]) > 100 * TOLERANCE


@pytest.mark.parametrize("normalize", [True, False])
def test_the_step_is_the_chunk_form_token_by_token(normalize):
    q, k, v = drawn()
    mask = torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) > 0.3
    whole = linear_attention(q, k, v, None, None, mask, "elu1", normalize)
    state, normalizer = torch.zeros(2, 2, 12, 20), torch.zeros(2, 2, 12)
    steps = [
        linear_attention_step(*(x[:, :, t : t + 1] for x in (q, k, v)), state, normalizer, mask[:, t : t + 1], "elu1", normalize)
        for t in range(45)
    ]
    for found, expected in zip([torch.cat(parts, 2) for parts in zip(*steps, strict=True)] + [state, normalizer], whole, strict=True):
        assert found.dtype == expected.dtype and off(found, expected) < TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(padding):
    q, k, v = drawn()
    mask = torch.zeros(2, 45, dtype=torch.bool)
    for row, length in enumerate((45, 29)):
        part = slice(45 - length, 45) if padding == "left" else slice(0, length)
        mask[row, part] = True
    # What stands in the padding is of no account.
    k, v = (torch.where(mask[:, None, :, None], x, 99.0) for x in (k, v))
    out, denominator, state, normalizer = linear_attention(q, k, v, None, None, mask)
    for row in range(2):
        alone = linear_attention(*(x[row : row + 1, :, mask[row]] for x in (q, k, v)))
        assert off(out[row : row + 1, :, mask[row]], alone[0]) < TOLERANCE
        assert off(denominator[row : row + 1, :, mask[row]], alone[1]) < TOLERANCE
        assert off(state[row : row + 1], alone[2]) < TOLERANCE and off(normalizer[row : row + 1], alone[3]) < TOLERANCE
    if padding == "left":
        assert out[1, :, :16].eq(0).all() and denominator[1, :, :16].eq(0).all()  # nothing seen yet: 0, not a NaN


def test_query_heads_share_the_kv_head_of_their_group():
    q, k, v = drawn(h=6, g=2)
    out = linear_attention(q, k, v)[0]
    alike = linear_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))[0]
    other = linear_attention(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))[0]
    assert off(out, alike) < TOLERANCE and off(out, other) > 0.01


@pytest.mark.parametrize(("feature_map", "normalize"), [("elu1", True), ("elu1", False), ("relu", False), ("identity", False)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_recurrence(feature_map, normalize, masked):
    """Autograd through the definition, in float64."""
    q, k, v = drawn(t=19, dtype=torch.float64)
    state = torch.randn(2, 2, 12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    given = [x.requires_grad_() for x in (q, k, v, state, torch.full((2, 2, 12), 3.0, dtype=torch.float64))]
    mask = torch.rand(2, 19, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None
    rest = (mask, feature_map, normalize, 8)
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in linear_attention.reference(*given, *rest)]

    def gradients(form):
        return torch.autograd.grad(sum((x * w).sum() for x, w in zip(form(*given, *rest), weights, strict=True)), given)

    for found, expected in zip(gradients(linear_attention), gradients(linear_attention.reference), strict=True):
        assert found.dtype == torch.float64 and off(found, expected) < 1e-12


def test_gradients_without_a_state_and_of_one_output_only():
    given = [x.requires_grad_() for x in drawn(dtype=torch.float64)]
    found = torch.autograd.grad(linear_attention(*given)[0].square().sum(), given)
    expected = torch.autograd.grad(matrix_form(*given)[0].square().sum(), given)
    assert all(off(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))
    assert found[1].abs().max() > 0


def test_half_precision_inputs_are_summed_in_fp32():
    q, k, v = (x.bfloat16() for x in drawn(t=2000, k=32, v=32))
    out, denominator, state, normalizer = linear_attention(q, k, v)
    assert out.dtype == torch.bfloat16 and {x.dtype for x in (denominator, state, normalizer)} == {torch.float32}
    assert off(out, matrix_form(q, k, v)[0]) < TOLERANCES[torch.bfloat16].ratio
    assert off(denominator, matrix_form(q, k, v)[1]) < TOLERANCE
    assert linear_attention(q, k, v, None, None, None, "elu1", False)[0].dtype == torch.float32


def test_a_traced_gradient_is_the_eager_one():
    given = [x.requires_grad_() for x in drawn()]

    def loss(q, k, v):
        return linear_attention(q, k, v)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(form(*given), given) for form in (compiled, loss))
    torch.compiler.reset()
    assert all(off(a, b) < TOLERANCE for a, b in zip(found, expected, strict=True))


def test_bad_input_is_refused_by_name():
    q, k, v = drawn()
    for rest, words in (((None, None, None, "elu"), "'elu' is unknown.*elu1"), ((None, None, None, "elu1", True, 0), "chunk=0")):
        with pytest.raises(KernelError, match=words):
            linear_attention(q, k, v, *rest)
    with pytest.raises(KernelError, match="4 query heads cannot share 3 kv heads"):
        linear_attention(q, k.repeat(1, 2, 1, 1)[:, :3], v)
    (t, width), (b, g, _, out) = q.shape[2:], v.shape
    for given, name in (
        ((q[:, :, :-1], k, v), "k has shape"),
        ((q, k[..., :-1], v), "k has shape"),
        ((q, k, v[:, :1]), "v has shape"),
        ((q, k, v, torch.zeros(1, 1, width, out)), "state has shape"),
        ((q, k, v, None, torch.zeros(b, g, 1)), "normalizer has shape"),
        ((q, k, v, None, None, torch.ones(b, t - 1, dtype=torch.bool)), "mask has shape"),
        ((q, k, v, None, None, torch.ones(b, t)), "mask is torch.float32"),
        ((q[:, :, :0], k[:, :, :0], v[:, :, :0]), "there is no token"),
    ):
        with pytest.raises(KernelError, match=name):
            linear_attention(*given)


def test_what_is_masked_may_be_anything():
    q, k, v = drawn()
    mask = torch.arange(k.shape[2]).expand(2, -1) >= 7
    wanted = linear_attention(q, k, v, None, None, mask)[0]
    k[:, :, :7] = torch.nan
    assert torch.equal(linear_attention(q, k, v, None, None, mask)[0], wanted)


def test_features_far_below_zero_are_exact():
    q, k, v = drawn(t=9)
    found, expected = linear_attention(q - 20, k - 20, v), matrix_form(q - 20, k - 20, v)
    assert off(found[0], expected[0]) < TOLERANCE and off(found[1], expected[1]) < TOLERANCE
    tiny = torch.full((1, 1, 3, 4), 1e-20)
    assert linear_attention(tiny, tiny, v[:1, :1, :3], None, None, None, "relu")[0].isfinite().all()
