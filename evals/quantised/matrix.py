"""One patch on one quantised model: what it refuses, what it computes, and whether it leaves anything behind."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from patchkit import available_patches, patch_model, unpatch_model
from patchkit.errors import PatchError
from patchkit.freshness import parts_of
from patchkit.testing import assert_restored, logit_error, snapshot

# Of each patch, options under which it acts on a tiny model; several where one shows what the other hides. Windows that hold the whole
# text have to give the text of the unpatched model.
SPECS: dict[str, tuple[str, ...]] = {
    "streaming": ("streaming(sinks=4, window=124)", "streaming(sinks=2, window=8)"),
    "linear": ("linear(window=8)",),
    "memory": ("memory(sinks=4, window=124)", "memory(sinks=2, window=8, slots=6, block=4)"),
    "speculative": ("speculative(k=3)",),
    "prefix_cache": ("prefix_cache(block=4)",),
    "compile": ("compile(backend=eager)",),
}
# What these compute is another function of the text than the unpatched model's.
LOSSY = ("linear", "window=8")


@dataclass(frozen=True)
class Outcome:
    """What became of a patch on a model.

    Attributes:
        refusal: the message of the PatchError that patching raised; None if it was patched.
        fault: an error of any other kind, or after patching, or what was left behind; None if there is none.
        same_text: whether greedy generation gives the tokens of the unpatched model.
        logit_error: largest difference of logits on the prompt, relative to the largest logit.
        report: what the patch says that it changed.
    """

    spec: str
    refusal: str | None = None
    fault: str | None = None
    same_text: bool | None = None
    logit_error: float | None = None
    report: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def specs() -> list[str]:
    """The specs of all registered patches."""
    return [spec for name, cls in available_patches().items() for spec in SPECS.get(name, (cls.example,))]


def is_lossy(spec: str) -> bool:
    """Whether a spec, by its meaning, changes the text of any model."""
    return any(part in spec for part in LOSSY)


@torch.no_grad()
def outcome(model: Any, spec: str, ids: torch.Tensor, new_tokens: int, keeps_state: bool = True) -> Outcome:
    """Patch ``model`` with ``spec``, generate after the prompt ``ids`` [1, T], and undo it.

    Args:
        keeps_state: whether the model may be asked for its `state_dict`; else its parameters, buffers and logits are compared.
    """
    logging.getLogger("patchkit").setLevel(logging.ERROR)
    options: dict[str, Any] = dict(max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    text, logits = model.generate(ids, **options), model(ids).logits
    before = snapshot(model) if keeps_state else _bits(model, ids)
    try:
        patch_model(model, spec, verbose=False)
    except PatchError as error:
        return Outcome(spec, refusal=f"{type(error).__name__}: {error}", fault=_left_behind(before, model, ids))
    except Exception as error:
        return Outcome(spec, fault=f"patch_model: {type(error).__name__}: {error}")
    try:
        now, again = model.generate(ids, **options), model(ids).logits
        described = str(model._patchkit.records[0].report())
    except Exception as error:
        return Outcome(spec, fault=f"after patch_model: {type(error).__name__}: {error}")
    unpatch_model(model)
    return Outcome(spec, None, _left_behind(before, model, ids), torch.equal(text, now), logit_error(again, logits), described)


def _bits(model: Any, ids: torch.Tensor) -> dict[str, bytes]:
    """The bytes of all parameters, buffers and logits."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | {"logits": model(ids).logits}
    parts = {f"{name} {place}": part for name, tensor in tensors.items() for place, part in enumerate(parts_of(tensor))}
    return {name: part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for name, part in parts.items()}


def _left_behind(before: Any, model: Any, ids: torch.Tensor) -> str | None:
    if isinstance(before, dict):
        now = _bits(model, ids)
        changed = [name for name in {*before, *now} if before.get(name) != now.get(name)]
        return f"undo: {', '.join(sorted(changed))}" if changed else None
    try:
        assert_restored(before, model)
    except AssertionError as error:
        return f"undo: {error}"
    return None
