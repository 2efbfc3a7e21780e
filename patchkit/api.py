"""Patch a model, look at what was done, and undo it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from patchkit._compat.modules import is_compiled_copy
from patchkit.errors import IrreversiblePatch, NothingMatched, PatchConflict, PatchError, UnsupportedModel
from patchkit.handle import Handle
from patchkit.patch import Patch, available_patches
from patchkit.record import Report
from patchkit.spec import Given, resolve

# The instance attribute of a patched model that holds its root Handle.
_ATTRIBUTE = "_patchkit"

_logger = logging.getLogger("patchkit")

M = TypeVar("M")
F = TypeVar("F", bound=Callable[..., Any])


def patch_model(model: M, *patches: Given | Sequence[Given], lossless: bool = False, verbose: bool = True) -> M:
    """Patch a loaded causal language model in place, and log one line that says what was changed and what was left alone.

    Everything is checked before anything is touched; an exception half-way undoes what was done. Patches are applied in the
    order of their `Stage`, whatever the order of the arguments. Compiled code is forgotten, of all models in the process,
    because it would not notice the patches; a model that was compiled has to be compiled again.

    Args:
        model: a transformers decoder-only model with a language-modelling head, or such a model in PEFT's wrapper.
        patches: `Patch` objects, spec strings such as "streaming(window=1020) + mlp_int8", and files with such a string
            (`Path("tuned.spec")` or "@tuned.spec"), or lists of these. "none" is no patch.
        lossless: the patches make a view of the model that only drafts, and the model itself verifies: `generate` gives what the
            unpatched model gives, faster where drafts are cheap and often right. Weights are shared.
        verbose: log the line at level INFO of the logger "patchkit" (else DEBUG). Where the program has not configured
            logging, it goes to stderr.

    Returns:
        The same object.

    Raises:
        SpecError: no patch is given, or one that does not exist or does not read.
        PatchConflict: a patch is given twice, or the model is already patched.
        UnsupportedModel: the model is not a causal LM of transformers, or a patch cannot be exact or useful on it.
        NothingMatched: a patch found nothing to change.
        PatchError: the installed transformers or torch is not supported.
    """
    chosen = resolve(patches)
    return _patch(model, _drafting(chosen) if lossless and chosen else chosen, verbose)


def unpatch_model(model: M, *names: str) -> M:
    """Undo `patch_model`: no hook, attribute, weight or compiled code stays behind. Returns the same object.

    Args:
        names: the patches to take off, such as "compile"; the others are applied again, so they begin anew: caches that were made
            before are of no use, and counters start at 0. None names all.

    Raises:
        PatchConflict: patchkit has not patched this model, not with a patch of that name, or it is a shallow copy of a patched one.
        PatchError: one of the others cannot be applied again; the model is then unpatched.
        IrreversiblePatch: a patch has discarded what undoing needs, and the model stays patched; or an undo step failed, and all
            others ran.
    """
    handle = _handle_of(model)
    present = {record.patch.name: record.patch for record in handle.records if record.patch is not None}
    for name in names:
        if name not in present:
            raise PatchConflict(f"this model is not patched with {name!r}: name one of {', '.join(present) or 'none'}")
    handle.undo()
    kept: list[Any] = [patch for name, patch in present.items() if name not in names]
    if names and kept:
        _patch(model, kept, verbose=False)
    return model


@contextlib.contextmanager
def patched(model: M, *patches: Given | Sequence[Given], verbose: bool = True) -> Iterator[M]:
    """`patch_model` for the length of a with block. The model is unpatched at the end, also after an exception.

    Raises:
        IrreversiblePatch: a patch could not be undone at the end; the model is untouched.
    """
    for patch in resolve(patches):
        if patch.irreversible:
            raise IrreversiblePatch(f"{patch.spec} cannot be undone at the end of the block: use patch_model, or other options")
    patch_model(model, *patches, verbose=verbose)
    try:
        yield model
    finally:
        unpatch_model(model)


def with_patches(*patches: Given | Sequence[Given], verbose: bool = True) -> Callable[[F], F]:
    """Decorate a function that returns a model, or a tuple with exactly one model in it: what it returns is patched.

    Spec strings are read when the function is decorated, so a typo is found before a model is loaded.
    """
    chosen = resolve(patches)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def patched_function(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if isinstance(result, tuple):
                models = [item for item in result if _is_transformers_model(_unwrapped(item))]
                if len(models) != 1:
                    raise UnsupportedModel(
                        f"{function.__qualname__} returned a tuple with {len(models)} transformers models in it: "
                        "@with_patches needs exactly one. Call patch_model on the one that you mean."
                    )
                _patch(models[0], chosen, verbose)
            else:
                _patch(result, chosen, verbose)
            return result

        return patched_function  # type: ignore[return-value]

    return decorate


def from_pretrained(model: str | os.PathLike[str], *, patches: Given | Sequence[Given], verbose: bool = True, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(model, **kwargs)`, patched. Spec strings are read before anything is loaded.

    Args:
        model: a hub id or a directory.
        patches: as for `patch_model`.
        kwargs: passed on to transformers (dtype, device_map, ...).
    """
    chosen = resolve([patches])
    from transformers import AutoModelForCausalLM

    return _patch(AutoModelForCausalLM.from_pretrained(model, **kwargs), chosen, verbose)


