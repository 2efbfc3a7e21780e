"""State of a model patched with `prefix_cache`: its store, and the conditions under which something that is kept may be used."""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import platform
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import PatchConflict
from patchkit.freshness import WeightWatch, parts_of
from patchkit.handle import Handle
from patchkit.prefix.disk import DiskSpace, DiskTier, weights_hash
from patchkit.prefix.prompt import Prompt
from patchkit.prefix.snapshot import is_served
from patchkit.prefix.store import PrefixStore
from patchkit.record import Warnings

_STATE = "_patchkit_prefix"  # the attribute of a patched model

# By the identity of a `Prefixes`.
_salts: contextvars.ContextVar[dict[int, str]] = contextvars.ContextVar("patchkit_salts", default={})  # noqa: B039  never written to
_pinning: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar("patchkit_pinning", default=frozenset())


@dataclass(eq=False)
class Prefixes:
    """The kept prompts of one patched model.

    A copy or a pickle of the model begins with an empty store.

    Attributes:
        block: tokens between two borders.
        specs: the patches of the model, as spec strings.
        hits: run-time counters of the patch.
        disk: a folder where blocks without states are kept too; None for none.
    """

    model: Any
    block: int
    max_bytes: int
    specs: str
    hits: Counter[str]
    warnings: Warnings
    weights: WeightWatch
    disk: DiskTier | None = None
    store: PrefixStore = field(init=False)
    _stamp: Any = None
    _weights: tuple[Any, str] = (None, "")  # a stamp, and the hash of all weights at that time

    @property
    def salt(self) -> str:
        """Salt of the current thread or task: a prompt that was kept under another one is not found."""
        return _salts.get().get(id(self), "")

    @property
    def pinning(self) -> bool:
        """Whether `pin` runs, in the current thread or task."""
        return id(self) in _pinning.get()

    def __post_init__(self) -> None:
        self.store = PrefixStore(self.max_bytes, self.hits)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("store", "_stamp", "_weights")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._stamp, self._weights = None, (None, "")
        self.store = PrefixStore(self.max_bytes, self.hits)
        self.hits["bytes"] = 0

    def begin(self, ids: list[int], namespace: Hashable, cache: Any) -> Prompt:
        """Look up the token ids of one prompt without padding.

        Args:
            namespace: what `namespace` gives.
            cache: an empty cache, of the kind that will be fed.
        """
        prompt = Prompt(self.store, namespace, ids, self.block, cache, pinned=self.pinning, disk=self._disk_space(namespace))
        self.hits["lookups"] += 1
        self.hits["hits"] += prompt.past > 0
        self.hits["prompt tokens"] += len(ids)
        self.hits["reused tokens"] += prompt.past
        return prompt

    def clear(self) -> None:
        """Drop all that is kept."""
        self.store.clear()

    def leave_alone(self, reason: str) -> None:
        """Count a call that is not served, and say why the first time."""
        self.hits["left alone"] += 1
        self.warnings.add(f"generate ran without the prefix cache: it does not serve {reason}")

    def obstacle(self, tokens: int, cache: Any) -> str | None:
        """Why prompts of ``tokens`` tokens, in a cache like ``cache``, cannot be served; None if they can."""
        if cache is None:
            return "generation without a cache"
        if cache.get_seq_length():
            return "a cache that is given, and holds tokens"
        if not is_served(cache):
            return f"a {type(cache).__name__}"
        limit = _compat.rope_switch(self.model.config.get_text_config(decoder=True))
        if limit is not None and tokens > limit:
            return f"prompts beyond the {limit} positions at which this model changes all its rotary frequencies"
        if not str(getattr(self.model.prepare_inputs_for_generation, "__module__", "")).startswith("transformers."):
            return "a prepare_inputs_for_generation that is not transformers' own (PEFT's prompt tuning, say)"
        if _compat.has_adapters_by_row(self.model):
            return "adapter_names=, which chooses an adapter for each row"
        if self.model.training and _has_dropout(self.model):
            return "training mode with dropout, where no two forwards are equal"
        return None

    def _disk_space(self, namespace: Any) -> DiskSpace | None:
        """The place of a namespace on the disk, by values that are the same in every process."""
        if self.disk is None:
            return None
        stamp, *others = namespace
        if self._weights[0] != stamp:
            tensors, _ = _compat.weights_and_modules(self.model)
            self._weights = stamp, weights_hash([part for tensor in tensors for part in parts_of(tensor)])
        config = self.model.config.to_json_string()
        text = repr((self._weights[1], config, stamp.adapters, *others, self.block, *_environment()))
        return DiskSpace(self.disk, hashlib.sha256(text.encode()).hexdigest())

    def namespace(self, cache: Any, hidden: bool = False) -> Hashable:
        """Everything that the bits of a cache depend on, besides the token ids.

        Args:
            cache: an empty cache, of the kind that will be fed.
            hidden: hidden states are wanted too, so that only what was kept with them serves.
        """
        stamp = self.weights.stamp()
        if stamp != self._stamp:  # nothing that was kept before serves now
            self._stamp = stamp
            self.store.unpin(lambda name: name[0] == stamp)
        device = self.model.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        return (
            stamp,
            str(self.model.dtype),
            str(device),
            tuple(str(getattr(config, _compat.ATTENTION_NAME, None)) for config in _compat.attention_configs(self.model)),
            self.specs,
            self.salt,
            type(cache).__qualname__,
            tuple(type(layer).__qualname__ for layer in cache.layers),
            hidden,
            self.model.training,
            autocast,
            torch.is_inference_mode_enabled(),
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
        )


