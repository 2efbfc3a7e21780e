"""Forwards without the model's Python: a few tokens through a small model as a TorchScript trace.

In a small model most of a forward is Python between kernels. A trace replays the same kernels without it, and is made in a tenth
of a second, where compiling takes ten.

A trace would also replay what the model decided by looking into a tensor. For drafts that does no harm, since no draft decides what
the text will be. A trace that verifies is only made if nothing looks: the forward must run on tensors without values. Nor is it made
where Python may do more than the model's code: with hooks, other patches, modules of other libraries. Both kinds are compared with
the model at the first shapes they meet, on other tokens at another place: one trace serves all of them. One that verifies is compared
once more in every text.

Shapes: R rows, T tokens, C slots of the cache, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from patchkit import _compat
from patchkit.attention import masks_from, original_name
from patchkit.cache.ragged import RaggedCache
from patchkit.testing import TOLERANCES, logit_error

_logger = logging.getLogger("patchkit")


@dataclass(eq=False)
class _Trace:
    """A trace, or None where it cannot be made, and for each shape whether it does what the model does."""

    run: Any
    agrees: dict[tuple[int, ...], bool] = field(default_factory=dict)


# Traces of each model: they hold no text, so that any number of generations can use them.
_traces: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _Trace]] = weakref.WeakKeyDictionary()

_looks: weakref.WeakKeyDictionary[nn.Module, dict[int, str | None]] = weakref.WeakKeyDictionary()

# In larger models kernels take the time, and in longer caches a trace reads all the slots that are still empty.
_MOST_PARAMETERS = 64_000_000
_MOST_ROOM = 2048
# From so many rows on another kind of product is faster.
_MANY = 16
# Different numbers of rows and tokens at which a trace is compared with the model.
_SHAPES = 4
# A trace reads this many slots or a multiple.
_SLOTS = 128


class _Making(threading.local):
    """Milliseconds that this thread has spent on making traces: no part of what a round costs."""

    milliseconds = 0.0


making = _Making()


class Traced:
    """Forwards of a few tokens through ``model``, on the buffers of its cache; rows may be of different lengths.

    Args:
        pads: left padding of each row.
        verifies: the result decides what the text will be.
    """

    def __init__(self, model: Any, cache: RaggedCache, pads: list[int], verifies: bool) -> None:
        self.model, self.cache, self.verifies = model, cache, verifies
        self.pads = torch.tensor(pads)
        # A trace keeps the parameters that it was made with; one that drafts, copies of some.
        versions = [0 if verifies or parameter.is_inference() else parameter._version for parameter in model.parameters()]
        self.parameters = hash(tuple(zip(map(id, model.parameters()), versions, strict=True)))
        self.compared: set[Any] = set()  # kinds of trace that were compared with the model since this text began

    @staticmethod
    def serves(model: Any, cache: Any, verifies: bool) -> bool:
        """Whether to try: a small model on CPU, whose layers all see all keys, and nothing but its own code."""
        return (
            isinstance(cache, RaggedCache)
            and cache.room <= _MOST_ROOM
            and model.device.type == "cpu"
            and sum(parameter.numel() for parameter in model.parameters()) <= _MOST_PARAMETERS
            and "position_ids" in _compat.argument_names(model)
            and {type(layer) for layer in _compat.DynamicCache(config=model.config).layers} == {_compat.DynamicLayer}
            and all(original_name(config) in ("eager", "sdpa") for config in _compat.attention_configs(model))
            and (_is_only_speculative(model) if verifies else "_patchkit" not in vars(model))
            and (not verifies or _runs_its_own_code(model))
        )

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Feed T tokens [R, T]: logits [R, T, V] and last hidden states [R, T, D]; None, and nothing is fed, if there is no trace."""
        layers, count = self.cache.layers, tokens.shape[1]
        if not all(layer.is_initialized for layer in layers) or torch.is_autocast_enabled("cpu"):
            return None
        for layer in layers:
            layer.reserve(layer.seen + count)
        if self.cache.room > _MOST_ROOM:
            return None
        keys = layers[0].keys
        start = torch.full((len(keys),), layers[0].seen) if self.cache.offsets is None else self.cache.offsets
        slots = start[:, None] + torch.arange(count)
        room = min(self.cache.room, -(-(max(layer.seen for layer in layers) + count) // _SLOTS) * _SLOTS)
        places = torch.arange(room)
        unseen = (places > slots[:, :, None]) | (places < self.pads[:, None, None])
        mask = torch.zeros(unseen.shape, dtype=keys.dtype).masked_fill_(unseen, torch.finfo(keys.dtype).min)[:, None]
        positions = (slots - self.pads[:, None]).clamp_(min=0)
        buffers = [buffer[:, :, :room] for layer in layers for buffer in (layer.keys, layer.values)]
        arguments = (tokens, mask, positions, slots, *buffers)
        trace = self._trace(arguments)
        if trace is None:
            return None
        with _as_traced():
            logits, hidden = trace(*arguments)
        self.cache.advance(count)
        self.cache.place(count)
        return logits, hidden

    def _trace(self, arguments: tuple[torch.Tensor, ...]) -> Any:
        """What runs a forward with arguments of these shapes; None, with a line in the log, if that has to be the model."""
        tokens, mask = arguments[:2]
        traces = _traces.setdefault(self.model, {})
        # Code that asks for the number of rows or tokens asks whether there is more than one.
        many = len(tokens) > 1, tokens.shape[1] > 1, self.verifies and tokens.numel() >= _MANY
        kind = many, mask.dtype, torch.is_inference_mode_enabled()
        shape = *tokens.shape, mask.shape[-1]
        key = (self.verifies, self.parameters, *kind)
        trace = traces.get(key)
        # What else a trace has taken over from the model (buffers, numbers in modules, code) may have been changed since the last text.
        due = self.verifies and kind not in self.compared
        if trace is not None and (trace.run is None or (not due and (shape in trace.agrees or _proven(trace)))):
            return trace.run if trace.agrees.get(shape, True) else None
        started = time.perf_counter()
        self.compared.add(kind)
        arguments = (*arguments[:4], *(buffer.clone() for buffer in arguments[4:]))
        agreed = trace is not None and trace.agrees.get(shape, _proven(trace))
        if trace is not None:
            trace.agrees[shape] = self._agrees(trace, arguments)
        if trace is None or (agreed and not trace.agrees[shape]):
            # Other weights, or something else that was changed: older traces are of no use.
            outdated = [each for each in traces if each[0] == self.verifies and (trace is not None or each[1] != self.parameters)]
            for each in outdated:
                del traces[each]
            if outdated:
                _looks.pop(self.model, None)
            trace = traces[key] = _Trace(self._make(arguments))
            trace.agrees[shape] = trace.run is not None and self._agrees(trace, arguments)
        making.milliseconds += 1000 * (time.perf_counter() - started)
        return trace.run if trace.agrees[shape] else None

    def _looks(self, step: nn.Module, arguments: tuple[torch.Tensor, ...]) -> str | None:
        """Where the model looks into a tensor, found out once."""
        known = _looks.setdefault(self.model, {})
        if self.parameters not in known:
            known[self.parameters] = _compat.looks_into_tensors(step, *arguments)
        return known[self.parameters]

    def select_rows(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.pads = self.pads[rows]

    def _make(self, arguments: tuple[torch.Tensor, ...]) -> Any:
        """A trace, or None where it cannot be made."""
        name, turned = type(self.model).__name__, {} if self.verifies else self._turned()
        step = _Step(self.model, list(turned.values()))
        try:
            looks = self._looks(step, arguments) if self.verifies else None
            if looks is not None:
                _logger.debug("patchkit: %s verifies untraced: it looks into a tensor (%s)", name, looks)
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values taken from shapes
                with _Products(arguments[0].numel() >= _MANY, turned):
                    return torch.jit.trace(step, arguments, check_trace=False)
        except Exception as error:
            _logger.debug("patchkit: %s runs untraced (%s: %s)", name, type(error).__name__, str(error).strip()[:200])
            return None

    def _turned(self) -> dict[int, torch.Tensor]:
        """Copies for `_Products`. Not where the result decides what the text will be, since a weight may be changed in its place."""
        weights = [parameter for parameter in self.model.parameters() if parameter.ndim == 2]
        return {id(weight): weight.detach().t().contiguous().t() for weight in weights}

    def _agrees(self, trace: _Trace, arguments: tuple[torch.Tensor, ...]) -> bool:
        """Whether the trace gives what the model gives for other tokens, one place further back."""
        tokens, mask, positions, slots, *buffers = arguments
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        elsewhere = ((tokens + 1) % vocabulary, mask, (positions - 1).clamp(min=0), slots - 1, *buffers)
        wanted = [output.clone() for output in _Step(self.model)(*elsewhere)]
        try:
            with _as_traced():
                errors = [logit_error(ours, theirs) for ours, theirs in zip(trace.run(*elsewhere), wanted, strict=True)]
        except RuntimeError as error:  # a size that became a constant of the trace
            _logger.debug(
                "patchkit: %s runs untraced at %s (%s)", type(self.model).__name__, tuple(tokens.shape), str(error).strip()[-200:]
            )
            return False
        if not all(error <= TOLERANCES[self.model.dtype].logits for error in errors):  # nor is a NaN
            _logger.debug(
                "patchkit: %s runs untraced at %s: its trace is off by %s", type(self.model).__name__, tuple(tokens.shape), errors
            )
            return False
        return True


def _proven(trace: _Trace) -> bool:
    """Whether a trace has agreed with the model at so many shapes that it does at all."""
    return len(trace.agrees) >= _SHAPES and all(trace.agrees.values())


def _as_traced() -> Any:
    """TorchScript's optimiser off: it takes half a second for each trace, and finds nothing in one."""
    return torch.jit.optimized_execution(False)


def _is_only_speculative(model: Any) -> bool:
    handle = vars(model).get("_patchkit")
    return handle is not None and [patch.name for patch, _ in handle.views] == ["speculative"]


def _runs_its_own_code(model: Any) -> bool:
    """Whether no module has a hook (but for ours on the decoder), a forward of its own, or a class of another library."""
    decoder = _compat.decoder_of(model)
    if _compat.has_global_hooks():
        return False
    for module in model.modules():
        if not type(module).__module__.startswith(("transformers.", "torch.nn.")) or "forward" in vars(module):
            return False
        if module._forward_pre_hooks or len(module._forward_hooks) > (module is decoder):
            return False
    return not model.training


class _Products(TorchFunctionMode):
    """Linear layers of few rows as fast as they can be: from 16 rows on, MKL's product with a weight as torch stores it is 2 to 4 times
    slower than the product of the weight with the rows (for square and wide ones), or with the weight stored the other way round.

    Args:
        many: there are 16 rows or more.
        turned: copies of weights, column after column, by their identity.
    """

    def __init__(self, many: bool, turned: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self.many, self.turned = many, turned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear or kwargs or type(args[1]) is not nn.Parameter or args[1].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        if id(weight) in self.turned:
            return func(x, self.turned[id(weight)], *bias)
        if not self.many or weight.shape[0] < weight.shape[1]:
            return func(*args)
        y = (weight @ x.flatten(0, -2).t()).t().unflatten(0, x.shape[:-1])
        return y.contiguous() if not bias or bias[0] is None else y + bias[0]


class _Step(nn.Module):
    """A forward as a function of tensors only.

    Args:
        constants: tensors that a trace will meet beside the model's own. As buffers they are freed with the trace; TorchScript keeps
            what stands in its code until the process ends.
    """

    def __init__(self, model: Any, constants: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.model = model
        for number, constant in enumerate(constants):
            self.register_buffer(f"constant_{number}", constant)

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, *buffers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = _compat.Cache(layers=[_StepLayer(*pair, slots) for pair in zip(buffers[::2], buffers[1::2], strict=True)])
        seen: list[Any] = []
        hook = _compat.decoder_of(self.model).register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            with masks_from(_compat.attention_configs(self.model), None):
                output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **{_compat.CACHE: cache})
        finally:
            hook.remove()
        return output.logits, seen[0]


class _StepLayer(_compat.CacheLayerMixin):
    """A layer's buffers [R, G, C, K] and [R, G, C, V], and the slots [R, T] of the new tokens."""

    is_compileable = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the buffers exist."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if len(buffer) == 1:
                buffer.index_copy_(2, self.slots[0], new)
            else:
                buffer.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - self.slots.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1
