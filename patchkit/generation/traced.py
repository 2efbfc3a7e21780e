"""Forwards without the model's Python: a few tokens through a small model as a TorchScript trace.

In a small model most of a forward is Python between kernels. A trace replays the same kernels without it, and is made in a tenth
of a second, where compiling takes ten.

A trace would also replay what the model decided by looking into a tensor. For drafts that does no harm, since no draft decides what
the text will be. A trace that verifies is only made if nothing looks: the forward must run on tensors without values. Nor is it made
where Python may do more than the model's code: with hooks, other patches, modules of other libraries. Both kinds are compared with
the model once, on other tokens at another place.

Shapes: R rows, T tokens, C slots of the cache, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.cache.ragged import RaggedCache
from patchkit.testing import TOLERANCES, logit_error

_logger = logging.getLogger("patchkit")

# Traces of each model by shape: they hold no text, so that any number of generations can use them.
_traces: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()


_looks: weakref.WeakKeyDictionary[nn.Module, dict[int, str | None]] = weakref.WeakKeyDictionary()

# In larger models kernels take the time, and in longer caches a trace reads all the slots that are still empty.
_MOST_PARAMETERS = 64_000_000
_MOST_ROOM = 2048


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
        # A trace keeps the parameters that it was made with.
        self.parameters = hash(tuple(id(parameter) for parameter in model.parameters()))

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
            and all((config._attn_implementation or "eager") in ("eager", "sdpa") for config in _compat.attention_configs(model))
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
        places = torch.arange(self.cache.room)
        unseen = (places > slots[:, :, None]) | (places < self.pads[:, None, None])
        mask = torch.zeros(unseen.shape, dtype=keys.dtype).masked_fill_(unseen, torch.finfo(keys.dtype).min)[:, None]
        positions = (slots - self.pads[:, None]).clamp_(min=0)
        buffers = [buffer for layer in layers for buffer in (layer.keys, layer.values)]
        arguments = (tokens, mask, positions, slots, *buffers)
        traces = _traces.setdefault(self.model, {})
        key = (self.verifies, self.parameters, mask.shape, mask.dtype, torch.is_inference_mode_enabled())
        if key not in traces:
            started = time.perf_counter()
            traces[key] = self._make(arguments)
            making.milliseconds += 1000 * (time.perf_counter() - started)
        if traces[key] is None:
            return None
        logits, hidden = traces[key](*arguments)
        self.cache.advance(count)
        self.cache.place(count)
        return logits, hidden

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
        """A trace, or None, with a line in the log, where it cannot be made or does not do what the model does."""
        name, step = type(self.model).__name__, _Step(self.model)
        tokens, mask, positions, slots, *buffers = arguments
        arguments = (tokens, mask, positions, slots, *(buffer.clone() for buffer in buffers))
        try:
            looks = self._looks(step, arguments) if self.verifies else None
            if looks is not None:
                _logger.debug("patchkit: %s verifies untraced: it looks into a tensor (%s)", name, looks)
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of values taken from shapes, which are those of the trace
                traced = torch.jit.trace(step, arguments, check_trace=False)
            # Other tokens one place further back.
            elsewhere = ((tokens + 1) % self.model.get_input_embeddings().weight.shape[0], mask, (positions - 1).clamp(min=0), slots - 1)
            wanted = [output.clone() for output in step(*elsewhere, *arguments[4:])]
            off = 0.0
            for _ in range(2):  # TorchScript optimises after its first run
                got = traced(*elsewhere, *arguments[4:])
                off = max(off, *(logit_error(ours, theirs) for ours, theirs in zip(got, wanted, strict=True)))
        except Exception as error:
            _logger.debug("patchkit: %s runs untraced (%s: %s)", name, type(error).__name__, str(error).strip()[:200])
            return None
        if off > TOLERANCES[self.model.dtype].logits:
            _logger.debug("patchkit: %s runs untraced: its trace is off by %.2g", name, off)
            return None
        return traced


def _is_only_speculative(model: Any) -> bool:
    handle = vars(model).get("_patchkit")
    return handle is not None and [patch.name for patch, _ in handle.views] == ["speculative"]


def _runs_its_own_code(model: Any) -> bool:
    """Whether no module has a hook (but for ours on the decoder), a forward of its own, or a class of another library."""
    decoder = _compat.decoder_of(model)
    for module in model.modules():
        if not type(module).__module__.startswith(("transformers.", "torch.nn.")) or "forward" in vars(module):
            return False
        if module._forward_pre_hooks or len(module._forward_hooks) > (module is decoder):
            return False
    return not model.training


class _Step(nn.Module):
    """A forward as a function of tensors only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, *buffers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = _compat.Cache(layers=[_StepLayer(*pair, slots) for pair in zip(buffers[::2], buffers[1::2], strict=True)])
        seen: list[Any] = []
        hook = _compat.decoder_of(self.model).register_forward_hook(lambda module, args, output: seen.append(output[0]))
        try:
            output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
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
