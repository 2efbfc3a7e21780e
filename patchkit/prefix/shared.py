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
from patchkit.prefix.prompt import Prompt, last_border
from patchkit.prefix.snapshot import is_served
from patchkit.prefix.store import PrefixStore
from patchkit.record import Warnings
from patchkit.training_mode import drops_values

_STATE = "_patchkit_prefix"  # the attribute of a patched model

# By the identity of a `Prefixes`.
_salts: contextvars.ContextVar[dict[int, str]] = contextvars.ContextVar("patchkit_salts", default={})  # noqa: B039  never written to
# By the identity of a `Prefixes` that is pinning: the prompts that have been looked up meanwhile.
_pinning: contextvars.ContextVar[dict[int, list[Prompt]]] = contextvars.ContextVar("patchkit_pinning", default={})  # noqa: B039  as above


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
    _disk_space: tuple[Any, DiskSpace | None] = (None, None)  # a namespace, and its place
    _weights: tuple[Any, str] = (None, "")  # a stamp, and the hash of all weights at that time

    @property
    def salt(self) -> str:
        """Salt of the current thread or task: a prompt that was kept under another one is not found."""
        return _salts.get().get(id(self), "")

    def __post_init__(self) -> None:
        self.store = PrefixStore(self.max_bytes, self.hits)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("store", "_stamp", "_weights", "_disk_space")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._stamp, self._weights, self._disk_space = None, (None, ""), (None, None)
        self.store = PrefixStore(self.max_bytes, self.hits)
        self.hits["bytes"] = 0

    def last_border(self, tokens: int) -> int:
        """Return the last border of a prompt of so many tokens; 0 where there is none."""
        return last_border(tokens, self.block)

    def lookups(self, cache: Any, hidden: bool = False) -> Lookups:
        """Begin to look up the prompts of one call, within which the model does not change.

        Args:
            cache: an empty cache, of the kind that will be fed.
            hidden: hidden states are wanted too, so that only what was kept with them serves.
        """
        return Lookups(self, cache, hidden)

    def clear(self) -> None:
        """Drop all that is kept."""
        self.store.clear()

    def leave_alone(self, reason: str) -> None:
        """Count a call that is not served, and say why the first time."""
        self.hits["left alone"] += 1
        self.warnings.add(f"generate ran without the prefix cache: it does not serve {reason}")

    def obstacle(self, tokens: int, cache: Any, chunk: int | None = None) -> str | None:
        """Why prompts of ``tokens`` tokens, in a cache like ``cache``, cannot be served; None if they can.

        Args:
            chunk: the call's ``prefill_chunk_size``.
        """
        if cache is None:
            return "generation without a cache"
        if cache.get_seq_length():
            return "a cache that is given, and holds tokens"
        if not is_served(cache):
            return f"a {type(cache).__name__}"
        if chunk is not None and chunk < self.block:
            return f"prefill_chunk_size={chunk}, less than a block of {self.block} tokens"
        limit = _compat.rope_switch(self.model.config.get_text_config(decoder=True))
        if limit is not None and tokens > limit:
            return f"prompts beyond the {limit} positions at which this model changes all its rotary frequencies"
        if not str(getattr(self.model.prepare_inputs_for_generation, "__module__", "")).startswith("transformers."):
            return "a prepare_inputs_for_generation that is not transformers' own (PEFT's prompt tuning, say)"
        if _compat.has_adapters_by_row(self.model):
            return "adapter_names=, which chooses an adapter for each row"
        if drops_values(self.model):
            return "training mode with dropout, where no two forwards are equal"
        return None

    def disk_space(self, namespace: Any, cache: Any) -> DiskSpace | None:
        """The place of a namespace on the disk, by values that are the same in every process.

        Args:
            cache: an empty cache of the kind that the namespace is of. Its layers may hold modules, which are hashed like the model's.
        """
        if self.disk is None:
            return None
        known, space = self._disk_space
        if known == namespace:
            return space
        stamp, *others = namespace
        if self._weights[0] != stamp:
            parts = [module for layer in cache.layers for module in vars(layer).values() if isinstance(module, nn.Module)]
            tensors = [tensor for module in (self.model, *parts) for tensor in _compat.weights_and_modules(module)[0]]
            self._weights = stamp, weights_hash([part for tensor in tensors for part in parts_of(tensor)])
        config = self.model.config.to_json_string()
        text = repr((self._weights[1], config, stamp.adapters, *others, self.block, *_environment()))
        space = DiskSpace(self.disk, hashlib.sha256(text.encode()).hexdigest())
        self._disk_space = namespace, space
        return space

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


class Lookups:
    """The prompts of one call: what they have in common is found out once, and only if one of them is long enough to be kept.

    Args:
        cache: an empty cache, of the kind that will be fed.
        hidden: hidden states are wanted too.
    """

    def __init__(self, prefixes: Prefixes, cache: Any, hidden: bool) -> None:
        self.prefixes, self.hidden = prefixes, hidden
        self._cache = cache
        self._place: tuple[Hashable, DiskSpace | None] | None = None  # a namespace, and its place on the disk

    def begin(self, ids: list[int], cache: Any) -> Prompt:
        """Look up the token ids of one prompt without padding.

        Args:
            cache: an empty cache, of the kind that will be fed.
        """
        prefixes, pinning = self.prefixes, _pinning.get().get(id(self.prefixes))
        if self._place is None and prefixes.last_border(len(ids)):
            namespace = prefixes.namespace(self._cache, self.hidden)
            self._place = namespace, prefixes.disk_space(namespace, self._cache)
        namespace, disk = self._place or (None, None)
        prompt = Prompt(
            prefixes.store, namespace, ids, prefixes.block, cache, pinned=pinning is not None, disk=disk, wants_hidden=self.hidden
        )
        if pinning is not None:
            pinning.append(prompt)
        prefixes.hits["lookups"] += 1
        prefixes.hits["hits"] += prompt.past > 0
        prefixes.hits["prompt tokens"] += len(ids)
        prefixes.hits["reused tokens"] += prompt.past
        return prompt


def _environment() -> tuple[str, ...]:
    """Software and processors, on which bits depend too."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    software = torch.__version__, version("transformers"), version("patchkit"), str(torch.version.cuda)
    return *software, platform.machine(), torch.backends.cpu.get_cpu_capability(), *gpus


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
        Tokens of the prompt that are pinned now, whether or not they were before: up to the last border of a block that is below T. 0
        where there is none, or no room.

    Raises:
        PatchConflict: the model is not patched with `prefix_cache`.
    """
    prefixes, ids = prefixes_of(model), ids.reshape(1, -1)
    prompts = list[Prompt]()
    token = _pinning.set(_pinning.get() | {id(prefixes): prompts})
    try:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    finally:
        _pinning.reset(token)
    return max((prompt.held for prompt in prompts), default=0)


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
