"""Whether patches keep what they promise, on this model and these texts: `patchkit prove`.

A patch says what it promises (`patchkit.patch.Promises`); nothing here knows which patches there are. Every promise is checked beside
the same model without that one patch, in the same process and over the same weights. What every patched model has to keep is checked
for all patches together: no token sees a later one, rows and texts do not mix, what is taken back leaves no trace, nothing is left
when the patches are removed.

Two sets of patches are checked: the given ones, and where these only act on long texts, the same with options under which all happens
in a short one (`Patch.exercised`).
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from patchkit.patch import Patch
from patchkit.quality import paired
from patchkit.quality.checks import NEW_TOKENS, Advance, Case, NotJudged, spec_of
from patchkit.quality.latency import Stream, cache_bytes, decode_latency, median_ms, prefilled_cache
from patchkit.quality.perplexity import TextError, perplexity_of, stream_nll
from patchkit.quality.proof import Check, Passkey, Perplexity, Proof, Speed, Status

# A lossy patch that lowers perplexity by more than this, beyond its interval, has seen what it should not.
_TOO_GOOD = 0.05
_PASSKEY_TRIALS = 8


def prove(
    proof: Proof,
    model: PreTrainedModel,
    patches: Sequence[Patch],
    documents: Sequence[Sequence[int] | torch.Tensor],
    passkeys: Callable[[int, int], tuple[list[int], int]] | None = None,
    fast: bool = False,
    advance: Advance = lambda what: None,
) -> None:
    """Check everything and fill ``proof``, which holds what was found so far if this is interrupted.

    Args:
        model: unpatched, in evaluation mode; it is left as it is. Patched are other views of the same weights.
        patches: none compares the model with itself.
        documents: token ids of texts that belong together, each scored through one cache.
        passkeys: of a distance in tokens and the number of a trial, the ids of a text that ends in a passkey given that far before, and
            the number of ids that are the passkey.
        fast: check patches only with options for short texts, and time less.
        advance: called with what is being done.

    Raises:
        PatchError: the model cannot be patched with these patches.
        TextError: no document has two tokens.
    """
    texts = [torch.as_tensor(ids, dtype=torch.long).flatten().cpu() for ids in documents]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise TextError("no document has two tokens: give a longer text")
    with torch.no_grad():
        cases = [Case(proof, model, list(patches), texts, advance)]
        exercised = [patch.exercised() for patch in patches]
        if spec_of(exercised) != spec_of(patches):
            cases.append(Case(proof, model, exercised, texts, advance))
        for case in cases[-1:] if fast else cases:
            case.run()
        given = cases[0]
        given.check("all", "quality is measured", _Quality(given, texts, passkeys).run)
        given.check("all", "speed is measured", functools.partial(_time, given, advance, rounds=15 if fast else 40))
    proof.complete = True


# -- quality ---------------------------------------------------------------------------------------------------------------


class _Quality:
    """Perplexity, passkeys and near ties of the given patches beside the unpatched model."""

    def __init__(self, case: Case, texts: list[torch.Tensor], passkeys: Callable[[int, int], tuple[list[int], int]] | None) -> None:
        self.case, self.proof, self.passkeys = case, case.proof, passkeys
        self.texts = [ids[: case.longest] for ids in texts]

    def run(self) -> None:
        """Measure all, and judge what has to do with it."""
        case = self.case
        plain, patched = (self._nll(view, what) for view, what in ((case.plain, "unpatched"), (case.full, case.spec)))
        self._near_ties()
        self._perplexity(plain, patched)
        longest = max(map(len, self.texts))
        if longest <= case.reach:
            why = f"no document is longer than the {case.reach} tokens beyond which the patches act: score more text"
            self.proof.checks.append(Check(case.spec, "all", "quality beyond the window", "not judged", detail=why))
        case.check("all", "not suspiciously better", lambda: self._not_too_good(plain, patched))
        if all(promise.same_logits for promise in case.promises.values()):
            case.same(
                "all", "perplexity stays the same", lambda _: zip(patched, plain, strict=True), "nats of every token", own_noise=False
            )
        if self.passkeys is not None:
            self._passkeys()

    def _nll(self, view: Any, what: str) -> list[torch.Tensor]:
        found = []
        for number, ids in enumerate(self.texts, 1):
            self.case.advance(f"{what}: perplexity of document {number} of {len(self.texts)}")
            found.append(stream_nll(view, ids, chunk=256))
        return found

    def _perplexity(self, plain: list[torch.Tensor], patched: list[torch.Tensor]) -> None:
        difference = _difference(patched, plain)
        ratio = paired.Interval(*(perplexity_of(each) for each in (difference.value, difference.low, difference.high)))
        means = [perplexity_of(torch.cat(nll).mean().item()) for nll in (plain, patched)]
        self.proof.perplexity = Perplexity(len(plain), sum(map(len, plain)), means[0], means[1], ratio, _curve(plain, patched))

    def _not_too_good(self, plain: list[torch.Tensor], patched: list[torch.Tensor]) -> Check:
        """Beyond the length that a model was made for it is lost, and a patch may help; so it is compared with a short context too."""
        case, promise = self.case, "not suspiciously better"
        gains = [_difference(patched, plain)]
        limit = case.target.position_limit
        if limit is not None and any(len(ids) > limit for ids in self.texts):
            case.advance(f"unpatched: perplexity with at most {limit} tokens of context")
            gains.append(_difference(patched, [_nll_of_short_context(case.plain, ids, limit) for ids in self.texts]))
        if len(plain) == 1:
            raise NotJudged("one document gives no interval: give several texts, or a longer one")
        nearest = max(gains, key=lambda gain: gain.high)
        said = f"{math.expm1(nearest.value):+.2%} [{math.expm1(nearest.low):+.2%}, {math.expm1(nearest.high):+.2%}] of perplexity"
        beside = "the unpatched model" if len(gains) == 1 else f"the better of the unpatched model with all context and with {limit} tokens"
        status: Status = "broken" if nearest.high < -_TOO_GOOD else "kept"
        return Check(case.spec, "all", promise, status, detail=f"{said} beside {beside}")

    def _near_ties(self) -> None:
        close = count = 0
        for ids in self.texts[:8]:
            logits = self.case.plain(input_ids=ids[None, :512].to(self.case.model.device)).logits[0]
            best = logits.float().topk(2, -1).values
            close += int(((best[:, 0] - best[:, 1]) <= torch.finfo(logits.dtype).eps * best[:, 0].abs()).sum())
            count += len(best)
        self.proof.near_tie_rate = close / count

    def _passkeys(self) -> None:
        case = self.case
        assert self.passkeys is not None
        reach = case.reach or 128
        distances = sorted({max(16, reach // 4), max(32, reach // 2), reach + 64, 2 * reach + 64})
        if case.longest is not None:
            distances = [distance for distance in distances if distance + 64 <= case.longest]
        for distance in distances:
            case.advance(f"passkeys given {distance} tokens before")
            right = [0, 0]
            for trial in range(_PASSKEY_TRIALS):
                ids, length = self.passkeys(distance, trial)
                row = torch.tensor([ids], device=case.model.device)
                for side, view in enumerate((case.plain, case.full)):
                    said = view(input_ids=row).logits[0, -length - 1 : -1].argmax(-1)
                    right[side] += bool(torch.equal(said, row[0, -length:]))
            self.proof.passkey.append(Passkey(distance, right[0] / _PASSKEY_TRIALS, right[1] / _PASSKEY_TRIALS, _PASSKEY_TRIALS))


def _difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> paired.Interval:
    """Mean nats per token by which ``left`` is above ``right``, with its interval over documents."""
    means = [[nll.double().mean().item() for nll in side] for side in (left, right)]
    return paired.mean_difference(means[0], means[1], weights=[len(nll) for nll in left])


def _nll_of_short_context(view: Any, ids: torch.Tensor, limit: int) -> torch.Tensor:
    """As `stream_nll`, each token given at least limit / 2 and at most limit tokens before it."""
    step = max(1, limit // 2)
    parts = [stream_nll(view, ids[:limit], chunk=limit)]
    for start in range(limit, len(ids), step):
        parts.append(stream_nll(view, ids[start - step - 1 : start + step], chunk=2 * limit)[-len(ids[start : start + step]) :])
    return torch.cat(parts)[: len(ids) - 1]


def _curve(plain: list[torch.Tensor], patched: list[torch.Tensor], bins: int = 16) -> list[tuple[float, float, float]]:
    longest = max(map(len, plain))
    edges = sorted({0, *(round(16 * (longest / 16) ** (i / bins)) for i in range(bins + 1)), longest} & set(range(longest + 1)))
    points: list[tuple[float, float, float]] = []
    for start, stop in itertools.pairwise(edges):
        left, right = (torch.cat([nll[start:stop] for nll in side]).mean().item() for side in (plain, patched))
        points.append(((start + stop) / 2, perplexity_of(left), perplexity_of(right)))
    return points


# -- speed -----------------------------------------------------------------------------------------------------------------


def _time(case: Case, advance: Advance, rounds: int) -> None:
    """Time, memory and bandwidth of the patched and the unpatched model, in turns."""
    advance("timing")
    proof = case.proof
    views = {"unpatched": case.plain, "patched": case.full}
    context = case.reach + 64 if case.longest is None else max(1, min(case.reach + 64, case.longest - rounds - 8))
    prompt = case.text(min(256, context))
    caches = {name: prefilled_cache(view, context) for name, view in views.items()}
    if any(cache is None for cache in caches.values()):
        return
    timings = decode_latency({name: Stream(view, caches[name]) for name, view in views.items()}, rounds=rounds)
    prefill = _in_turns({name: functools.partial(view, input_ids=prompt, use_cache=True) for name, view in views.items()}, 5)
    generated: dict[str, list[float]] = {}
    if case.patches and any(promise.same_tokens and not promise.same_up_to for promise in case.promises.values()):
        ids = case.prompts()[0]
        calls = {name: functools.partial(case.generated, view, ids) for name, view in views.items()}
        generated = {name: [ms / NEW_TOKENS for ms in times] for name, times in _in_turns(calls, 5).items()}
        proof.generate_speedup = paired.median_ratio(generated["unpatched"], generated["patched"])
    proof.speedup = paired.median_ratio(timings["unpatched"], timings["patched"])
    proof.bandwidth_gb_s = bandwidth = _copy_bandwidth(case.model.device)
    for name, view in views.items():
        weights, kept = weight_bytes(view), cache_bytes(caches[name])
        ms = median_ms(timings, name)
        proof.speed[name] = Speed(
            context,
            prompt.shape[1],
            paired.median_ratio(prefill[name], [1.0] * len(prefill[name])).value,
            ms,
            sorted(timings[name])[math.ceil(0.95 * len(timings[name])) - 1],
            paired.median_ratio(generated[name], [1.0] * len(generated[name])).value if generated else None,
            weights,
            kept,
            (weights + kept) / (bandwidth * 1e9) / (ms / 1e3),
        )


def _in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if index:
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that one token reads: all but an embedding that is not the head's too. int8 weights count as they are kept."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    tied = head is not None and head.weight is embedding
    total = 0
    for parameter in model.parameters():
        if parameter is not embedding or tied:
            stored = getattr(parameter, "stored_bytes", None)
            total += parameter.nbytes if stored is None else stored()
    kept = (vars(module).get("_patchkit_experts", {}) for module in model.modules())
    return total + sum(weights.stored_bytes() for each in kept for weights in each.values())


def _copy_bandwidth(device: torch.device) -> float:
    """GB/s read and written by the fastest of several copies of 128 MiB."""
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9
