"""Whether the installed transformers and torch are what patchkit was written for."""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from patchkit._compat.declared import changed_names
from patchkit._compat.names import REMEDY, SUPPORTED, TESTED
from patchkit.errors import PatchError

_logger = logging.getLogger("patchkit")


def _installed() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def wrong_versions() -> list[str]:
    """Each installed library that is outside `SUPPORTED`, as "transformers 5.14.1, needs >=5.15"."""
    installed = _installed()
    return [
        f"{name} {installed[name]}, needs {wanted}"
        for name, wanted in SUPPORTED.items()
        if not SpecifierSet(wanted).contains(installed[name], prereleases=True)
    ]


def untested_versions() -> list[str]:
    """Each installed library that is newer than what the tests ran on, as "transformers 5.25.0 (tested up to 5.24)"."""
    installed = _installed()
    return [
        f"{name} {installed[name]} (tested up to {newest})"
        for name, newest in TESTED.items()
        if Version(installed[name]).release[:2] > Version(newest).release
    ]


@lru_cache(maxsize=1)
def self_check() -> None:
    """Run once, by the first `patch_model`: are these the transformers and the torch that patchkit was written for?

    Raises:
        PatchError: a version is too old, or a name is missing or has changed; the message names each of them.
    """
    wrong = wrong_versions()
    if wrong:
        raise PatchError(f"patchkit cannot run on {' and '.join(wrong)}. {REMEDY}")
    changed = changed_names()
    if changed:
        raise PatchError(
            f"transformers {transformers.__version__} and torch {torch.__version__} differ from what patchkit relies on: "
            f"{'; '.join(changed)}. {REMEDY}"
        )
    untested = untested_versions()
    if untested:
        _logger.warning(
            "patchkit: not tested on %s; every name that it relies on is there. `patchkit prove` checks a patch on your model",
            " and ".join(untested),
        )
