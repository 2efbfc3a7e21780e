"""The functions that patch a model, report on the patches, and undo them."""

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
from patchkit.handle import ATTRIBUTE as _ATTRIBUTE
from patchkit.handle import Handle
from patchkit.patch import Patch, available_patches
from patchkit.record import Report
from patchkit.spec import Given, resolve

_logger = logging.getLogger("patchkit")

M = TypeVar("M")
F = TypeVar("F", bound=Callable[..., Any])


def patch_model(model: M, *patches: Given | Sequence[Given], lossless: bool = False, verbose: bool = True) -> M:
    """Patch a loaded causal language model in place, and log one line with the changes and the parts that were left alone.

    All checks run before the first edit, and an exception undoes the edits made so far. Patches are applied in the order of their
    `Stage`, whatever the order of the arguments. Compiled code of all models in the process is dropped, because it would not notice the
    patches; a model that was compiled has to be compiled again.

    Args:
        model: a transformers decoder-only model with a language-modelling head, or such a model in PEFT's wrapper.
        patches: `Patch` objects, spec strings such as "streaming(window=1020) + mlp_int8", and files with such a string
            (`Path("tuned.spec")` or "@tuned.spec"), or lists of these. "none" is no patch.
        lossless: the patched model, as a view over the same weights, only drafts, and the unpatched model verifies (speculative
            decoding). `generate` returns the tokens of the unpatched model, sooner where drafts are cheap and often accepted.
        verbose: log the line at level INFO of the logger "patchkit" (otherwise DEBUG). Where the program has not configured
            logging, it goes to stderr.

    Returns:
        The same object.

    Raises:
        SpecError: no patch is given, or a spec string names no patch or cannot be read.
        PatchConflict: a patch is given twice, or the model is already patched.
        UnsupportedModel: the model is not a causal LM of transformers, or a patch cannot be exact or useful on it.
        NothingMatched: a patch found nothing to change.
        PatchError: the installed transformers or torch is not supported.
    """
    chosen = resolve(patches)
    return _patch(model, _drafting(chosen) if lossless and chosen else chosen, verbose)


def unpatch_model(model: M, *names: str) -> M:
    """Undo `patch_model`: remove every hook, attribute, weight and compiled code. Returns the same object.

    Args:
        names: the patches to remove, such as "compile"; no name removes all. The others are applied again: their counters start at 0,
            and caches made before cannot be used.

    Raises:
        PatchConflict: the model has no patch of that name, is not patched at all, or is a shallow copy of a patched model.
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
    """Patch a model within a ``with`` block, with the arguments of `patch_model`. The model is unpatched at the end, even on an exception.

    Raises:
        IrreversiblePatch: a patch could not be undone at the end; the model is not changed.
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
    """Decorate a function that returns a model, or a tuple with exactly one model in it, so that the model is patched.

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
    """Load a model by `AutoModelForCausalLM.from_pretrained(model, **kwargs)` and patch it. Spec strings are read before the loading.

    Args:
        model: a hub id or a directory.
        patches: a patch, spec string or file, or a list of these; see `patch_model`.
        verbose: log the changes at level INFO.
        kwargs: passed to transformers (dtype, device_map, ...).
    """
    chosen = resolve([patches])
    from transformers import AutoModelForCausalLM

    return _patch(AutoModelForCausalLM.from_pretrained(model, **kwargs), chosen, verbose)


def report(model: Any) -> Report:
    """Return the report of this model's patches, with the present run-time counters.

    Raises:
        PatchConflict: patchkit has not patched this model.
    """
    return _report_of(_handle_of(model))


def refresh(model: Any) -> bool:
    """Bring what the patches of ``model`` have derived from its weights up to date: int8 copies, drafts, measured acceptance.

    Seldom needed: `generate`, and a forward of a prompt, look for changed weights and do this by themselves. They cannot see an edit
    through ``.data``, or by a kernel of your own, that misses all 16 values that are compared of each weight; and a `torch.compile` of
    your own does not look. This function derives everything again, whether or not a change is seen.

    Returns:
        Whether anything was out of date.

    Raises:
        PatchConflict: patchkit has not patched this model.
        StaleWeights: a weight has changed in a way that its int8 copy cannot follow.
        StreamError: another thread generates with this model.
    """
    return _handle_of(model).refresh(thorough=True)


def _drafting(chosen: list[Patch]) -> list[Patch]:
    """Return the patch that verifies drafts of the model patched with ``chosen``."""
    verifying = {name: patch for name, cls in available_patches().items() if (patch := cls.drafting(tuple(chosen))) is not None}
    for patch in chosen:
        if patch.name in verifying:
            raise PatchConflict(f"lossless=True adds {patch.name} itself: leave {patch.name} or lossless out")
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

    loader = _compat.loader_of(base)
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
            if loader is not None and loader.rounds_activations:
                own.record.warn(
                    f"{loader.name} rounds activations too: a last bit may decide between two steps there, so that texts can part from "
                    "those of the unpatched model"
                )
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
    """Return the transformers model itself, without PEFT's wrapper.

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
    """Send level INFO to stderr where the program has not configured logging. Not called at import."""
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Console) for handler in _logger.handlers):
        _logger.addHandler(_Console())


class _Console(logging.Handler):
    """A log handler that prints to the current stderr until the program configures logging."""

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in _logger.handlers if handler is not self]
        if not others and not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)
