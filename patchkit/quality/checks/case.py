"""One set of patches on one model: its views, texts and tolerances, and how a promise is judged."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from patchkit import api
from patchkit.patch import Patch, Promises
from patchkit.quality.definitions import NoDefinition
from patchkit.quality.proof import Check, Proof
from patchkit.target import Target, twin
from patchkit.testing import TOLERANCES, logit_error, snapshot

Advance = Callable[[str], object]
# Tokens of a probe beyond those after which every patch acts.
BEYOND = 40
# Positions that are kept bounded begin anew after this many tokens at the latest; of a model with room for more than `LONG` tokens in
# what it keeps, no text is long enough to see that.
_WRAP = 1024
LONG = 2048
# What the unpatched model may differ from itself, times this, is allowed to a patched one.
OWN_NOISE = 3.0
# Share of the effect of rounding that two computations of the same rounded model may differ by.
OF_ROUNDING = 0.25
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


class NotJudged(Exception):
    """This cannot be decided here; the message says why."""


class Case:
    """One set of patches on one model, and what all checks of it share."""

    def __init__(self, proof: Proof, model: PreTrainedModel, patches: list[Patch], texts: list[torch.Tensor], advance: Advance) -> None:
        self.proof, self.model, self.patches, self.advance = proof, model, patches, advance
        self.spec = spec_of(patches) or "unpatched"
        self.plain: Any = twin(model)
        # Every call of generate is to be greedy, whatever the checkpoint says.
        self.pad = _pad(model)
        self.plain.generation_config = GenerationConfig(do_sample=False, pad_token_id=self.pad)
        fresh = self._twin()
        self.before = snapshot(fresh)
        self.full: Any = api.patch_model(fresh, *patches, verbose=False) if patches else fresh
        self.target = Target(self.plain)
        self.promises: dict[Patch, Promises] = {patch: patch.promises(self.target) for patch in patches}
        self._without: dict[tuple[str, ...], Any] = {}
        self.reach = max((promise.same_up_to for promise in self.promises.values()), default=0)
        self.tolerance = TOLERANCES[model.dtype]
        self.stream = torch.cat(texts)
        self.longest = self._longest()
        self.sound: dict[int, list[list[int]]] = {}
        self.batch: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def _twin(self) -> Any:
        return twin(self.plain)

    def _longest(self) -> int | None:
        """Tokens that the model can take at all; None without a limit."""
        if any(name.endswith("inv_freq") for name, _ in self.plain.named_buffers()):
            return None
        limits = (self.target.position_limit, getattr(self.target.config, "max_seq_len", None))
        return min((limit for limit in limits if limit is not None), default=None)

    def view(self, patches: Sequence[Patch]) -> Any:
        """The model with these patches only."""
        if not patches:
            return self.plain
        key = tuple(patch.spec for patch in patches)
        if key not in self._without:
            self._without[key] = api.patch_model(self._twin(), *patches, verbose=False)
        return self._without[key]

    def without(self, patch: Patch) -> Any:
        """The model with all patches but one."""
        return self.view([other for other in self.patches if other is not patch])

    @functools.cached_property
    def cycle(self) -> torch.Tensor:
        """Six tokens that are rare in the texts."""
        count = Counter(self.stream.tolist())
        vocabulary = self.plain.get_input_embeddings().weight.shape[0]
        rarest = sorted((token for token in range(min(vocabulary, 1000)) if token != self.pad), key=lambda token: count[token])
        return torch.tensor(rarest[:6], device=self.model.device)

    @property
    def wrap(self) -> int:
        """Tokens after which positions that are kept bounded begin anew, and buffers that grow have grown."""
        return min(self.target.position_limit or _WRAP, _WRAP)

    def text(self, length: int, number: int = 0) -> torch.Tensor:
        """Token ids [1, length] of the documents, from another place for every number."""
        if self.longest is not None:
            length = min(length, self.longest)
        start = number * 997 % len(self.stream)
        repeats = math.ceil((start + length) / len(self.stream))
        return self.stream.repeat(repeats)[start : start + length][None].to(self.model.device)

    def check(self, about: str, promise: str, run: Callable[[], Check | None]) -> None:
        """Add what ``run`` finds; what it raises is a broken promise, or a reason not to judge."""
        self.advance(f"{self.spec}: {promise}")
        try:
            found = run()
        except (NotJudged, NoDefinition) as reason:
            found = Check(self.spec, about, promise, "not judged", detail=str(reason))
        except Exception as error:
            found = Check(self.spec, about, promise, "broken", detail=f"{type(error).__name__}: {error}")
        if found is not None:
            self.proof.checks.append(found)

    def same(
        self,
        about: str,
        promise: str,
        pairs: Callable[[Any], Iterable[tuple[torch.Tensor, torch.Tensor]]],
        detail: str,
        own_noise: bool = True,
    ) -> None:
        """Check that the pairs of logits that the patched model gives are the same.

        Args:
            pairs: of a model, its pairs; called with the unpatched one too if the difference calls for it.
            own_noise: the unpatched model promises the same, so what it differs by itself says what rounding does here.
        """

        def run() -> Check:
            error, rms = self._largest(pairs(self.full))
            allowed, said = self.allowed, detail
            if error > allowed and own_noise:
                own, _ = self._largest(pairs(self.plain))
                if own > self.tolerance.differs:
                    raise NotJudged(f"the unpatched model differs by {own:.2g} itself ({detail})")
                if OWN_NOISE * own > allowed:
                    allowed, said = OWN_NOISE * own, f"{detail}; the unpatched model differs by {own:.2g} itself"
            kept = error <= allowed
            if not kept and rms <= OF_ROUNDING * self.rounding:
                kept, said = True, f"{said}; root mean square {rms:.2g}, and that of what rounding does is {self.rounding:.2g}"
            return Check(self.spec, about, promise, "kept" if kept else "broken", error, allowed, said)

        self.check(about, promise, run)

    def _largest(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
        """The largest difference of any pair of logits, and the largest root mean square of one.

        In 16 bits the first is the root mean square at the worst position: single logits are too noisy to tell anything.
        """
        measure = logit_error if self.model.dtype not in _SIXTEEN_BITS else _worst_position
        errors = [(measure(actual, expected), _rms(actual, expected)) for actual, expected in pairs]
        return max(error for error, _ in errors), max(rms for _, rms in errors)

    @functools.cached_property
    def allowed(self) -> float:
        """How large the first of `_largest` may be: in 16 bits, three times the difference from the same weights in float32."""
        if self.model.dtype not in _SIXTEEN_BITS:
            return self.tolerance.logits
        exact: Any = copy.deepcopy(self.plain).float()
        texts = [self.text(self.reach + BEYOND, number) for number in range(3)]
        return OWN_NOISE * max(_worst_position(self.plain(input_ids=ids).logits, exact(input_ids=ids).logits) for ids in texts)

    @functools.cached_property
    def rounding(self) -> float:
        """Root mean square of what the patches that round do to logits, alone; 0 without any."""
        rounding = [patch for patch, promise in self.promises.items() if promise.rounds]
        ids = self.text(64)
        return _rms(self.view(rounding)(input_ids=ids).logits, self.plain(input_ids=ids).logits) if rounding else 0.0


def _worst_position(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference of logits [B, T, V] (or of anything [..., V]) at the position where it is largest."""
    difference = (actual.float() - expected.float()).square().mean(-1).sqrt().max().item()
    return difference if math.isfinite(difference) else math.inf


def _rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.float() - expected.float()).square().mean().sqrt().item()


def _pad(model: PreTrainedModel) -> int:
    config = model.generation_config
    ids = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
    flat = [each[0] if isinstance(each, list) else each for each in ids if each is not None and each != []]
    return next(iter(flat), 0)


def spec_of(patches: Iterable[Patch]) -> str:
    return " + ".join(patch.spec for patch in patches)