def _environment() -> tuple[str, ...]:
    """Software and processors, on which bits depend too."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    software = torch.__version__, version("transformers"), version("patchkit"), str(torch.version.cuda)
    return *software, platform.machine(), torch.backends.cpu.get_cpu_capability(), *gpus


def _has_dropout(model: nn.Module) -> bool:
    """Whether a module of the model drops values in training mode."""
    for module in model.modules():
        rates = (getattr(module, name, 0) for name in ("p", "dropout", "attention_dropout"))
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


def keep_prefixes(handle: Handle, prefixes: Prefixes) -> None:
    """Set ``prefixes`` on its model, until the model is unpatched."""
    handle.set_attribute(prefixes.model, _STATE, prefixes)


def find_prefixes(model: Any) -> Prefixes | None:
    """Return the state of a model that is patched with `prefix_cache`; None for another model."""
    found: Prefixes | None = vars(model).get(_STATE)
    return found


def prefixes_of(model: Any) -> Prefixes:
    """Return the state of a model that is patched with `prefix_cache`, also in PEFT's wrapper.

    Raises:
        PatchConflict: it is not patched with `prefix_cache`.
    """
    base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    found = find_prefixes(base)
    if found is None:
        raise PatchConflict(f"this {type(model).__name__} is not patched with prefix_cache: patch_model(model, 'prefix_cache') first")
    return found


@dataclass(frozen=True)
class PrefixStatistics:
    """Counters of a prefix cache since the model was patched.

    Attributes:
        lookups: prompts that were looked up; equal prompts of one call count once.
        hits: those of which a prefix was found.
        prompt_tokens, reused_tokens: tokens of the prompts that were looked up, and those that were not fed again.
        repeated_rows: rows of batches that were equal to another row, and were not fed.
        left_alone: calls that were not served.
        bytes: kept now.
        entries: blocks kept now.
        evictions: blocks that had to make room.
        skipped: blocks or states that were too large for ``max_bytes``.
    """

    lookups: int
    hits: int
    prompt_tokens: int
    reused_tokens: int
    repeated_rows: int
    left_alone: int
    bytes: int
    entries: int
    evictions: int
    skipped: int

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were not fed again."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def prefix_statistics(model: Any) -> PrefixStatistics:
    """Return the counters of a model's prefix cache.

    Raises:
        PatchConflict: the model is not patched with `prefix_cache`.
    """
    prefixes = prefixes_of(model)
    counted = {name: prefixes.hits[name.replace("_", " ")] for name in PrefixStatistics.__dataclass_fields__}
    return PrefixStatistics(**{**counted, "entries": prefixes.store.tree.count, "bytes": prefixes.store.kept})


def clear_prefix_cache(model: Any) -> None:
    """Drop all that is kept, pinned prompts too. The counters stay.

    Needed after an edit of weights through ``.data`` that `patchkit.refresh` describes as unseen.

    Raises:
        PatchConflict: the model is not patched with `prefix_cache`.
    """
    prefixes_of(model).store.clear()


def pin(model: Any, ids: torch.Tensor) -> int:
    """Feed a prompt, such as a system message, and never evict what is kept of it, until weights change or the cache is cleared.

    Args:
        ids: [T] or [1, T] int64.

    Returns:
        Tokens that are pinned: up to the last border of a block that is below T. 0 where there is none, or no room.

    Raises:
        PatchConflict: the model is not patched with `prefix_cache`.
    """
    prefixes, ids = prefixes_of(model), ids.reshape(1, -1)
    before = sum(node.depth for node in prefixes.store.tree.nodes() if node.pins)
    token = _pinning.set(_pinning.get() | {id(prefixes)})
    try:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    finally:
        _pinning.reset(token)
    pinned = sum(node.depth for node in prefixes.store.tree.nodes() if node.pins) - before
    return pinned * prefixes.block


@contextlib.contextmanager
def salted(model: Any, salt: str) -> Iterator[None]:
    """Find within the context only what was kept under the same salt, so that users who must not learn of each other do not.

    It holds for the current thread or task, and for sequences that are submitted to a `patchkit.speculation.Scheduler` within it.

    How long a prompt takes tells whether it was kept (CVE-2025-46570). The operator chooses the salt, never the caller.

    Raises:
        PatchConflict: the model is not patched with `prefix_cache`.
    """
    prefixes = prefixes_of(model)
    token = _salts.set(_salts.get() | {id(prefixes): salt})
    try:
        yield
    finally:
        _salts.reset(token)
