"""The checks of one set of patches: each promise beside the model without that patch, and what every patched model has to keep.

How much two computations may differ is a row of `patchkit.testing.TOLERANCES`, in 16 bits three times what the unpatched model differs
from its own weights in float32; or three times what the unpatched model differs from itself in the same test, where that is more; and for
patches that round, a quarter of what rounding does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from patchkit import _compat, api
from patchkit.errors import PatchError
from patchkit.patch import Patch, Promises
from patchkit.quality.definitions import NoDefinition
from patchkit.quality.latency import cache_bytes, prefilled_cache
from patchkit.quality.proof import Check, Proof
from patchkit.target import Target, twin
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot

Advance = Callable[[str], object]
# Tokens of a probe beyond those after which every patch acts.
_BEYOND = 40
# Positions that are kept bounded begin anew after this many tokens at the latest; of a model with room for more than `_LONG` tokens in
# what it keeps, no text is long enough to see that.
_WRAP = 1024
_LONG = 2048
# More tokens than any cache keeps on record for taking back.
_RECORDED = 300
# Above this many, a text is fed one by one only where something begins or wraps around.
_ONE_BY_ONE = 160
# A definition runs each query as a text of its own; more tokens than this in all are too many.
_DEFINED_TOKENS = 1 << 16
# What the unpatched model may differ from itself, times this, is allowed to a patched one.
_OWN_NOISE = 3.0
# Share of the effect of rounding that two computations of the same rounded model may differ by.
_OF_ROUNDING = 0.25
NEW_TOKENS = 32
# A processor, with which patches that judge tokens do it another way.
_PENALTY: dict[str, Any] = {"repetition_penalty": 1.3}
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_WAYS = "whole, in chunks, and one by one"


class NotJudged(Exception):
    """This cannot be decided here; the message says why."""


class Case:
    """One set of patches on one model, and the checks of all that it promises."""

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
        self._sound: dict[int, list[list[int]]] = {}

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

    # -- judging -----------------------------------------------------------------------------------------------------------

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
                if _OWN_NOISE * own > allowed:
                    allowed, said = _OWN_NOISE * own, f"{detail}; the unpatched model differs by {own:.2g} itself"
            kept = error <= allowed
            if not kept and rms <= _OF_ROUNDING * self.rounding:
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
        texts = [self.text(self.reach + _BEYOND, number) for number in range(3)]
        return _OWN_NOISE * max(_worst_position(self.plain(input_ids=ids).logits, exact(input_ids=ids).logits) for ids in texts)

    @functools.cached_property
    def rounding(self) -> float:
        """Root mean square of what the patches that round do to logits, alone; 0 without any."""
        rounding = [patch for patch, promise in self.promises.items() if promise.rounds]
        ids = self.text(64)
        return _rms(self.view(rounding)(input_ids=ids).logits, self.plain(input_ids=ids).logits) if rounding else 0.0

    # -- everything --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """All checks of this set of patches."""
        first = self._first()
        for patch, promise in self.promises.items():
            self._of_one(patch, promise)
        if not self.patches:
            self._same_logits("all", self._twin())
            self._same_tokens("all", self._twin())
        self._causal()
        if self.patches:
            self._feeding()
            self._rows()
            self._taken_back()
            self._greedy()
            self._ends()
            self._bounded()
            self._interleaved()
        if first is not None:
            self._not_mixed(first)
        if self.patches:
            self._acted()
            self._restored()

    def _first(self) -> torch.Tensor | None:
        """Logits of the first text that the patched model ever sees; None if it cannot run, which is a broken promise."""
        found: list[torch.Tensor] = []

        def run() -> None:
            found.append(self.full(input_ids=self.text(self.reach + _BEYOND, 1)).logits)

        self.check("all", "the patched model runs", run)
        return found[0] if found else None

    def _of_one(self, patch: Patch, promise: Promises) -> None:
        if promise.same_logits:
            self._same_logits(patch.spec, self.without(patch))
        if promise.same_tokens:
            self._same_tokens(patch.spec, self.without(patch))
        if promise.same_up_to:
            fits = self.text(promise.same_up_to)
            self.same(
                patch.spec,
                "short texts are unpatched",
                lambda _: ((_fed(self.full, fits, way), _fed(self.without(patch), fits, way)) for way in self._ways(fits.shape[1])),
                f"{fits.shape[1]} tokens, {_WAYS}, with the patch and without",
                own_noise=False,
            )
        if promise.definition is not None:
            self._defined(patch, promise)
        if promise.rounds:
            self._no_overflow(patch)

    def _same_logits(self, about: str, other: Any) -> None:
        ids = self.text(self.reach + _BEYOND)
        self.same(
            about,
            "logits stay the same",
            lambda _: ((_fed(self.full, ids, way), _fed(other, ids, way)) for way in self._ways(ids.shape[1])),
            f"{ids.shape[1]} tokens, {_WAYS}, with the patch and without",
            own_noise=False,
        )

    def _defined(self, patch: Patch, promise: Promises) -> None:
        length = promise.same_up_to + _BEYOND
        if promise.same_up_to * _BEYOND > _DEFINED_TOKENS:
            length = promise.same_up_to + max(4, _DEFINED_TOKENS // promise.same_up_to)
        ids = self.text(length)
        expected: list[torch.Tensor] = []

        def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            facts = next(each for each in api.report(self.full).patches if each.name == patch.name)
            if not expected:
                assert promise.definition is not None
                expected.append(promise.definition(self.without(patch), ids, facts))
            return ((_fed(view, ids, way), expected[0]) for way in self._ways(ids.shape[1]))

        detail = f"{ids.shape[1]} tokens, {_WAYS}, and worked out by definition"
        self.same(patch.spec, "logits are those of the definition", pairs, detail, own_noise=False)

    # -- how tokens are fed ------------------------------------------------------------------------------------------------

    def _ways(self, length: int) -> list[list[int]]:
        """Numbers of tokens per forward: as a whole without a cache (no numbers) and with one, in chunks, and one by one.

        Some recurrent models start anew with every chunk: left out are ways in which the unpatched model does not agree with itself.
        """
        if length not in self._sound:
            if length <= _ONE_BY_ONE:
                chunks, singles = [1, 2, 7, 1, 13], [1]
            else:
                edge = max(1, min(self.reach - 6, length - 12))
                chunks = [1, 2, 97, 1, 61]
                singles = [edge, *[1] * 12, *([length - edge - 24] if length > edge + 24 else []), *[1] * length]
            ways = [[length], _cut(chunks, length), _cut(singles, length)]
            ids = self.text(length)
            whole = _fed(self.plain, ids, [])
            sound = [way for way in ways if logit_error(_fed(self.plain, ids, way), whole) <= self.tolerance.differs]
            self._sound[length] = [[], *sound]
        return self._sound[length]

    def _feeding(self) -> None:
        if not all(promise.any_feeding for promise in self.promises.values()):
            return
        lengths = [self.reach + _BEYOND]
        if self.longest is None and max(self.reach, self.wrap) <= _LONG:
            lengths.append(2 * max(self.reach, self.wrap) + 8)
        for ids in (self.text(length) for length in lengths):

            def pairs(view: Any, ids: torch.Tensor = ids) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
                ways = self._ways(ids.shape[1])[1:]
                if not ways:
                    raise NotJudged("the unpatched model gives other logits for other ways")
                whole = _fed(view, ids, [])
                return ((_fed(view, ids, way), whole) for way in ways)

            self.same("all", "any way of feeding is the same", pairs, f"{ids.shape[1]} tokens, {_WAYS}")

    def _causal(self) -> None:
        ids = self.text(self.reach + _BEYOND)
        length = ids.shape[1]
        cuts = sorted({1, length // 3, length - 8, length - 1} & set(range(1, length)))

        def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            for way in ([], [length], _cut([17, 5], length)):
                plain = _fed(view, ids, way)
                for cut in cuts:
                    changed = ids.clone()
                    changed[:, cut:] = ids.flip(1)[:, : length - cut]
                    changed[:, cut] = ids[:, cut - 1] if ids[0, cut - 1] != ids[0, cut] else ids[:, 0]
                    yield _fed(view, changed, way)[:, :cut], plain[:, :cut]

        self.same("all", "no token sees a later one", pairs, f"{length} tokens, those from {_listed(cuts)} on exchanged")

    def _rows(self) -> None:
        length = self.text(self.reach + _BEYOND).shape[1]
        pads = [pad for pad in (0, 3, 11) if pad < length]
        texts = [self.text(length - pad, number) for number, pad in enumerate(pads)]

        def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            batch, mask = _padded(texts, length)
            for way in ([], _cut([13, 1, 1, 5], length) if length <= _ONE_BY_ONE else _cut([self.reach, 1, 1, 1, length], length)):
                try:
                    logits = _fed(view, batch, way, mask)
                except PatchError as refusal:
                    raise NotJudged(f"refused: {refusal}") from refusal
                for row, (pad, text) in enumerate(zip(pads, texts, strict=True)):
                    yield logits[row : row + 1, pad:], _fed(view, text, [])

        self.same("all", "a padded row is the row alone", pairs, f"rows of {length} tokens, {_listed(pads)} of them padding on the left")

    # -- what must leave no trace ------------------------------------------------------------------------------------------

    def _not_mixed(self, first: torch.Tensor) -> None:
        """``first``: what the patched model gave for its first text ever; the same text comes again after all others."""
        ids = self.text(self.reach + _BEYOND, 1)

        def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            yield self.full(input_ids=ids).logits, first
            cache = self._used_cache()
            if cache is not None:
                cache.reset()
                yield _fed(self.full, ids, self._ways(ids.shape[1])[-1], cache=cache), first

        self.same("all", "a text after others is as in a fresh model", pairs, "also with a cache that was reset", own_noise=False)

    def _used_cache(self) -> Any:
        """A cache of the patches' own that has seen padding, a recorded past, and positions that began anew; None if they have none."""
        length = max(self.reach, self.wrap) + 5 if self.longest is None and self.reach <= _LONG else self.reach + 9
        ids = self.text(length, 2)
        mask = (torch.arange(ids.shape[1], device=ids.device)[None] >= min(3, ids.shape[1] - 1)).long()
        end = max(1, ids.shape[1] - 3)
        try:
            cache = _compat.cache_of(self.full(input_ids=ids[:, :end], attention_mask=mask[:, :end], use_cache=True))
        except PatchError:  # padding is refused
            mask = torch.ones_like(mask)
            cache = _compat.cache_of(self.full(input_ids=ids[:, :end], use_cache=True))
        if not (hasattr(cache, "reset") and type(cache).__module__.startswith("patchkit.")):
            return None
        if all(getattr(layer, "is_croppable", False) for layer in cache.layers):
            cache.activate_past_recording()
        for stop in range(end + 1, ids.shape[1] + 1):
            self.full(input_ids=ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], use_cache=True, **{_compat.CACHE: cache})
        return cache

    def _interleaved(self) -> None:
        texts = [self.text(self.reach + _BEYOND, number) for number in (1, 3)]
        half = texts[0].shape[1] // 2

        def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            whole = [_fed(view, text, []) for text in texts]
            begun = [view(input_ids=text[:, :half], use_cache=True) for text in texts]
            caches = [_cache_of(out) for out in begun]
            outputs = [[out.logits] for out in begun]
            for start in range(half, texts[0].shape[1]):
                for text, cache, parts in zip(texts, caches, outputs, strict=True):
                    parts.append(view(input_ids=text[:, start : start + 1], use_cache=True, **{_compat.CACHE: cache}).logits)
            yield from ((torch.cat(parts, 1), expected) for parts, expected in zip(outputs, whole, strict=True))

        self.same("all", "two texts in turns do not mix", pairs, "two caches, token by token in turns")

    def _taken_back(self) -> None:
        length = self.text(self.reach + _BEYOND).shape[1]
        # Tokens fed before the past is recorded, and before the draft.
        places = [(kept, kept) for kept in sorted({3, max(3, self.reach - 2), max(3, length - 20)})]
        if self.longest is None and self.reach <= _LONG:
            places.append((self.reach + 3, max(self.reach + _RECORDED, self.wrap - 2)))
        ids, other = self.text(max(length, places[-1][1] + 8)), self.text(length, 2)

        def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            whole = _fed(view, ids, [])
            for (begun, kept), draft in itertools.product(places, ([5], [1, 1, 1])):
                cache = _cache_of(view(input_ids=ids[:, :begun], use_cache=True))
                if not all(getattr(layer, "is_croppable", False) for layer in getattr(cache, "layers", [None])):
                    raise NotJudged(f"its {type(cache).__name__} cannot take tokens back")
                cache.activate_past_recording()
                if begun < kept:
                    _fed(view, ids[:, begun:kept], [kept - begun], cache=cache)
                count = sum(draft)
                _fed(view, other[:, :count], draft, cache=cache)
                cache.crop(-count)
                rest = ids[:, kept : kept + 8]
                yield _fed(view, rest, _cut([1, 3], rest.shape[1]), cache=cache), whole[:, kept : kept + rest.shape[1]]

        after = _listed(kept for _, kept in places)
        self.same("all", "tokens taken back leave no trace", pairs, f"after {after} tokens, 5 at once or 3 one by one")

    def _restored(self) -> None:
        def run() -> Check:
            promise = "nothing is left when removed"
            if any(patch.irreversible for patch in self.patches):
                raise NotJudged("these options say that they cannot be undone")
            api.unpatch_model(self.full)
            try:
                assert_restored(self.before, self.full)
            except AssertionError as found:
                return Check(self.spec, "all", promise, "broken", detail=str(found))
            finally:
                api.patch_model(self.full, *self.patches, verbose=False)
            return Check(self.spec, "all", promise, "kept", detail="modules, hooks, attributes, weights and logits, bit by bit")

        self.check("all", "nothing is left when removed", run)

    def _acted(self) -> None:
        for patch, facts in zip(sorted(self.patches, key=lambda patch: patch.stage), api.report(self.full).patches, strict=True):

            def run(patch: Patch = patch, hits: dict[str, int] = facts.hits) -> Check:
                counted = sum(hits.get(name, 0) for name in patch.acts) if patch.acts else sum(hits.values())
                said = ", ".join(f"{name} {count}" for name, count in hits.items()) or "no counters moved"
                return Check(self.spec, patch.spec, "it acted", "kept" if counted else "broken", detail=said)

            self.check(patch.spec, "it acted", run)

    def _bounded(self) -> None:
        promised = [promise for promise in self.promises.values() if promise.bounded]
        if not promised:
            return

        def run() -> Check:
            settled = max(promise.same_up_to for promise in promised) + 8
            sizes = []
            cache = None
            for _ in range(3):
                cache = prefilled_cache(self.full, settled, chunk=settled, cache=cache)
                cache = prefilled_cache(self.full, 3, chunk=1, cache=cache)
                sizes.append(cache_bytes(cache))
            tokens = [(number + 1) * (settled + 3) for number in range(3)]
            detail = f"cache of {_listed(sizes)} bytes after {_listed(tokens)} tokens"
            return Check(self.spec, "all", "memory is bounded", "kept" if sizes[1] == sizes[2] else "broken", detail=detail)

        if self.longest is None or 3 * self.reach + 40 <= self.longest:
            self.check("all", "memory is bounded", run)

    # -- generate ----------------------------------------------------------------------------------------------------------

    def prompts(self) -> list[torch.Tensor]:
        """Texts to continue; a part of each comes twice, so that there is something to copy."""
        length = 24 if self.longest is None else max(1, min(24, self.longest - NEW_TOKENS))
        texts = [self.text(length, number) for number in range(3)]
        return [torch.cat([text, text[:, : length // 2]], 1) for text in texts[:2]] + texts[2:]

    @functools.cached_property
    def _batch(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The prompts as a padded batch, and its mask; None where the patches refuse padding or the unpatched model counts it."""
        batch, mask = _padded(self.prompts(), max(prompt.shape[1] for prompt in self.prompts()))
        try:
            _fed(self.full, batch, [batch.shape[1] - 1, 1], mask)
        except PatchError:
            return None
        for way in ([], [batch.shape[1] - 1, 1]):
            for row, text in zip(_fed(self.plain, batch, way, mask), self.prompts(), strict=True):
                if logit_error(row[None, -text.shape[1] :], _fed(self.plain, text, [])) > self.tolerance.differs:
                    return None
        return batch, mask

    def generated(
        self, view: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, eos: int | list[int] | None = None, **options: Any
    ) -> Any:
        mask = torch.ones_like(ids) if mask is None else mask
        out: Any = view.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=eos, **options)
        return out

    def _same_tokens(self, about: str, other: Any) -> None:
        promise = "greedy text stays the same"

        def run() -> Check:
            ties = compared = 0
            longest = max(prompt.shape[1] for prompt in self.prompts())
            batch, mask = _padded(self.prompts(), longest)
            plain = [self.generated(other, prompt) for prompt in self.prompts()]
            calls: list[tuple[str, torch.Tensor, torch.Tensor | None, int | None, dict[str, Any]]] = []
            for prompt, text in zip(self.prompts(), plain, strict=True):
                new = text[0, prompt.shape[1] :].tolist()
                # A token that comes late for the first time: the text has to end there.
                end = max(new, key=new.index)
                calls += [("a text", prompt, None, None, {}), ("a text that ends", prompt, None, end, {})]
            calls += [("a padded batch", batch, mask, None, {}), ("a padded batch with an end", batch, mask, end, {})]
            calls += [("a text without repetitions", self.prompts()[0], None, None, _PENALTY)]
            for what, ids, rows, eos, options in calls:
                expected, actual = (self.generated(view, ids, rows, eos, **options) for view in (other, self.full))
                compared += expected.numel() - ids.numel()
                for row in range(len(ids)):
                    pads = 0 if rows is None else int((rows[row] == 0).sum())
                    wrong = self._parting(other, expected[row, pads:], actual[row, pads:], ids.shape[1] - pads, eos, options)
                    if isinstance(wrong, str):
                        return Check(self.spec, about, promise, "broken", detail=f"{what}: {wrong}")
                    ties += wrong
            # One row repeats itself, and its drafts stand; the other, which is padded, keeps its own pace.
            own = self.prompts()[-1]
            batch, mask = _padded([self.cycle.repeat(longest)[None, :longest], own], longest)
            with _going_round(self.cycle, other, self.full):
                asked = {"return_dict_in_generate": True, "output_logits": True}
                expected, actual = (self.generated(view, batch, mask, **asked) for view in (other, self.full))
            compared += expected.sequences.numel() - batch.numel()
            for row in range(len(batch)):
                # Where tokens have parted at a near tie the texts are two.
                alike = _first_difference(expected.sequences[row], actual.sequences[row]) or expected.sequences.shape[1] - 1
                for left, right in itertools.islice(zip(actual.logits, expected.logits, strict=False), alike - longest + 1):
                    error = logit_error(left[row], right[row])
                    if error > self.tolerance.differs:
                        return Check(
                            self.spec, about, promise, "broken", error, detail="logits of rows that accept more drafts than others"
                        )
            detail = f"{compared} tokens: texts alone and in a padded batch, with an end and without"
            if ties:
                detail += f"; {ties} texts part where two logits are closer than rounding in {self.proof.dtype}"
            return Check(self.spec, about, promise, "kept", detail=detail)

        self.check(about, promise, run)

    def _parting(
        self, view: Any, expected: torch.Tensor, actual: torch.Tensor, prompt: int, eos: int | None, options: dict[str, Any]
    ) -> str | bool:
        """Whether a text parts from the expected one at a near tie; in words what is wrong if it parts elsewhere.

        After that the texts are two, and each further token has to be the likeliest or nearly so after its own text.
        """
        first = _first_difference(expected, actual)
        if first is None:
            return False
        ends = [
            text[prompt:].tolist().index(eos) + prompt + 1 if eos in text[prompt:].tolist() else len(text) for text in (expected, actual)
        ]
        if first >= ends[0] or first >= ends[1]:
            return f"one ends after {ends[1] - prompt} new tokens, the other after {ends[0] - prompt}"
        logits = view(input_ids=actual[None, : ends[1]]).logits[0, first - 1 : -1].float()
        if options:
            penalty = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
            logits = torch.cat([penalty(actual[None, : first + i], row[None].clone()) for i, row in enumerate(logits)])
        noise = 2 * self.tolerance.logits * max(1.0, logits.abs().max().item() / 10)
        best = logits.max(1).values
        gaps = best - logits.gather(1, actual[first : ends[1], None])[:, 0]
        gaps[0] = torch.maximum(gaps[0], best[0] - logits[0, expected[first]])
        if bool((gaps > noise).any()):
            return f"new token {first - prompt} differs, and a logit is {gaps.max().item():.3g} below the best"
        return True

    def _greedy(self) -> None:
        if not all(promise.greedy for promise in self.promises.values()):
            return
        promise = "generate says what forwards say"

        def run() -> Check:
            worst, allowed = 0.0, 0.0
            for ids, mask in [*((prompt, None) for prompt in self.prompts()), *([self._batch] if self._batch else [])]:
                for row, text in enumerate(self.generated(self.full, ids, mask)):
                    pads = 0 if mask is None else int((mask[row] == 0).sum())
                    text = text[None, pads:]
                    logits = self.full(input_ids=text).logits[0, ids.shape[1] - pads - 1 : -1].float()
                    said = logits.gather(1, text[0, ids.shape[1] - pads :, None])[:, 0]
                    below = (logits.max(1).values - said).max().item()
                    worst = max(worst, below if math.isfinite(below) else math.inf)
                    own = 0.0
                    if worst > allowed:
                        own, _ = self._largest([(_fed(self.plain, text, [1] * text.shape[1]), _fed(self.plain, text, []))])
                    scale = max(1.0, logits.abs().max().item() / 10)
                    allowed = max(allowed, 2 * scale * max(self.tolerance.logits, _OWN_NOISE * own, 4 * _OF_ROUNDING * self.rounding))
            detail = f"every new token, in a padded batch too, is the likeliest of one forward over the text, or {worst:.2g} below it"
            return Check(self.spec, "all", promise, "kept" if worst <= allowed else "broken", worst, allowed, detail)

        self.check("all", promise, run)

    def _ends(self) -> None:
        promise = "a text ends where it has to"

        def run() -> Check:
            batch, mask = self._batch or (self.prompts()[0], None)
            ended = compared = 0
            for options in (dict[str, Any](), _PENALTY):
                free = self.generated(self.full, batch, mask, **options)[:, batch.shape[1] :].tolist()
                if any(len(new) != NEW_TOKENS for new in free):
                    return Check(self.spec, "all", promise, "broken", detail=f"{len(free[0])} new tokens instead of {NEW_TOKENS}")
                end = max(free[0], key=free[0].index)
                never = next(token for token in itertools.count() if token not in {*itertools.chain(*free), self.pad})
                for new in self.generated(self.full, batch, mask, [never, end], **options)[:, batch.shape[1] :].tolist():
                    count = new.index(end) + 1 if end in new else NEW_TOKENS
                    ended, compared = ended + (end in new), compared + 1
                    if any(token != self.pad for token in new[count:]) or len(new[:count]) < count:
                        said = f"{len(new)} new tokens, where the end comes as number {count}" if end in new else f"{len(new)} new tokens"
                        return Check(self.spec, "all", promise, "broken", detail=f"{said} ({options or 'greedy'})")
            # Here the end comes in the middle of what a patch may draft and accept at once.
            prompt, end = self.cycle.repeat(3)[None], int(self.cycle[-2])
            with _going_round(self.cycle, self.full):
                new = self.generated(self.full, prompt, None, end)[0, prompt.shape[1] :].tolist()
            ended, compared = ended + (end in new), compared + 1
            if end in new[:-1]:
                return Check(self.spec, "all", promise, "broken", detail=f"{len(new)} new tokens, the end is number {new.index(end) + 1}")
            if not ended:
                raise NotJudged("no text came to its end token")
            return Check(self.spec, "all", promise, "kept", detail=f"{ended} of {compared} texts came to an end token")

        self.check("all", promise, run)

    # -- rounding ----------------------------------------------------------------------------------------------------------

    def _no_overflow(self, patch: Patch) -> None:
        promise = "no overflow in 16 bits"

        def run() -> Check:
            facts = next(each for each in api.report(self.full).patches if each.name == patch.name)
            inputs: dict[str, tuple[Any, ...]] = {}
            hooks = [
                self.plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args) and None)
                for name in facts.modules
            ]
            try:
                self.plain(input_ids=self.text(32))
            finally:
                for hook in hooks:
                    hook.remove()
            worst = (math.inf, "")
            for name, args in inputs.items():
                decibels = _loud_snr(self.plain.get_submodule(name), self.full.get_submodule(name), args)
                beside = decibels - (facts.modules[name]["snr_db"] or 0)
                # Loudness changes the ratio of what is not linear (fused experts), so that only has to be finite.
                if getattr(self.plain.get_submodule(name), "weight", None) is None and math.isfinite(decibels):
                    beside = 0.0
                worst = min(worst, (beside, name))
            if not inputs:
                raise NotJudged("none of its modules ran")
            detail = f"{len(inputs)} modules on loud inputs in float16; {worst[1]} is {worst[0]:+.1f} dB beside what was reported"
            return Check(self.spec, patch.spec, promise, "kept" if worst[0] > -10 else "broken", detail=detail)

        self.check(patch.spec, promise, run)


@contextlib.contextmanager
def _going_round(cycle: torch.Tensor, *views: Any) -> Iterator[None]:
    """Make the successor in ``cycle`` [n] of each of its tokens the likeliest, so that a text which holds them repeats itself."""

    def prefer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        logits = output.logits.clone()
        for token, successor in zip(cycle, cycle.roll(-1), strict=True):
            logits[..., successor] += 1000.0 * (ids[:, -logits.shape[1] :] == token)
        output.logits = logits

    hooks = [view.register_forward_hook(prefer, with_kwargs=True) for view in views]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pad(model: PreTrainedModel) -> int:
    config = model.generation_config
    ids = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
    flat = [each[0] if isinstance(each, list) else each for each in ids if each is not None and each != []]
    return next(iter(flat), 0)


def _cut(sizes: Sequence[int], length: int) -> list[int]:
    """These sizes, over and over, up to ``length`` in all."""
    found: list[int] = []
    for size in itertools.cycle(sizes):
        if length == 0:
            return found
        found.append(min(size, length))
        length -= found[-1]
    return found


def _cache_of(out: Any) -> Any:
    cache = _compat.cache_of(out)
    if cache is None:
        raise NotJudged("the model returns no cache")
    return cache


def _fed(view: Any, ids: torch.Tensor, way: Sequence[int], mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T] fed in forwards of these many tokens; as a whole without a cache for none."""
    if not way:
        return view(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits, end = [], 0
    for size in way:
        start, end = end, end + size
        seen = None if mask is None else mask[:, :end]
        out = view(input_ids=ids[:, start:end], attention_mask=seen, use_cache=True, **{_compat.CACHE: cache})
        cache = _cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def _padded(texts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch [B, length] of texts [1, T], padded on the left with tokens that must not count, and its mask."""
    rows = [torch.cat([text[:, :1].expand(-1, length - text.shape[1]), text], 1) for text in texts]
    mask = [torch.arange(length, device=text.device)[None] >= length - text.shape[1] for text in texts]
    return torch.cat(rows), torch.cat(mask).long()


def _worst_position(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference of logits [B, T, V] (or of anything [..., V]) at the position where it is largest."""
    difference = (actual.float() - expected.float()).square().mean(-1).sqrt().max().item()
    return difference if math.isfinite(difference) else math.inf


def _rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.float() - expected.float()).square().mean().sqrt().item()


def _first_difference(expected: torch.Tensor, actual: torch.Tensor) -> int | None:
    shortest = min(len(expected), len(actual))
    wrong = (expected[:shortest] != actual[:shortest]).nonzero()
    if len(wrong):
        return int(wrong[0])
    return None if len(expected) == len(actual) else shortest


def _loud_snr(original: nn.Module, patched: nn.Module, args: tuple[Any, ...]) -> float:
    """Signal-to-noise ratio in dB of a patched module in float16, on inputs as loud as the original in float16 can take."""
    exact, plain, half = copy.deepcopy(original).float(), copy.deepcopy(original).half(), copy.deepcopy(patched).to(torch.float16)
    loudest = None
    for exponent in range(16):
        loud = (args[0].float() * 2.0**exponent).half(), *args[1:]
        reached = plain(*_as(torch.float16, loud)).abs().max()
        if not reached <= 2.0**14:  # infinite, or no number
            break
        loudest = loud
    if loudest is None:
        raise NotJudged("its outputs do not fit into float16 as they are")
    y, rounded = exact(*_as(torch.float32, loudest)), half(*_as(torch.float16, loudest)).float()
    noise = (y - rounded).norm()
    return 20 * math.log10(max(y.norm().item(), 1e-30) / max(noise.item(), 1e-30)) if noise.isfinite() else -math.inf


def _as(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each for each in args)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def spec_of(patches: Iterable[Patch]) -> str:
    return " + ".join(patch.spec for patch in patches)
