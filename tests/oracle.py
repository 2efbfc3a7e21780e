"""An independent, brute-force StreamingLLM for any causal LM of transformers.

The definition that is computed here: query ``i`` (0-based) of a streaming layer sees the sinks ``{0..S-1}`` and the last ``W``
tokens, itself included. A pair inside the window keeps its true distance; a pair with a sink ``j`` uses the distance inside the
cache, ``min(i, S + W - 1) - j``. Every other token mixer (sliding-window or chunked attention, state-space, convolution, linear
attention) keeps its own rule over the whole history.

How: the stream is run token by token, without any cache, on the unpatched model. Step ``t`` runs the model on the visible tokens
only, so that the model itself gives them the positions ``0..n-1`` that they have inside the cache. Pre-hooks on the token mixers
replace the inputs of all rows but the last by the inputs that those tokens had at the same place when they were streamed. The
last row of the logits is then exactly that of StreamingLLM: each mixer sees the visible tokens as they were streamed.

Mixers that keep their own rule need another visible set, the whole history at its true positions. A step therefore runs the
model once per change between the two sets along its depth; the rows found so far are carried over by hooks on the outputs. A
mixer inside another one (a convolution over the keys of an attention layer) is no exception: its output rows are stored too.

Nothing is shared with the patch: no cache layer, mask or rotation is computed here. Which modules mix tokens, and which of their
arguments depend on the tokens, is found by running the model. Two things are checked before an answer is given: the stock model
is causal, and the hooks reach every flow between tokens (the result may not depend on the ids of the earlier rows, only on the
stored inputs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

_RECURRENT_METHODS = ("update_conv_state", "update_recurrent_state", "get_conv_state", "get_recurrent_state", "has_previous_state")
# long enough to see any window of a tiny model, too short to switch its scaled rotary positions
_PROBE_LENGTH = 60
_SELF_CHECK = 2e-4

Slot = tuple[str, int | str]
Key = tuple[str, int]


class OracleUnsupported(Exception):
    """The brute-force definition cannot be computed on this model; the message is the reason."""


class _OtherGroup(Exception):
    """Internal: the next mixer needs the other visible set; the rest of this run would be thrown away."""


@dataclasses.dataclass
class _Mixer:
    """One call of one token mixer in a forward: the same module may be called several times (weights shared over depth)."""

    key: Key
    module: nn.Module
    attention: bool
    layer_idx: int | None
    slots: tuple[Slot, ...] = ()
    own_window: bool = False
    inside: Key | None = None


# --- which modules mix tokens -------------------------------------------------------------------------------------------------


def _calling_module(depth: int = 2) -> nn.Module | None:
    """The nearest nn.Module up the stack whose method is running."""
    frame = sys._getframe(depth)
    for _ in range(8):
        if frame is None:
            return None
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
        frame = frame.f_back
    return None


@contextlib.contextmanager
def _recorded_cache_calls(attention: list[tuple[nn.Module, int]], recurrent: list[nn.Module]) -> Iterator[None]:
    """Record which modules call ``Cache.update`` (with the layer index) and which ask for a recurrent state."""
    originals = {name: getattr(Cache, name) for name in ("update", *_RECURRENT_METHODS) if hasattr(Cache, name)}

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Cache, *args: Any, **kwargs: Any) -> Any:
            module = _calling_module()
            if module is not None:
                if name == "update":
                    layer_idx = kwargs.get("layer_idx", args[2] if len(args) > 2 else -1)
                    attention.append((module, int(layer_idx)))
                else:
                    recurrent.append(module)
            return original(self, *args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(Cache, name, watch(name, original))
        yield
    finally:
        for name, original in originals.items():
            setattr(Cache, name, original)


def _mixes_tokens(model: nn.Module, ids: torch.Tensor) -> list[nn.Module]:
    """The deepest modules whose last output row depends on their earlier input rows: finds those that keep no Cache."""
    found: list[nn.Module] = []

    def test(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if testing or module is model:
            return
        slots = _row_slots(args, kwargs, ids.shape[1])
        rows = _first_tensor(output)
        if not slots or rows is None or rows.ndim != 3 or rows.shape[1] != ids.shape[1]:
            return
        args, kwargs = list(args), dict(kwargs)
        for kind, place in slots:
            target = args if kind == "arg" else kwargs
            changed = target[place].clone()
            changed[:, :-1] = changed[:, :-1].flip(-1) + 1
            target[place] = changed
        testing.append(True)
        try:
            again = _first_tensor(module(*args, **kwargs))
        except (TypeError, ValueError, RuntimeError, IndexError):
            # the disturbed argument was no hidden state (an index, a table): the self-check judges what is missed here
            return
        finally:
            testing.pop()
        if not torch.allclose(again[:, -1], rows[:, -1], rtol=1e-5, atol=1e-6):
            found.append(module)

    testing: list[bool] = []
    handles = [m.register_forward_hook(test, with_kwargs=True) for m in model.modules()]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    inner = {id(m) for m in found}
    return [m for m in found if not any(id(child) in inner for child in m.modules() if child is not m)]


def _token_mixers(model: nn.Module, ids: torch.Tensor) -> list[_Mixer]:
    """Every call of a token mixer in one forward, in order of depth."""
    attention: list[tuple[nn.Module, int]] = []
    recurrent: list[nn.Module] = []
    with _recorded_cache_calls(attention, recurrent):
        model(input_ids=ids, use_cache=True)
    attending = {id(module) for module, _ in attention}
    # a container may ask the cache too (decoder, decoder layer): only the innermost modules mix
    states = {id(m): m for m in recurrent if not any(id(child) in attending for child in m.modules() if child is not m)}
    states = {i: m for i, m in states.items() if not any(id(child) in states for child in m.modules() if child is not m)}
    both = [type(m).__name__ for i, m in states.items() if i in attending]
    if both:
        raise OracleUnsupported(f"{both[0]} holds keys and values and a recurrent state in one module: keys already mix tokens")
    modules = {id(m): (m, True) for m, _ in attention} | {i: (m, False) for i, m in states.items()}
    # mixers that keep their state elsewhere, or none: recurrent ones, unless the model has no cache at all
    known = set(modules)
    for module in _mixes_tokens(model, ids):
        below = {id(child) for child in module.modules()}
        above = {i for i, (m, _) in modules.items() if any(child is module for child in m.modules())}
        if not below & known and not above:
            modules[id(module)] = (module, not known)
    if not modules:
        raise OracleUnsupported("no module of this model mixes tokens")
    indices: dict[int, list[int]] = defaultdict(list)
    for module, layer_idx in attention:
        indices[id(module)].append(layer_idx)
    names = {id(m): name for name, m in model.named_modules()}
    calls: list[_Mixer] = []
    count: Counter[int] = Counter()

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        attends = modules[id(module)][1]
        nth = count[id(module)]
        count[id(module)] += 1
        layers = indices[id(module)]
        call = _Mixer((names[id(module)], nth), module, attends, layers[nth] if nth < len(layers) else (layers[-1] if layers else None))
        call.inside = open_calls[-1].key if open_calls else None
        calls.append(call)
        open_calls.append(call)

    open_calls: list[_Mixer] = []
    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m, _ in modules.values()]
    handles += [m.register_forward_hook(lambda *_: open_calls.pop() and None) for m, _ in modules.values()]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


# --- which arguments carry tokens, which layers keep a window of their own ----------------------------------------------------


def _row_slots(args: Sequence[Any], kwargs: dict[str, Any], length: int) -> list[Slot]:
    """Places of the tensors with one row per token among the arguments of a mixer: hidden ``[1, length, ...]``, ids ``[1, length]``."""
    places: list[tuple[Slot, Any]] = [(("arg", i), x) for i, x in enumerate(args)]
    places += [(("kwarg", name), x) for name, x in kwargs.items()]
    tensors = [(slot, x) for slot, x in places if torch.is_tensor(x) and x.ndim >= 2 and tuple(x.shape[:2]) == (1, length)]
    return [slot for slot, x in tensors if (x.is_floating_point() and x.ndim >= 3) or x.dtype in (torch.int64, torch.int32)]


def _first_tensor(output: Any) -> torch.Tensor | None:
    """The hidden states that a module returns."""
    if torch.is_tensor(output):
        return output
    if isinstance(output, (tuple, list)) and output and torch.is_tensor(output[0]):
        return output[0]
    return None


def _last_rows(output: Any, nested: bool, count: int = 1) -> list[torch.Tensor]:
    """The last rows ``[1, count, ...]`` of the hidden states that a mixer returns; of all its tensors if ``nested`` (q, k, v)."""
    tensors = [x for x in output if torch.is_tensor(x)] if nested and not torch.is_tensor(output) else [_first_tensor(output)]
    return [x[:, -count:].clone() for x in tensors if x is not None]


def _with_rows(output: Any, rows: Sequence[torch.Tensor]) -> Any:
    """``output`` with the first ``len(rows)`` of its tensors ended by ``rows``, each ``[1, n, ...]``."""
    if torch.is_tensor(output):
        return torch.cat([output[:, : output.shape[1] - rows[0].shape[1]], rows[0]], dim=1)
    items, left = [], list(rows)
    for item in output:
        items.append(_with_rows(item, [left.pop(0)]) if left and torch.is_tensor(item) else item)
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


@contextlib.contextmanager
def _hooked(mixers: Sequence[_Mixer], before: Callable[..., Any], after: Callable[..., Any] | None = None) -> Iterator[None]:
    """Hook every mixer; ``before(mixer, args, kwargs)`` and ``after(mixer, output)`` get the call, not the module."""
    calls = {mixer.key: mixer for mixer in mixers}
    names = {id(mixer.module): mixer.key[0] for mixer in mixers}
    entered: Counter[str] = Counter()
    left: Counter[str] = Counter()

    def find(module: nn.Module, counter: Counter[str]) -> _Mixer:
        name = names[id(module)]
        counter[name] += 1
        key = (name, counter[name] - 1)
        if key not in calls:
            raise OracleUnsupported(f"{name} is called a varying number of times per forward")
        return calls[key]

    handles = []
    for module in {id(m.module): m.module for m in mixers}.values():
        handles.append(module.register_forward_pre_hook(lambda m, a, k: before(find(m, entered), a, k), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(lambda m, a, output: after(find(m, left), output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _find_slots(model: nn.Module, mixers: Sequence[_Mixer], length: int, vocabulary: tuple[int, int]) -> None:
    """Set ``mixer.slots``: the row-shaped arguments that change when the tokens change (so not cos, sin, masks)."""
    seen: list[dict[Key, dict[Slot, torch.Tensor]]] = []
    for seed in (11, 12):
        taken: dict[Key, dict[Slot, torch.Tensor]] = {}

        def record(mixer: _Mixer, args: Any, kwargs: Any, taken: dict[Key, dict[Slot, torch.Tensor]] = taken) -> None:
            taken[mixer.key] = {s: (args if s[0] == "arg" else kwargs)[s[1]].clone() for s in _row_slots(args, kwargs, length)}

        with _hooked(mixers, record):
            model(input_ids=_random_ids(length, seed, vocabulary, model), use_cache=False)
        seen.append(taken)
    for mixer in mixers:
        first, second = seen[0].get(mixer.key, {}), seen[1].get(mixer.key, {})
        mixer.slots = tuple(slot for slot in first if slot in second and not torch.equal(first[slot], second[slot]))
        if not mixer.slots:
            raise OracleUnsupported(f"{type(mixer.module).__name__} takes no hidden states of shape [1, T, D]")
        if not mixer.attention:
            continue
        # an attention layer may be handed integer rows that tell what to attend to (top-k indices): results, not inputs
        mixer.slots = tuple(slot for slot in mixer.slots if first[slot].is_floating_point())


def _find_own_windows(model: nn.Module, mixers: Sequence[_Mixer], length: int, vocabulary: tuple[int, int]) -> None:
    """Set ``mixer.own_window`` where the last row of an attention layer never depends on the first half of its input."""
    rows: dict[Key, list[torch.Tensor]] = {}
    reaches: set[Key] = set()
    ids = _random_ids(length, 13, vocabulary, model)

    def keep(mixer: _Mixer, output: Any) -> None:
        rows[mixer.key] = _last_rows(output, mixer.inside is not None, length - length // 2)

    def compare(mixer: _Mixer, output: Any) -> Any:
        if not torch.equal(rows[mixer.key][0][:, -1:], _last_rows(output, False)[0]):
            reaches.add(mixer.key)
        # the layers above must see an unchanged second half, or every one of them would seem to reach back
        return _with_rows(output, rows[mixer.key])

    with _hooked(mixers, lambda *_: None, keep):
        model(input_ids=ids, use_cache=False)
    for seed in range(4):
        noise = torch.Generator().manual_seed(seed)

        def disturb(mixer: _Mixer, args: Any, kwargs: Any, noise: torch.Generator = noise) -> Any:
            args, kwargs = list(args), dict(kwargs)
            for kind, place in mixer.slots:
                target = args if kind == "arg" else kwargs
                if not target[place].is_floating_point():
                    continue
                changed = target[place].clone()
                early = changed[:, : length // 2]
                changed[:, : length // 2] = early + early.std() * torch.randn(early.shape, generator=noise, dtype=torch.float32).to(
                    early.dtype
                )
                target[place] = changed
            return tuple(args), kwargs

        with _hooked(mixers, disturb, compare):
            model(input_ids=ids, use_cache=False)
    for mixer in mixers:
        mixer.own_window = mixer.attention and mixer.key not in reaches


def _random_ids(length: int, seed: int, vocabulary: tuple[int, int], model: nn.Module) -> torch.Tensor:
    """Seeded token ids ``[1, length]`` inside the range of the ids under test, so that no special token is met."""
    low, high = vocabulary
    ids = torch.randint(low, high + 1, (1, length), generator=torch.Generator().manual_seed(seed))
    return ids.to(next(model.parameters()).device)


def _probe_length(model: Any) -> int:
    """Length of the probe inputs, within the position table of the model."""
    try:
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    except (AttributeError, ValueError):
        limit = None
    return min(_PROBE_LENGTH, limit) if isinstance(limit, int) and limit > 0 else _PROBE_LENGTH


# --- the stream ---------------------------------------------------------------------------------------------------------------


class _Stream:
    """The state of one run: for every mixer call, the inputs that each token had there when it was streamed."""

    def __init__(
        self, model: nn.Module, mixers: Sequence[_Mixer], streaming: set[Key], sinks: int, window: int, true_positions: bool
    ) -> None:
        self.model, self.mixers, self.streaming = model, mixers, streaming
        self.sinks, self.window, self.true_positions = sinks, window, true_positions
        self.inputs: dict[tuple[Key, Slot], list[torch.Tensor]] = defaultdict(list)
        self.outputs: dict[Key, list[list[torch.Tensor]]] = defaultdict(list)

    def visible(self, t: int, streaming: bool) -> list[int]:
        """The tokens that query ``t`` sees, in order."""
        if not streaming:
            return list(range(t + 1))
        return sorted({*range(min(self.sinks, t + 1)), *range(max(0, t + 1 - self.window), t + 1)})

    def step(self, ids: torch.Tensor, t: int, commit: bool = True) -> torch.Tensor:
        """Logits ``[1, V]`` of token ``t`` of ``ids`` ``[1, T]``; ``commit`` stores its inputs for the later tokens."""
        solved: dict[Key, list[torch.Tensor]] = {}
        latest: dict[tuple[Key, Slot], torch.Tensor] = {}
        streaming = self.mixers[0].key in self.streaming
        while True:
            visible = self.visible(t, streaming)

            def before(mixer: _Mixer, args: Any, kwargs: Any, streaming: bool = streaming, visible: list[int] = visible) -> Any:
                wrong_group = mixer.key not in solved and (mixer.key in self.streaming) != streaming
                # go through a mixer of the other group only to reach an unsolved one inside it
                inner = [m.key for m in self.mixers if m.inside == mixer.key and m.key not in solved]
                if wrong_group and not any((key in self.streaming) == streaming for key in inner):
                    raise _OtherGroup
                args, kwargs = list(args), dict(kwargs)
                for slot in mixer.slots:
                    target = args if slot[0] == "arg" else kwargs
                    rows = target[slot[1]]
                    if mixer.key not in solved:
                        latest[mixer.key, slot] = rows[:, -1:].clone()
                    stored = self.inputs[mixer.key, slot]
                    target[slot[1]] = torch.cat([*(stored[j] for j in visible[:-1]), latest[mixer.key, slot]], dim=1)
                return tuple(args), kwargs

            def after(mixer: _Mixer, output: Any, streaming: bool = streaming, visible: list[int] = visible) -> Any:
                if mixer.key in solved:
                    last = solved[mixer.key]
                    if mixer.inside is None:
                        return _with_rows(output, last)
                    stored = [self.outputs[mixer.key][j] for j in visible[:-1]]
                    return _with_rows(output, [torch.cat([*(row[i] for row in stored), last[i]], dim=1) for i in range(len(last))])
                if (mixer.key in self.streaming) != streaming:
                    raise _OtherGroup
                solved[mixer.key] = _last_rows(output, mixer.inside is not None)
                return output

            kwargs: dict[str, Any] = {"input_ids": ids[:, visible], "use_cache": False}
            if self.true_positions and len(visible) <= t:
                kwargs["position_ids"] = torch.tensor([visible], device=ids.device)
                # without a mask transformers reads a gap in the positions as the start of a packed sequence
                kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
            try:
                with _hooked(self.mixers, before, after):
                    logits = self.model(**kwargs).logits[:, -1]
            except _OtherGroup:
                streaming = not streaming
                continue
            break
        if commit:
            for place, row in latest.items():
                self.inputs[place].append(row)
            for key, rows in solved.items():
                self.outputs[key].append(rows)
        return logits


def oracle_logits(
    model: Any,
    ids: torch.Tensor,
    sinks: int,
    window: int,
    positions: str = "cache",
    layers: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits of StreamingLLM over ``ids``, from the definition alone.

    Args:
        model: an unpatched causal LM in eval mode. It is hooked while this runs and left as it was.
        ids: token ids, int64 ``[1, T]``, without special tokens.
        sinks: number of first tokens that stay visible, >= 0.
        window: number of last tokens that are visible, the query included, >= 1.
        positions: "cache" for distances inside the cache, "true" for true distances to the sinks as well.
        layers: indices of the attention layers that stream (as the model numbers them for its cache); the other layers see the
            whole history. ``None``: every attention layer that has no window of its own.

    Returns:
        fp32 tensor ``[1, T, V]``.

    Raises:
        OracleUnsupported: the model cannot be streamed this way; the message is the reason.
        ValueError: an argument is out of its range.
    """
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"ids must have the shape [1, T], not {list(ids.shape)}")
    if sinks < 0 or window < 1:
        raise ValueError(f"sinks={sinks} must be >= 0 and window={window} >= 1")
    if positions not in ("cache", "true"):
        raise ValueError(f'positions={positions!r} must be "cache" or "true"')
    true_positions = positions == "true"
    if true_positions and "position_ids" not in inspect.signature(model.forward).parameters:
        raise OracleUnsupported(f"{type(model).__name__}.forward takes no position_ids: true positions cannot be given")
    if true_positions and getattr(model.config, "alibi", False):
        raise OracleUnsupported(f"{type(model).__name__} with ALiBi ignores position_ids: true positions cannot be given")
    vocabulary = (int(ids.min()), int(ids.max()))
    length = _probe_length(model)
    with torch.no_grad():
        _check_causal(model, ids)
        mixers = _token_mixers(model, _random_ids(6, 10, vocabulary, model))
        _find_slots(model, mixers, 6, vocabulary)
        _find_own_windows(model, mixers, length, vocabulary)
        streaming = {m.key for m in mixers if m.attention and not m.own_window}
        if layers is not None:
            known = sorted({m.layer_idx for m in mixers if m.attention and m.layer_idx is not None})
            unknown = sorted(set(layers) - set(known))
            if unknown:
                raise OracleUnsupported(f"layers {unknown} are no attention layers of this model: those are {known}")
            streaming = {key for key in streaming if next(m for m in mixers if m.key == key).layer_idx in set(layers)}
        stream = _Stream(model, mixers, streaming, sinks, window, true_positions)
        rows = []
        checks = {min(ids.shape[1], sinks + window) - 1, ids.shape[1] - 1}
        for t in range(ids.shape[1]):
            other = stream.step(_others_changed(ids, t), t, commit=False) if t in checks and t else None
            rows.append(stream.step(ids, t))
            if other is not None:
                error = _error(other, rows[-1])
                if not error < _SELF_CHECK:
                    raise OracleUnsupported(f"tokens are also mixed outside the attention and recurrent modules (error {error:.1e})")
    return torch.stack(rows, dim=1).float()


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit where that exceeds 10."""
    return ((actual - expected).abs().max() / (expected.abs().max() / 10).clamp(min=1.0)).item()


def _check_causal(model: Any, ids: torch.Tensor) -> None:
    """Refuse a model whose answer for a token changes with the tokens after it: then there is nothing to stream."""
    whole = model(input_ids=ids, use_cache=False).logits
    for end in sorted({1, 2, 5, 6, 9, ids.shape[1] // 2, ids.shape[1] - 1}):
        if 0 < end < ids.shape[1]:
            error = _error(model(input_ids=ids[:, :end], use_cache=False).logits[:, -1], whole[:, end - 1])
            if not error < _SELF_CHECK:
                raise OracleUnsupported(f"the stock model is not causal: token {end} changes with the tokens after it (error {error:.1e})")


def _others_changed(ids: torch.Tensor, t: int) -> torch.Tensor:
    """``ids`` with every token but ``t`` replaced by another token of the same text."""
    changed = ids.flip(-1).roll(1, dims=-1)
    changed = torch.where(changed == ids, ids.min() + ids.max() - ids, changed)
    changed[:, t] = ids[:, t]
    return changed
