"""The option `draft` of `Speculative`: what a user may give, and the drafter that it names."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from patchkit.anatomy.target import Target
from patchkit.models import ModelUnavailable, load_model
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.drafters.chain import Chain
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.spelled import is_word, parse_object


def read_draft(draft: Any) -> Any:
    """``draft`` with every text that names a drafter, such as "eagle" or 'eagle("FILE")', as that drafter.

    Other text is the name or path of a model, and stays as it is; a list becomes a tuple.

    Raises:
        SpecError: text with options that does not read.
        TypeError: it is no drafter, model, name, path, or list of these.
    """
    if isinstance(draft, str):
        is_drafter = draft.rstrip().endswith(")") or draft.strip() in Drafter.available()
        return parse_object(draft, "draft", Drafter.available) if is_drafter else draft
    if isinstance(draft, list | tuple):
        return tuple(read_draft(each) for each in draft)
    if isinstance(draft, Drafter | nn.Module):
        return draft
    raise TypeError(f"draft={draft!r}: give a drafter, a loaded model, a name or path, or a list of these")


def drafter_of(draft: Any, target: Target) -> Drafter:
    """The drafter that ``draft``, as `read_draft` gives it, names; loads models that are given by name or path.

    Raises:
        ModelUnavailable: there is no model of this name.
    """
    if isinstance(draft, tuple):
        return Chain(tuple(drafter_of(each, target) for each in draft))
    if isinstance(draft, nn.Module):
        return DraftModel(draft)
    if isinstance(draft, str):
        model, tokenizer = _loaded(draft, target)
        return DraftModel(model, draft_tokenizer=tokenizer)
    drafter: Drafter = draft
    return drafter


def _loaded(name: str, target: Target) -> tuple[Any, Any]:
    try:
        model, tokenizer = load_model(name, target.model.dtype)
    except ModelUnavailable as error:
        nearest = difflib.get_close_matches(name, Drafter.available(), n=1, cutoff=0.5) if is_word(name) else []
        if not nearest:
            raise
        raise ModelUnavailable(f"{error}; or did you mean the drafter {nearest[0]!r}?") from error
    moved: Any = model
    return moved.to(target.model.device), tokenizer
