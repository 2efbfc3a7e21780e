"""`WeightWatch`: whether the weights of a model have changed since the last look.

No single sign is enough. Fused optimizers and edits through ``.data`` leave a tensor's version counter as it is, and an optimizer step
leaves its address. So a `Stamp` holds four of them: steps of optimizers, places, sampled values, and the state of PEFT's adapters.

What it cannot see: an edit through ``.data``, or by a kernel of one's own, that misses all 16 sampled values of each tensor.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import optimizer as optimizers

from patchkit import _compat

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

# Values that are compared of each tensor.
_SAMPLED = 16


@dataclass(frozen=True)
class Stamp:
    """Four signs of the state of some weights. Stamps of one watch are equal as long as nothing has changed.

    Attributes:
        steps: of optimizers that hold one of the tensors, since the watch began.
        places: of each tensor its address, version counter and device; None in a watch that was copied, whose tensors are others.
        values: of each tensor its shape and dtype; and the bytes of 16 values of each, spread over it.
        adapters: of each of PEFT's layers its active and merged adapters, their scales, and whether they are disabled.
    """

    steps: int
    places: tuple[tuple[int, int, torch.device], ...] | None
    values: tuple[tuple[tuple[torch.Size, torch.dtype], ...], tuple[bytes, ...]]
    adapters: tuple[Any, ...]


_SIGNS = tuple(each.name for each in dataclasses.fields(Stamp))


class WeightWatch:
    """A watch over the parameters and saved buffers of a module, or over some tensors.

    While one lives, a hook of torch's optimizers tells it of their steps (`register_optimizer_step_post_hook`); the last one takes
    the hook along when it is closed or deleted. A copy or a pickle of a watch goes on: it knows the values that the original had
    settled on, and whether they had changed since.

    Attributes:
        watched: the module, or the list of tensors.
        steps: of optimizers that hold one of the tensors, so far.
    """

    def __init__(self, watched: nn.Module | Iterable[torch.Tensor]) -> None:
        self.watched = watched if isinstance(watched, nn.Module) else list(watched)
        self.steps = 0
        self._held: set[int] = set()
        self._settled: Stamp | None = self.stamp()
        _open(self)

    def stamp(self) -> Stamp:
        """Return the state of the weights, hashable. Costs some 10 microseconds per tensor on a CPU."""
        if isinstance(self.watched, nn.Module):
            tensors, modules = _compat.weights_and_modules(self.watched)
            adapters = _compat.adapter_states(modules)
        else:
            tensors, adapters = self.watched, ()
        self._held = {id(tensor) for tensor in tensors}
        parts = [part for tensor in tensors for part in parts_of(tensor)]
        pointers = [_pointer(part) for part in parts]
        places = tuple((at, _compat.version_of(part), part.device) for part, at in zip(parts, pointers, strict=True))
        shapes = tuple((part.shape, part.dtype) for part in parts)
        return Stamp(self.steps, places, (shapes, _sampled(part for part, at in zip(parts, pointers, strict=True) if at)), adapters)

    def changes(self) -> frozenset[str]:
        """Return the names of those fields of `Stamp` that are not what they were at the last `settle`, or in the beginning."""
        now, before = self.stamp(), self._settled
        if before is None:
            return frozenset(_SIGNS)
        if before.places is None:
            before = dataclasses.replace(before, places=now.places)
        found = frozenset(name for name in _SIGNS if getattr(now, name) != getattr(before, name))
        if not found:
            self._settled = now
        return found

    def glance(self) -> bool:
        """Return whether optimizer steps, addresses or version counters show a change of the listed tensors: cheaper than `changes`."""
        before = self._settled
        if self.stepped or before is None or isinstance(self.watched, nn.Module):
            return self.stepped
        parts = [part for tensor in self.watched for part in parts_of(tensor)]
        return before.places is not None and before.places != tuple((_pointer(p), _compat.version_of(p), p.device) for p in parts)

    @property
    def stepped(self) -> bool:
        """Whether an optimizer that holds one of the tensors has made a step since the last `settle`."""
        return self._settled is None or self.steps != self._settled.steps

    def settle(self) -> None:
        """Take the weights as they are now for what later ones are compared with."""
        self._settled = self.stamp()

    def close(self) -> None:
        """Hear of no more optimizer steps."""
        _close(id(self))

    def __getstate__(self) -> dict[str, Any]:
        known = self._settled is not None and not self.changes()
        settled = dataclasses.replace(self._settled, steps=0, places=None) if known and self._settled is not None else None
        return {"watched": self.watched, "settled": settled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The tensors may not be there yet. The first stamp looks at them.
        self.watched, self._settled = state["watched"], state["settled"]
        self.steps, self._held = 0, set()
        _open(self)


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own that a tensor of a subclass is made of; any other tensor itself."""
    if type(tensor) is nn.Parameter or type(tensor) is torch.Tensor or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
    else:
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts_of(getattr(tensor, name))


def _pointer(tensor: torch.Tensor) -> int:
    """The address of a tensor's values; 0 where there are none to look at (meta device, sparse, quantised by torch itself)."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return 0
    return tensor.data_ptr()


@torch.no_grad()
def _sampled(tensors: Iterable[torch.Tensor]) -> tuple[bytes, ...]:
    """The bytes of 16 values of each tensor: bytes, because NaN has to equal NaN."""
    samples: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        samples.setdefault((tensor.dtype, tensor.device), []).append(_sample(tensor))
    # One transfer for each dtype and device.
    return tuple(torch.cat(each).cpu().view(torch.uint8).numpy().tobytes() for each in samples.values())


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    count = tensor.numel()
    if tensor.is_contiguous():
        if count <= _SAMPLED:
            return tensor.reshape(-1)
        return tensor.as_strided((_SAMPLED,), ((count - 1) // (_SAMPLED - 1),), tensor.storage_offset())
    places = torch.arange(min(count, _SAMPLED)) * max((count - 1) // (_SAMPLED - 1), 1)
    return tensor[torch.unravel_index(places.to(tensor.device), tensor.shape)]


_guard = threading.RLock()
_open_watches: dict[int, weakref.ref[WeightWatch]] = {}
_hook: RemovableHandle | None = None


def _open(watch: WeightWatch) -> None:
    global _hook
    key = id(watch)
    with _guard:
        _open_watches[key] = weakref.ref(watch, lambda reference: _close(key))
        if _hook is None:
            _hook = optimizers.register_optimizer_step_post_hook(_after_step)


def _close(key: int) -> None:
    global _hook
    with _guard:
        _open_watches.pop(key, None)
        # A step iterates over the hooks, so one must not be removed meanwhile: then the hook stays, idle, for the next watch.
        if not _open_watches and _hook is not None and not _is_in_a_step():
            _hook.remove()
            _hook = None


def _is_in_a_step() -> bool:
    """Whether this thread is in the step of an optimizer: garbage may be collected anywhere."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == optimizers.__file__:
            return True
        frame = frame.f_back
    return False


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled step bumps version counters
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for reference in list(_open_watches.values()):
        watch = reference()
        if watch is not None and not watch._held.isdisjoint(stepped):
            watch.steps += 1
