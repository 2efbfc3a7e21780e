"""patchkit changes how a loaded Hugging Face causal language model runs: in one line, reversibly, with evidence.

    from patchkit import StreamingLLM, patch_model, unpatch_model

    patch_model(model, StreamingLLM(sinks=4, window=1020))
    unpatch_model(model)

Importing changes nothing and loads neither torch nor transformers: every name below is looked up when it is first used.
Patch classes need no entry here; those in `patchkit/patches/`, and your own, are found by their class name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchkit.anatomy.target import Target as Target
    from patchkit.api import from_pretrained as from_pretrained
    from patchkit.api import patch_model as patch_model
    from patchkit.api import patched as patched
    from patchkit.api import refresh as refresh
    from patchkit.api import report as report
    from patchkit.api import unpatch_model as unpatch_model
    from patchkit.api import with_patches as with_patches
    from patchkit.attention_function import attention_patch as attention_patch
    from patchkit.chat import system_tokens as system_tokens
    from patchkit.errors import GrammarError as GrammarError
    from patchkit.errors import IrreversiblePatch as IrreversiblePatch
    from patchkit.errors import KernelError as KernelError
    from patchkit.errors import NothingMatched as NothingMatched
    from patchkit.errors import PatchConflict as PatchConflict
    from patchkit.errors import PatchError as PatchError
    from patchkit.errors import RewardError as RewardError
    from patchkit.errors import SlowerPatch as SlowerPatch
    from patchkit.errors import SpecError as SpecError
    from patchkit.errors import StaleWeights as StaleWeights
    from patchkit.errors import StreamError as StreamError
    from patchkit.errors import UnsupportedModel as UnsupportedModel
    from patchkit.grammar.processor import Grammar as Grammar
    from patchkit.handle import Handle as Handle
    from patchkit.patch import Patch as Patch
    from patchkit.patch import Stage as Stage
    from patchkit.patch import available_patches as available_patches
    from patchkit.patch import register_patch as register_patch
    from patchkit.record import PatchReport as PatchReport
    from patchkit.record import Report as Report
    from patchkit.spec import parse_spec as parse_spec
    from patchkit.streaming.heavy_hitters import DynamicSinks as DynamicSinks
    from patchkit.streaming.reencode import Reencode as Reencode
    from patchkit.training.linearize import linearize as linearize

_HOMES = {
    "api": ("from_pretrained", "patch_model", "patched", "refresh", "report", "unpatch_model", "with_patches"),
    "attention_function": ("attention_patch",),
    "streaming.heavy_hitters": ("DynamicSinks",),
    "streaming.reencode": ("Reencode",),
    "chat": ("system_tokens",),
    "errors": (
        "GrammarError",
        "IrreversiblePatch",
        "KernelError",
        "NothingMatched",
        "PatchConflict",
        "PatchError",
        "RewardError",
        "SlowerPatch",
        "SpecError",
        "StaleWeights",
        "StreamError",
        "UnsupportedModel",
    ),
    "grammar.processor": ("Grammar",),
    "handle": ("Handle",),
    "training.linearize": ("linearize",),
    "patch": ("Patch", "Stage", "available_patches", "register_patch"),
    "spec": ("parse_spec",),
    "record": ("PatchReport", "Report"),
    "anatomy.target": ("Target",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("patchkit")
        except PackageNotFoundError:
            raise AttributeError("patchkit runs from a folder and has no version: install it with pip") from None
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"patchkit.{_HOME_OF[name]}"), name)
    # Only for class names, so that `from patchkit import testing` does not import every patch on its way to the submodule.
    classes = _patch_classes() if name[:1].isupper() else {}
    if name in classes:
        return classes[name]
    raise AttributeError(f"module 'patchkit' has no attribute {name!r}, available: {', '.join(sorted({*_HOME_OF, *classes}))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_patch_classes(), "__version__"})


def _patch_classes() -> dict[str, Any]:
    from patchkit.patch import available_patches

    return {cls.__name__: cls for cls in available_patches().values()}
