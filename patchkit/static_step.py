"""Caches for compiled code: tensors of fixed shape at fixed addresses, and no Python number that changes from step to step.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim, C capacity of the layer's buffers.

`FixedCache` is the cache of an unpatched model whose steps are compiled; a `StreamingCache` makes `StepCache` objects too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import StreamError

# The least room of a `FixedCache`, in tokens; every room is a power of two, so that there are few different ones.
LEAST_ROOM = 512


@dataclass(eq=False)
class Sinks:
    """Sinks in the first S slots of a ring buffer, which every step rewrites with its own rotation.

    Attributes:
        in_values: the n rotated dimensions are in the values; otherwise in the keys.
        start: the first of the n rotated dimensions.
        raw: [B, G, S, n] float32, the sinks unrotated.
        quarter: [B, G, S, n] float32, the sinks rotated by a right angle.
        cos, sin: [B or 1, 1, 1, n] float32, the rotation.
    """

    in_values: bool
    start: int
    raw: torch.Tensor
    quarter: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def room_for(tokens: int) -> int:
    """Return the room of buffers for ``tokens`` tokens, of which there are few different ones."""
    return max(LEAST_ROOM, 1 << (tokens - 1).bit_length())


class StepLayer(_compat.CacheLayerMixin):
    """One layer's buffers of keys [B, G, C, K] and values [B, G, C, V], and the slots [T] that the new tokens take."""

    is_compileable = True

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, sinks: Sinks | None = None) -> None:
        super().__init__()
        self.keys, self.values, self.slots, self.sinks = keys, values, slots, sinks
        self.is_initialized = True
        for tensor in [keys, values, slots, *((sinks.raw, sinks.quarter, sinks.cos, sinks.sin) if sinks else ())]:
            _compat.mark_static_address(tensor)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the buffers exist before the step does."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys [B, G, T, K] and values [B, G, T, V] in the slots; return the whole buffers."""
        assert self.keys is not None and self.values is not None
        self._write(self.keys, key_states, self.sinks if self.sinks is not None and not self.sinks.in_values else None)
        self._write(self.values, value_states, self.sinks if self.sinks is not None and self.sinks.in_values else None)
        return self.keys, self.values

    def _write(self, ring: torch.Tensor, new: torch.Tensor, sinks: Sinks | None) -> None:
        # One write by index: inductor does that in place, where it would copy the ring to write to a slice of it.
        slots = self.slots
        if sinks is not None:
            rotated = torch.addcmul(sinks.raw * sinks.cos, sinks.quarter, sinks.sin).to(new.dtype)
            count, end = rotated.shape[2], sinks.start + rotated.shape[3]
            held = ring[:, :, :count]
            new = torch.cat([torch.cat([held[..., : sinks.start], rotated, held[..., end:]], -1), new], 2)
            slots = torch.cat([torch.arange(count, device=slots.device), slots])
        ring.index_copy_(2, slots, new.to(ring.dtype))

    def get_seq_length(self) -> int:
        raise StreamError("a layer of a step does not know how many tokens were seen: ask its StepCache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1


class StepCache(_compat.Cache):
    """The cache that compiled code works on in one forward of T tokens.

    Attributes:
        layers: a `StepLayer` for every layer of the model.
        seen: [] int64, tokens before this forward.
        masks: [B or 1, 1, T, C] each, added to the scores, one for each rule of a stream; empty where the model makes its own mask.
        masks_open: the masks hide nothing, in this step and in all later ones.
    """

    layers: list[Any]

    def __init__(self, layers: list[Any], seen: torch.Tensor, masks: Sequence[torch.Tensor] = ()) -> None:
        super().__init__(layers=layers)
        self.seen = seen
        self.masks = masks
        self.masks_open = False
        for tensor in [seen, *masks]:
            _compat.mark_static_address(tensor)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)

    def layer(self, index: int) -> Any:
        """The layer of this index."""
        return self.layers[index]

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.seen


class LayerOfStep(StepCache):
    """A view of one layer of a `StepCache`, so that no decoder layer's code depends on its index."""

    def __init__(self, step: StepCache, index: int) -> None:
        self.layers = [step.layers[index]]
        self.seen, self.masks = step.seen, step.masks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[0].update(key_states, value_states)

    def layer(self, index: int) -> Any:
        return self.layers[0]


