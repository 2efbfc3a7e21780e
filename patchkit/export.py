"""Export of a directory that loads patched wherever transformers loads models: `AutoModelForCausalLM`, `pipeline`, plain lm-eval.

It is a stock checkpoint with two additions: config.json names the patches, and a module of three lines that transformers imports with
`trust_remote_code=True`, and that hands over to `PatchkitForCausalLM`. Without it, the unpatched model loads: transformers has no
other way to run code of a checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.api import patch_model, patched, report
from patchkit.errors import PatchConflict, PatchError, SpecError
from patchkit.patch import Patch
from patchkit.spec import parse_spec

_MODULE = "modeling_patchkit"
_SOURCE = '''"""The patches of this checkpoint are in config.json under "patchkit"; they need `pip install patchkit`."""

from patchkit.export import PatchkitForCausalLM  # noqa: F401
'''


class ExportError(PatchError):
    """A patched model cannot be written as a directory; nothing is left there."""


class PatchkitForCausalLM:
    """Entry point of an exported directory for transformers: loads the model's own class and patches it. Never instantiated.

    Not a `PreTrainedModel`, because transformers would ask that for the class of its configuration, and this serves all classes.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: Any) -> None:
        """Do nothing: transformers calls this when a model is saved with its code, which never happens here."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any, **options: Any) -> Any:
        """Load the model of an exported directory, and patch it.

        Raises:
            PatchError: its patches are unknown here, or refuse the model as it was loaded (device, dtype).
        """
        config = copy.deepcopy(config)
        spec = config.patchkit
        # Without these fields, saving the model again writes a stock checkpoint.
        del config.patchkit, config.auto_map
        loaded = getattr(transformers, config.architectures[0]).from_pretrained(name, *args, config=config, **options)
        patch_model(loaded[0] if isinstance(loaded, tuple) else loaded, spec)
        return loaded


def export(model: PreTrainedModel, tokenizer: Any, patches: str | Sequence[Patch], directory: str | Path) -> Path:
    """Write an unpatched model so that it loads patched. Everything is checked before anything is written, and a failure leaves nothing.

    Args:
        model: saved in its present dtype; it is patched briefly, to check that it can be.
        tokenizer: saved next to the model; None for none.
        patches: a spec string, or `Patch` objects that a spec string can spell.
        directory: must not exist, or be empty.

    Returns:
        The directory.

    Raises:
        SpecError: an option is an object, such as a draft model in memory.
        PatchError: a patch refuses the model.
        ExportError: the directory is not empty, or cannot be written; or the weights are packed blocks of a GGUF file.
    """
    chosen = parse_spec(patches) if isinstance(patches, str) else list(patches)
    spec = " + ".join(patch.spec for patch in chosen)
    try:
        parse_spec(spec)
    except SpecError as error:
        raise SpecError(f"{spec} cannot be written into a file: an option is an object in memory. Give its name or path") from error
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ExportError(f"{directory} is {'not empty' if directory.is_dir() else 'a file'}: give a new directory")
    if not directory.absolute().parent.is_dir():
        raise ExportError(f"the folder {directory.absolute().parent} does not exist: create it, or export elsewhere")
    if (obstacle := _compat.packed_gguf(model)) is not None:
        raise ExportError(f"the model cannot be saved: {obstacle}")
    _check(model, chosen)
    partial = directory.absolute().parent / f".{directory.name}.{os.getpid()}"
    try:
        with contextlib.ExitStack() as stack:
            if _compat.is_unpacked_gguf(model):
                stack.callback(_compat.forget_quantizer(model))
            model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        config |= {"auto_map": {"AutoModelForCausalLM": f"{_MODULE}.{PatchkitForCausalLM.__name__}"}, "patchkit": spec}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise ExportError(f"{directory} cannot be written ({error.strerror or error}): give another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _check(model: PreTrainedModel, chosen: list[Patch]) -> None:
    try:
        report(model)
    except PatchConflict:
        pass
    else:
        raise PatchConflict("the model is patched: unpatch_model first, and give the patches to export")
    if not any(patch.irreversible for patch in chosen):
        with patched(model, *chosen, verbose=False):
            return
    target = Target(model, tuple(chosen))
    for patch in chosen:
        patch.check(target)
