"""Drafting steps without the model's Python: one token through a draft model as a TorchScript trace.

In a small model most of a step is Python between kernels. A trace replays the same kernels without it, and is made in a tenth
of a second, where compiling takes ten. A trace would also replay whatever the model decided while it was traced; a draft may,
since no draft decides what the text will be. It is checked against the model once all the same, on another token.

Shapes: R rows, C slots of the cache, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.cache.ragged import RaggedCache
from patchkit.testing import TOLERANCES, logit_error

_logger = logging.getLogger("patchkit")

# Traces of each draft model by (rows, room): they hold no text, so that any number of generations can use them.
_traces: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Any]] = weakref.WeakKeyDictionary()


class TracedSteps:
    """Single-token steps through ``model``, on the buffers of its cache; rows may be of different lengths.

    Args:
        pads: left padding of each row.
    """

    def __init__(self, model: Any, cache: RaggedCache, pads: list[int]) -> None:
        self.model, self.cache = model, cache
        self.pads = torch.tensor(pads)

    @staticmethod
    def serves(model: Any, cache: Any) -> bool:
        """Whether steps can be traced: an unpatched model on CPU, whose layers all see all keys."""
        return (
            isinstance(cache, RaggedCache)
            and model.device.type == "cpu"
            and "_patchkit" not in vars(model)
            and "position_ids" in _compat.argument_names(model)
            and {type(layer) for layer in _compat.DynamicCache(config=model.config).layers} == {_compat.DynamicLayer}
        )

    def begin(self, steps: int) -> bool:
        """Get ready for ``steps`` steps after what the cache holds. Returns False if this model cannot be traced."""
        layers = self.cache.layers
        if not all(layer.is_initialized for layer in layers):
            return False
        for layer in layers:
            layer.reserve(layer.seen + steps)
        keys = layers[0].keys
        self.slots = torch.full((len(keys),), layers[0].seen) if self.cache.offsets is None else self.cache.offsets.clone()
        places = torch.arange(self.cache.room)
        hidden = (places >= self.slots[:, None]) | (places < self.pads[:, None])
        lowest = torch.finfo(keys.dtype).min
        self.mask = torch.zeros(hidden.shape, dtype=keys.dtype).masked_fill_(hidden, lowest)[:, None, None]
        self.buffers = tuple(buffer for layer in layers for buffer in (layer.keys, layer.values))
        self.run = self._trace()
        return self.run is not None

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed one token [R, 1]; logits [R, V]."""
        self.mask.scatter_(3, self.slots[:, None, None, None], 0)
        logits = self.run(tokens, self.mask, (self.slots - self.pads)[:, None], self.slots, *self.buffers)
        self.slots += 1
        self.cache.advance(1)
        self.cache.place(1)
        return logits

    def _trace(self) -> Any:
        traces = _traces.setdefault(self.model, {})
        key = (self.mask.shape, self.mask.dtype, torch.is_inference_mode_enabled())
        if key not in traces:
            traces[key] = self._make()
        return traces[key]

    def _make(self) -> Any:
        """A trace, or None, with a line in the log, where it cannot be made or does not do what the model does."""
        name, step = type(self.model).__name__, _Step(self.model)
        mask = self.mask.scatter(3, self.slots[:, None, None, None], 0)
        copies = [buffer.clone() for buffer in self.buffers]
        tokens, positions = torch.zeros(len(self.slots), 1, dtype=torch.int64), (self.slots - self.pads)[:, None]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                traced = torch.jit.trace(step, (tokens, mask, positions, self.slots, *copies), check_trace=False)
            # Another token at another place; three times, because TorchScript goes on optimising.
            elsewhere = (tokens + 1, mask, positions - 1, self.slots - 1, *copies)
            wanted = step(*elsewhere)
            off = max(logit_error(traced(*elsewhere), wanted) for _ in range(3))
        except Exception as error:
            _logger.info("patchkit: %s drafts untraced (%s: %s)", name, type(error).__name__, str(error).strip()[:200])
            return None
        if off > TOLERANCES[self.model.dtype].logits:
            _logger.info("patchkit: %s drafts untraced: its trace is off by %.2g", name, off)
            return None
        return traced


class _Step(nn.Module):
    """One token through the model, as a function of tensors only."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, *buffers: torch.Tensor
    ) -> torch.Tensor:
        cache = _compat.Cache(layers=[_StepLayer(*pair, slots) for pair in zip(buffers[::2], buffers[1::2], strict=True)])
        output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return output.logits[:, -1]


class _StepLayer(_compat.CacheLayerMixin):
    """A layer's buffers [R, G, C, K] and [R, G, C, V], and the slot [R] of each row's new token."""

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
                buffer.index_copy_(2, self.slots, new)
            else:
                buffer.scatter_(2, self.slots[:, None, None, None].expand_as(new), new)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1