def of_one_dtype(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert new keys and values, and those that ``layer`` holds, to the wider of their dtypes, as concatenation does.

    They differ where autocast begins or ends within a sequence.
    """
    if keys.dtype == layer.keys.dtype and values.dtype == layer.values.dtype:
        return keys, values
    of_keys, of_values = torch.promote_types(keys.dtype, layer.keys.dtype), torch.promote_types(values.dtype, layer.values.dtype)
    layer.keys, layer.values, layer.dtype = layer.keys.to(of_keys), layer.values.to(of_values), of_keys
    return keys.to(of_keys), values.to(of_values)


class FixedLayer(_compat.CacheLayerMixin):
    """All keys and values of one layer so far, at the front of a buffer with room for more."""

    is_compileable = False
    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        size = (*key_states.shape[:2], self.room)
        self.keys = key_states.new_zeros(*size, key_states.shape[-1])
        self.values = value_states.new_zeros(*size, value_states.shape[-1])
        self.is_initialized = True

    def reserve(self, tokens: int) -> bool:
        """Make room for ``tokens`` in all, at new addresses if there is none. Returns whether the buffers have moved."""
        # Tensors made in inference mode can be written to in inference mode only.
        unwritable = self.is_initialized and self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if tokens <= self.room and not unwritable:
            return False
        self.enlarge(max(self.room, room_for(tokens)))
        return True

    def enlarge(self, room: int) -> None:
        """Move to new buffers with ``room`` slots."""
        self.room = room
        if self.is_initialized:
            keys, values = self.keys, self.values
            self.lazy_initialization(keys, values)
            self.keys[:, :, : self.seen] = keys[:, :, : self.seen]
            self.values[:, :, : self.seen] = values[:, :, : self.seen]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys [B, G, T, K] and values [B, G, T, V]; return all so far."""
        end = self.seen + key_states.shape[2]
        self.reserve(end)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = of_one_dtype(self, key_states, value_states)
        self.keys[:, :, self.seen : end] = key_states
        self.values[:, :, self.seen : end] = value_states
        self.seen = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.seen = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or -tokens_to_remove > self.seen:
            raise ValueError(f"crop({tokens_to_remove}) of {self.seen} tokens: pass minus the number of tokens to remove")
        self.seen += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Do nothing: every token is kept."""

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``index``, a selection of batch rows, to keys and values."""
        if self.is_initialized:
            self.keys, self.values = index(self.keys), index(self.values)


class FixedCache(_compat.Cache):
    """The cache of a model whose steps are compiled: all keys and values, in buffers that rarely move."""

    layers: list[Any]

    def __init__(self, layers: int, tokens: int = 1) -> None:
        """Make ``layers`` layers with room for ``tokens`` tokens, which grows when it is needed."""
        super().__init__(layers=[FixedLayer(room_for(tokens)) for _ in range(layers)])
        self._steps: dict[int, StepCache] = {}
        self.autocast: torch.dtype | None = None  # of the last eager forward

    @property
    def room(self) -> int:
        """Tokens that the buffers can hold."""
        return self.layers[0].room

    @property
    def max_cache_len(self) -> int:
        """No limit, as -1: PEFT asks every cache that is no DynamicCache."""
        return -1

    @property
    def step_lengths(self) -> tuple[int, ...]:
        """Numbers of tokens of a forward that occur often enough to be compiled."""
        return (1,)

    def fixed_step(self, tokens: int) -> StepCache:
        """Return the cache that compiled code works on in the next forward, of ``tokens`` tokens. Call `advance` afterwards."""
        layers = self.layers
        seen, device = layers[0].seen, layers[0].keys.device
        for layer in layers:
            layer.reserve(seen + tokens)  # those that are empty, too: all have one room
        step = self._steps.get(tokens)
        if step is not None and step.layers[0].keys is not layers[0].keys:
            self._steps.clear()  # they keep the old buffers alive
            step = None
        if step is None:
            slots = torch.empty(tokens, dtype=torch.int64, device=device)
            at = torch.zeros((), dtype=torch.int64, device=device)
            # A decoder layer may have been removed; its layer of the cache then stays empty.
            own = [StepLayer(layer.keys, layer.values, slots) if layer.is_initialized else layer for layer in layers]
            step = self._steps[tokens] = StepCache(own, at)
        step.seen.fill_(seen)
        torch.arange(seen, seen + tokens, out=step.layers[0].slots)
        return step

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as seen, after compiled code has stored them."""
        for layer in self.layers:
            layer.seen += tokens

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, 0))

    def _select(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            layer.select_rows(index)