def report(model: Any) -> Report:
    """What patchkit did to this model, with the run-time counters as they stand now.

    Raises:
        PatchConflict: patchkit has not patched this model.
    """
    return _report_of(_handle_of(model))


def _drafting(chosen: list[Patch]) -> list[Patch]:
    """The patch under which the model patched with ``chosen`` only drafts."""
    verifying = {name: patch for name, cls in available_patches().items() if (patch := cls.drafting(tuple(chosen))) is not None}
    for patch in chosen:
        if patch.name in verifying:
            raise PatchConflict(
                f"lossless=True verifies with {patch.name} already: leave {patch.name} out, its text is the model's own as it is"
            )
    return [next(iter(verifying.values()))]


def _patch(model: M, chosen: list[Patch], verbose: bool) -> M:
    base = _causal_lm(model)
    if _ATTRIBUTE in vars(base):
        present = " + ".join(patch.spec for patch in _report_of(vars(base)[_ATTRIBUTE]).patches)
        remedy = "load it again" if vars(base)[_ATTRIBUTE].final else "unpatch_model first"
        raise PatchConflict(f"this model is already patched with {present}: {remedy}, or give all patches in one call")
    # Imported here, so that `import patchkit` loads neither torch nor transformers.
    from patchkit import _compat
    from patchkit.anatomy.target import Target

    _compat.self_check()
    started = time.perf_counter()
    target = Target(base, tuple(chosen), functools.partial(_patch, verbose=False))
    for patch in chosen:
        patch.check(target)
    same_up_to = [patch.promises(target).same_up_to for patch in chosen]

    handle = Handle(base)
    try:
        compiled = _compat.CompiledCalls(base)
        handle.on_undo(compiled.restore)
        was_compiled = compiled.set_aside()
        handle.set_attribute(base, _ATTRIBUTE, handle)
        # transformers refuses to save what it calls quantised, which this is not.
        if _compat.is_unpacked_gguf(base):
            handle.on_undo(_compat.forget_quantizer(base))
        for patch, length in zip(chosen, same_up_to, strict=True):
            own = handle.for_patch(patch)
            own.record.same_up_to = length
            patch.apply(target, own)
            if own.record.changed_nothing:
                raise NothingMatched(f"{patch.spec} changed nothing in {type(base).__name__}: leave it out, or choose other options")
    except BaseException as error:
        try:
            handle.undo()
        except PatchError as failure:
            raise failure from error
        raise
    handle.commit()
    _announce(handle, time.perf_counter() - started, verbose, was_compiled)
    return model


def _causal_lm(model: Any) -> Any:
    """The transformers model itself, out of PEFT's wrapper if it is in one.

    Raises:
        UnsupportedModel: it is not a decoder-only model with a language-modelling head.
    """
    name = type(model).__name__
    base = _unwrapped(model)
    if isinstance(model, str):
        raise UnsupportedModel(f"{model!r} is a name, not a model: use patchkit.from_pretrained({model!r}, patches=...)")
    if is_compiled_copy(model):
        raise UnsupportedModel("this is the result of torch.compile: patch the model first, then compile it")
    if not _is_transformers_model(base):
        if _is_transformers_model(getattr(model, "module", None)):
            raise UnsupportedModel(f"{name} wraps a model: patch its .module, best before it is wrapped")
        raise UnsupportedModel(f"{name} is not a transformers model: load one with AutoModelForCausalLM.from_pretrained")
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder: patchkit patches decoder-only models, load one with AutoModelForCausalLM")
    if not base.can_generate() or base.get_output_embeddings() is None:
        raise UnsupportedModel(f"{name} has no language-modelling head: load the checkpoint with AutoModelForCausalLM")
    return base


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def _is_transformers_model(candidate: Any) -> bool:
    # Without transformers loaded, nothing can be one of its models.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(candidate, transformers.PreTrainedModel)


def _handle_of(model: Any) -> Handle:
    base = _unwrapped(model)
    handle = getattr(base, "__dict__", {}).get(_ATTRIBUTE)
    if not isinstance(handle, Handle):
        raise PatchConflict(f"this {type(model).__name__} is not patched by patchkit: patch_model it first")
    if handle.model is not base:
        raise PatchConflict("this is a shallow copy of a patched model and shares its hooks: use the original, or copy.deepcopy")
    return handle


def _report_of(handle: Handle) -> Report:
    return Report([record.report() for record in handle.records])


def _announce(handle: Handle, seconds: float, verbose: bool, was_compiled: bool) -> None:
    _prepare_logger()
    level, patches = logging.INFO if verbose else logging.DEBUG, _report_of(handle).patches
    for warning in [line for patch in patches for line in patch.warning_lines()]:
        _logger.log(level, "patchkit: %s", warning)
    _logger.log(level, "patchkit: %s  (%.2f s)", " | ".join(map(str, patches)) or "no patch", seconds)
    if was_compiled:
        _logger.warning("patchkit: the model was compiled before it was patched, and now runs uncompiled: call model.compile() again")


def _prepare_logger() -> None:
    """The program's logging decides, if it has any; else INFO goes to stderr. Never at import."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Console) for handler in _logger.handlers):
        _logger.addHandler(_Console())


class _Console(logging.Handler):
    """Prints to stderr, as it is at the time, as long as nobody has configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in _logger.handlers if handler is not self]
        if not others and not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)
