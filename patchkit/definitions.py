"""What patches say that they compute, worked out by definition: slowly, on an unpatched model, sharing no code with the patches.

Each function has the signature of `patchkit.patch.Definition` once its keyword arguments are bound: a model without the patch in
question, token ids [1, T], and the patch's own report; it gives logits [1, T, V]. The model is hooked meanwhile, and left as it was.
Those that take ``at``, positions [P] in rising order, give logits [1, P, V] of these only: of a long text all are more than fits.

Shapes: B batch, H heads, G kv heads, T tokens, K key dimension, D hidden size, V vocabulary, S sinks, W window.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import PatchError

if TYPE_CHECKING:
    from patchkit.record import PatchReport

# Queries of which each is computed as a text of its own, at once.
_ROWS = 16
# Steps by which an input of int8 layers, in units of its rounding, may differ between two computations: some last bits of float32.
_UNSURE_STEPS = 127 * 2.0**-21
# The same where inputs are not rounded, as a share of a row's largest: kernels take them as integers of 16 bits (docs/kernels.md).
_UNSURE_SHARE = 2.0**-16


class NoDefinition(PatchError):
    """The definition cannot be worked out on this model; the message says why."""


# -- attention sinks and a window ------------------------------------------------------------------------------------------


def window_logits(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    *,
    modules: Sequence[str],
    sinks: int,
    window: int,
    in_cache: bool = True,
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """StreamingLLM: query i of the attention modules named sees the first S tokens and the last W, and no others.

    A query that sees S + W tokens is the last of a text that has no others. So the model runs over the whole text, and each of these
    modules is run again for every query on the inputs of what that query sees: the module itself gives them the positions 0 to S + W - 1
    (``in_cache``), or is given their true ones. No cache, mask or rotation is made here.

    Raises:
        NoDefinition: the modules do not take hidden states [B, T, D] and return them.
    """
    size, length = sinks + window, ids.shape[1]
    if length <= size:
        return logits_at(model, ids, at)
    rows = [[*range(sinks), *range(query - window + 1, query + 1)] for query in range(size - 1, length)]
    visible = torch.tensor(rows, device=ids.device)
    attention = [model.get_submodule(name) for name in modules]
    places = _token_arguments(model, attention, ids[:, :size])
    # What the model itself passes along (rotations, masks, biases) with these tokens at these positions.
    chunks = visible.split(_ROWS)
    calls = [_calls(model, attention, places, ids[0][chunk], None if in_cache else chunk) for chunk in chunks]
    count = Counter[int]()
    inputs: dict[int, tuple[Any, Any]] = {}
    running = False

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not running:
            inputs[id(module)] = args, kwargs

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal running
        if running:
            return None
        key = id(module), count[id(module)]
        count[id(module)] += 1
        running = True
        outputs: list[torch.Tensor] = []
        for chunk, recorded in zip(chunks, calls, strict=True):
            own_args, own_kwargs = recorded[key]
            own_args, own_kwargs = list(own_args), dict(own_kwargs)
            for kind, place in places[key]:
                given, own = (inputs[id(module)][0], own_args) if kind == "argument" else (inputs[id(module)][1], own_kwargs)
                own[place] = given[place][0][chunk]
            heard = _hidden(module(*own_args, **own_kwargs))
            outputs += [heard[0, :-1]] * (not outputs) + [heard[:, -1]]
        running = False
        return _with_hidden(output, torch.cat(outputs)[None])

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for module in set(attention)]
    hooks += [module.register_forward_hook(after) for module in set(attention)]
    with _removed(hooks):
        return logits_at(model, ids, at)


_Call = tuple[int, int]  # a module by identity, and how many times it was called before in this forward


def _calls(
    model: Any, modules: list[Any], places: Mapping[_Call, list[tuple[str, Any]]] | None, ids: torch.Tensor, positions: torch.Tensor | None
) -> dict[_Call, tuple[Any, Any]]:
    """Arguments of each call of these modules in a forward over ids [B, T]; those in ``places`` are left out."""
    count = Counter[int]()
    found: dict[_Call, tuple[Any, Any]] = {}

    def notice(module: nn.Module, args: Any, kwargs: Any) -> None:
        key = id(module), count[id(module)]
        count[id(module)] += 1
        left_out = [] if places is None else places[key]
        found[key] = (
            tuple(None if ("argument", i) in left_out else value for i, value in enumerate(args)),
            {name: None if ("keyword", name) in left_out else value for name, value in kwargs.items()},
        )

    options: dict[str, Any] = {}
    if positions is not None:
        if "position_ids" not in _compat.argument_names(model):
            raise NoDefinition(f"{type(model).__name__} takes no position_ids, so true positions cannot be given")
        # Without a mask, transformers reads a gap in the positions as the start of another text.
        options = {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
    with _removed([module.register_forward_pre_hook(notice, with_kwargs=True) for module in set(modules)]):
        logits_at(model, ids, torch.tensor([ids.shape[1] - 1]), **options)  # the arguments are wanted, not the logits
    return found


def _token_arguments(model: Any, modules: list[Any], ids: torch.Tensor) -> dict[_Call, list[tuple[str, Any]]]:
    """Which arguments of each call hold one row per token that depends on the token: not positions, not masks."""
    first, second = (_calls(model, modules, None, each, None) for each in (ids, ids.flip(1).roll(1, 1)))
    shape = (1, ids.shape[1])
    places: dict[_Call, list[tuple[str, Any]]] = defaultdict(list)
    for key, (args, kwargs) in first.items():
        other_args, other_kwargs = second[key]
        candidates = [("argument", i, value, other_args[i]) for i, value in enumerate(args)]
        candidates += [("keyword", name, value, other_kwargs[name]) for name, value in kwargs.items()]
        for kind, place, value, other in candidates:
            rows = torch.is_tensor(value) and value.ndim >= 3 and tuple(value.shape[:2]) == shape
            if rows and not torch.equal(value, other):
                places[key].append((kind, place))
        if not places[key]:
            raise NoDefinition("an attention module of this model takes no hidden states of shape [B, T, D]")
    return places


def _hidden(output: Any) -> torch.Tensor:
    return output if torch.is_tensor(output) else output[0]


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    if _hidden(output).shape != hidden.shape:
        raise NoDefinition(f"an attention module of this model returns {list(_hidden(output).shape)}, not hidden states [B, T, D]")
    return hidden if torch.is_tensor(output) else type(output)((hidden, *output[1:]))


def logits_at(model: Any, ids: torch.Tensor, at: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """Logits of ids [B, T] as a whole: [B, P, V] at positions ``at`` [P], [B, T, V] at all for None; without a cache by default."""
    options = {"use_cache": False, **options}
    if at is None or len(at) == ids.shape[1]:
        return model(input_ids=ids, **options).logits
    at = at.to(ids.device)
    if not keeps_some(model):
        return model(input_ids=ids, **options).logits[:, at]
    return model(input_ids=ids, logits_to_keep=at, **options).logits


def keeps_some(model: Any) -> bool:
    """Whether the model can leave out logits of positions that are not wanted."""
    return "logits_to_keep" in _compat.argument_names(model)


@contextlib.contextmanager
def _removed(hooks: list[Any]) -> Iterator[None]:
    """Without gradients, and without these hooks afterwards."""
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()


# -- a window, and linear attention over everything older ------------------------------------------------------------------


def hybrid_logits(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    *,
    parts: Mapping[str, Any],
    sinks: int,
    window: int,
    min_length: int,
    adapted: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """The equation of `patchkit.linear.hybrid`, pair by pair, all T x T of them.

    Two rows of the text run, the second with every token at position 0: there the model itself makes queries and keys without rotation.

    Args:
        parts: what was trained (feature maps, factor, readout, horizon), by the name of the attention module.
        adapted: (A, B) by the name of a projection, which gives W x + B A x.

    Raises:
        NoDefinition: the model takes no positions.
    """
    rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    options: dict[str, Any] = {}
    if rotary:
        if "position_ids" not in _compat.argument_names(model):
            raise NoDefinition(f"{type(model).__name__} takes no position_ids, so queries and keys cannot be had without rotation")
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        # The mask says that it is one text, whatever the positions.
        options = {"position_ids": torch.cat([positions, 0 * positions]), "attention_mask": torch.ones_like(ids).expand(2, -1)}
    named = {id(model.get_submodule(name)): part for name, part in parts.items()}
    name = "patchkit_definition"

    def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
        part = named.get(id(module))
        if part is None:
            output, _ = original(module, query, key, value, mask, **kwargs)
        else:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = _hybrid(part, query, key, value, scaling, sinks, window, min_length).to(query.dtype)[None]
        # Behind attention the two rows are the same again.
        return output[:1].expand(query.shape[0], -1, -1, -1).contiguous(), None

    implementation = _compat.attention_named(model.config.get_text_config(decoder=True)) or "eager"
    if implementation not in ("eager", "sdpa"):
        raise NoDefinition(f"another patch, or {implementation!r}, computes attention beside it")
    original = _compat.attention_function("sdpa")
    _compat.register_attention(name, attend, _compat.mask_function("sdpa"))
    hooks = [model.get_submodule(each).register_forward_hook(_adapter(*pair)) for each, pair in adapted.items()]
    with _removed(hooks), _compat.attention_set_to(model, lambda _: name):
        return logits_at(model, ids.expand(2, -1), at, **options)[:1]


def _hybrid(
    part: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, sinks: int, window: int, min_length: int
) -> torch.Tensor:
    """[T, H, V] in float64 of queries [B, H, T, K] and keys [B, G, T, K]: turned in the first row, plain in the last."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query[0].double(), key[0].double().repeat_interleave(groups, 0), value[0].double().repeat_interleave(groups, 0)
    plain_q = part.query_map(query[-1:]).double()[0]
    plain_k = part.key_map(key[-1:]).double()[0].repeat_interleave(groups, 0)
    i, j = torch.arange(q.shape[1], device=q.device)[:, None], torch.arange(q.shape[1], device=q.device)[None]
    near = (j <= i) & ((j < sinks) | (i - j < window) | (i < min_length))
    old = (j <= i) & ~near
    scores = (scaling * q @ k.mT).masked_fill(~near, -math.inf)
    softmax = (scores - scores.amax(-1, keepdim=True)).exp()
    weight = part.factor.double().exp()[:, None, None].expand_as(scores)
    if part.horizon is not None:
        weight = weight * (part.horizon / old.sum(1).clamp(min=part.horizon))[:, None]
    weights = softmax + weight * (plain_q @ plain_k.mT) * old
    heard = weights @ v / weights.sum(-1, keepdim=True)
    if part.readout is not None:
        heard = heard @ part.readout.double()
    return heard.transpose(0, 1)


