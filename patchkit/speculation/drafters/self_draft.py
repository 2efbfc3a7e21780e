"""A patched view of the target drafts for the target itself: the same weights, run differently.

Sun et al. 2024, "TriForce" (https://arxiv.org/abs/2404.11912) and Chen et al. 2024, "MagicDec" (https://arxiv.org/abs/2408.11049)
draft with a window of the cache; Zhang et al. 2024, "Draft & Verify" (https://arxiv.org/abs/2309.08168) by leaving out layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import decoder_layers
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, PatchError
from patchkit.handle import refresh_patches
from patchkit.patch import Patch, available_patches
from patchkit.spec import resolve
from patchkit.speculation.drafter import Drafter, Session, State
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.views import twin


@dataclass(frozen=True)
class SelfDraft(Drafter, name="self_draft"):
    """The target, patched, drafts for the target as it is. Weights are shared; what patches add (int8 copies, a window) is not.

    In spec strings: `self_draft(streaming(window=252) + mlp_int8)`.

    Args:
        patches: patches or spec strings, such as "streaming(window=252) + mlp_int8".
        skip_layers: indices of decoder layers that the draft leaves out.
        sample: see `DraftModel`.

    Raises:
        ValueError: neither patches nor layers are given.
        SpecError: a spec string that does not read.
    """

    example = "self_draft(skip_layers=(1,))"

    patches: tuple[Patch | str, ...] | Patch | str = field(default=(), metadata={"objects": available_patches})
    skip_layers: tuple[int, ...] = ()
    sample: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "patches", tuple(resolve([self.patches])) if self.patches else ())
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        if not self.patches and not self.skip_layers:
            raise ValueError("SelfDraft() would draft with the target itself: give patches='streaming(window=252)' or skip_layers=(...)")

    def check(self, target: Target) -> None:
        view = twin(target.model).eval()  # a trainer has its model in training mode before it patches it
        if self.skip_layers:
            for layers, index in _layers(view, self.skip_layers):
                layers[index] = _Skipped(_extra_outputs(view, layers[index]))
        if self.patches:
            if target.patch is None:
                raise PatchError("SelfDraft needs to patch a view of the model: check it through patch_model, or give Target a `patch`")
            target.patch(view, list(self._patches))
        DraftModel(view).check(target)
        target.views[id(self)] = view

    def prepared(self, target: Target) -> Drafter:
        # What a window would drop need not be fed.
        context = next((patch.window for patch in self._patches if patch.name == "streaming"), None)  # type: ignore[attr-defined]
        weights = nn.ParameterList(target.model.parameters())  # a module: what a session refers to is else counted as its memory
        return View(target.views.pop(id(self)), sample=self.sample, context=context, weights=weights).prepared(target)

    def begin(self, model: Any, state: State) -> Session:
        raise NotImplementedError("SelfDraft drafts through what prepared(target) returns")

    def __str__(self) -> str:
        parts = [patch.spec for patch in self._patches]
        parts += [f"without layers {list(self.skip_layers)}"] if self.skip_layers else []
        return f"self_draft({' + '.join(parts)})"

    @property
    def _patches(self) -> tuple[Patch, ...]:
        return self.patches  # type: ignore[return-value]  # `__post_init__` has read them


@dataclass(frozen=True, eq=False)
class View(DraftModel):
    """A patched view of the target that drafts: its int8 copies and its adapters follow those of the target.

    Args:
        weights: the target's parameters when it was patched, which the view shares.
    """

    weights: nn.ParameterList = field(default_factory=nn.ParameterList, repr=False)

    def follow(self, model: Any, thorough: bool = False) -> Drafter:
        own = dict(self.model.named_modules())
        for name, module in model.named_modules():
            if name in own:
                _compat.follow_adapters(own[name], module)
        refresh_patches(self.model, thorough)
        return self

    def outdated(self, model: Any, adapters: bool) -> str | None:
        now = list(model.parameters())
        if len(now) == len(self.weights) and all(new is old for new, old in zip(now, self.weights, strict=True)):
            return None
        return (
            "the model was given other tensors as weights, and the patched view of it drafts over those that it had: "
            "unpatch_model(model), and patch it again"
        )


class _Skipped(nn.Module):
    """A decoder layer that is skipped: hidden states pass through, in a tuple with ``extra`` Nones where the layer gave a tuple."""

    def __init__(self, extra: int | None) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self.extra is None else (hidden_states, *[None] * self.extra)


def _extra_outputs(model: Any, layer: nn.Module) -> int | None:
    """Number of values that a layer returns after the hidden states; None if it returns those alone, not in a tuple."""
    outputs: list[Any] = []
    hook = layer.register_forward_hook(functools.partial(_note, outputs))
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        hook.remove()
    return len(outputs[0]) - 1 if isinstance(outputs[0], tuple) else None


def _note(outputs: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    outputs.append(output)


def _layers(model: Any, indices: tuple[int, ...]) -> Iterator[tuple[nn.ModuleList, int]]:
    """The list of decoder layers, with each of the indices.

    Raises:
        NothingMatched: there is no such list, or no such layer; or it is the first, by which transformers counts tokens.
    """
    layers = decoder_layers(model)
    for index in indices:
        if not 0 < index < len(layers):
            raise NothingMatched(f"skip_layers={list(indices)}: give indices from 1 to {len(layers) - 1}")
        yield layers, index
