"""A prefix cache: what `generate` has computed of a prompt serves every later prompt that begins with the same tokens.

Zheng et al. 2023, "SGLang: Efficient Execution of Structured Language Model Programs", https://arxiv.org/abs/2312.07104 (RadixAttention).

1. A prompt is fed in blocks of B tokens, counted from its first token, whether or not anything is kept. So a hit makes the same forwards
   over the same numbers as a miss, and gives the same bits.
2. Behind each block, keys and values of the block are kept in a radix tree over token ids. Windows, rings, linear and recurrent states
   cannot be cut, so they are kept as a whole, at few borders: the last of a prompt, those behind 1, 2, 4, 8, ... blocks, and where a
   prompt branches off from one that was seen before.
3. The least recently used leaf is evicted before the bytes would exceed the bound.

Differs from the paper in that only borders of blocks are kept, so that hits are exact, and in that it serves caches that cannot be cut.

What it does to a model: `patchkit.prefix.generate` in transformers' own `generate`; `patchkit.speculation.prefixed` under `speculative`.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from typing import Any

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.errors import UnsupportedModel
from patchkit.freshness import WeightWatch
from patchkit.handle import Handle
from patchkit.patch import Facts, Patch, Promises, Stage, register_patch
from patchkit.prefix.disk import DiskTier
from patchkit.prefix.generate import prefill
from patchkit.prefix.probe import find_obstacle_to_blocks
from patchkit.prefix.shared import Prefixes, keep_prefixes

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@register_patch("prefix_cache")
@dataclass(frozen=True)
class PrefixCache(Patch):
    """Feed the common beginning of prompts once, across calls of `generate` and within a batch.

    `patchkit.prefix` has `prefix_statistics`, `clear_prefix_cache`, `pin` and `salted`.

    Args:
        max_bytes: the largest number of bytes that is kept, token ids included: a whole number, or text in KiB, MiB, GiB or TiB
            (powers of 1024) such as "2GiB".
        disk: a folder where blocks are kept too, for later processes and for others that run now; None for none.
        block: tokens of a block. Only whole blocks are kept, so up to ``block`` tokens of each hit are fed again. Small blocks cost
            time on a miss, because a forward of few tokens is less efficient; for states, each border that is kept costs all their bytes.
        disk_bytes: the largest number of bytes of the files in ``disk``.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.GENERATION
    exact = True
    acts = ("lookups",)
    example, evaluated = "prefix_cache(block=4)", "prefix_cache(block=64)"
    facts = Facts(
        goal="long prompts that begin alike (a system message, a chat that grows, samples of one prompt) fed once",
        exact="yes: a hit gives the bits of a miss; a miss is the model's own logits, to rounding, since it is fed in blocks",
        cost="memory up to `max_bytes`. A miss feeds `block` tokens at a time, and the rows of a batch one by one",
        source="Zheng et al. 2023, [2312.07104](https://arxiv.org/abs/2312.07104)",
    )

    max_bytes: Any = 2**31
    disk: str | None = None
    block: int = 512
    disk_bytes: Any = 2**34

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_bytes", _bytes("max_bytes", self.max_bytes))
        object.__setattr__(self, "disk_bytes", _bytes("disk_bytes", self.disk_bytes))
        if self.disk is not None:
            if not isinstance(self.disk, str | os.PathLike) or not os.fspath(self.disk):
                raise ValueError(f"disk={self.disk!r}: give the path of a folder, or None")
            object.__setattr__(self, "disk", os.fspath(self.disk))
            if os.path.isfile(self.disk):
                raise ValueError(f"disk={self.disk!r} is a file: give the path of a folder")
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 2:
            raise ValueError(f"block={self.block!r}: give a whole number of tokens, at least 2")

    def promises(self, target: Target) -> Promises:
        return Promises(same_logits=True, same_tokens=True)

    @classmethod
    def candidates(cls, target: Target) -> list[PrefixCache]:
        """None: what it saves depends on the prompts that come, not on the model."""
        return []

    def check(self, target: Target) -> None:
        obstacle = find_obstacle_to_blocks(target.model)
        if obstacle is not None:
            loaded_by = _compat.loaded_by(target.model, "by_token")
            raise UnsupportedModel(f"{type(target.model).__name__} cannot be fed in blocks: {obstacle}{loaded_by}")

    def apply(self, target: Target, handle: Handle) -> None:
        model = target.model
        specs = " + ".join(patch.spec for patch in target.patches if patch is not self)
        watch = WeightWatch(model)
        handle.on_undo(watch.close)
        hits, warnings = handle.record.hits, handle.record.warnings
        disk = None if self.disk is None else DiskTier(self.disk, self.disk_bytes, hits, warnings)
        prefixes = Prefixes(model, self.block, self.max_bytes, specs, hits, warnings, watch, disk)
        handle.on_undo(prefixes.clear)
        keep_prefixes(handle, prefixes)
        handle.set_attribute(model, _compat.PREFILL, functools.partial(prefill, model, prefixes))
        handle.record.changed("prefill methods")
        handle.record.note("bound", f"{self.max_bytes / 2**20:.4g} MiB")


def _bytes(name: str, value: Any) -> int:
    """A number of bytes, given as a whole number or with a unit."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    read = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KiB|MiB|GiB|TiB)", value) if isinstance(value, str) else None
    if read is None or not float(read[1]):
        raise ValueError(f"{name}={value!r}: give a whole number of bytes above 0, or text in {', '.join(_UNITS)} such as '2GiB'")
    return int(float(read[1]) * _UNITS[read[2]])