def _adapter(a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + (args[0].float() @ a.float().to(output.device).T @ b.float().to(output.device).T).to(output.dtype)

    return add


# -- weights of eight bits -------------------------------------------------------------------------------------------------


def rounded_logits(
    model: Any, ids: torch.Tensor, facts: PatchReport, *, at: torch.Tensor | None = None, unsure: torch.Generator | None = None
) -> torch.Tensor:
    """The modules that the patch reports with weights rounded to 255 levels per output channel; in mode "dynamic" inputs too, per token.

    Args:
        unsure: with it the inputs of these modules are moved at random by what two computations of them may differ; what that does to
            logits is what nobody can promise.

    Raises:
        NoDefinition: fused experts that round their inputs, which nothing outside them sees; or weights that came in int8.
    """
    originals: list[tuple[nn.Module, str, Any]] = []
    hooks = []
    try:
        for name, about in facts.modules.items():
            module = model.get_submodule(name)
            dynamic, linear = about["mode"] == "dynamic", getattr(module, "weight", None) is not None
            if dynamic and not linear:
                raise NoDefinition(f"{name} rounds what goes between its experts' layers, which cannot be done from outside")
            for key, parameter in list(_compat.parameters_of(module).items()):
                if parameter is None or parameter.ndim < 2 or (key != "weight" and parameter.ndim != 3):
                    continue
                if type(parameter) is not nn.Parameter:
                    raise NoDefinition(f"{name} had a weight of {type(parameter).__name__} before it was patched")
                across = parameter.ndim - 1
                if isinstance(module, _compat.Conv1D) or getattr(module, "is_transposed", False):
                    across -= 1
                originals.append((module, key, parameter))
                _compat.parameters_of(module)[key] = nn.Parameter(_rounded(parameter.detach(), across), requires_grad=False)
            if dynamic or unsure is not None:
                hooks.append(module.register_forward_pre_hook(functools.partial(_input_rounded, dynamic, unsure)))
        with _removed(hooks):
            return logits_at(model, ids, at)
    finally:
        for hook in hooks:
            hook.remove()
        for module, key, parameter in originals:
            _compat.parameters_of(module)[key] = parameter


def _input_rounded(dynamic: bool, unsure: torch.Generator | None, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the first one rounded in mode "dynamic", and moved by what is unsure of it."""
    x = args[0]
    if dynamic:
        return _rounded(x, -1, unsure), *args[1:]
    moved = x.float() + _UNSURE_SHARE * x.float().abs().amax(-1, keepdim=True) * _noise(x, unsure)
    return moved.to(x.dtype), *args[1:]


def _rounded(x: torch.Tensor, across: int, unsure: torch.Generator | None = None) -> torch.Tensor:
    """x on the 255 levels from -127 to 127 times max|x| / 127, the maximum being taken along one dimension; computed in float32."""
    step = x.float().abs().amax(across, keepdim=True).clamp(min=1e-30) / 127
    steps = x.float() / step
    if unsure is not None:
        steps = steps + _UNSURE_STEPS * _noise(x, unsure)
    return (steps.round() * step).to(x.dtype)


def _noise(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Numbers from -1 to 1, of x's shape."""
    return 2 * torch.rand(x.shape, generator=generator).to(x.device) - 1
