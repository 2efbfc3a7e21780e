"""Perplexity, passkeys and near ties, patched and unpatched, and the promises about them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from typing import Any

import torch

from patchkit.measure import paired
from patchkit.measure.perplexity import perplexity_of, stream_nll
from patchkit.prove.checks.bounds import Bound, judged, largest, size, tight
from patchkit.prove.checks.case import Case, NotJudged
from patchkit.prove.checks.feeding import fed, that_fit
from patchkit.prove.checks.work import Work
from patchkit.prove.proof import Check, Passkey, Perplexity, Status

BEYOND_THE_WINDOW = "quality beyond the window"
NOT_TOO_GOOD = "not suspiciously better"
SAME_PERPLEXITY = "perplexity stays the same"

# A lossy patch that lowers perplexity by more than this, beyond its interval, has seen later tokens.
_TOO_GOOD = 0.05
# Most tokens per forward when scoring; large vocabularies allow fewer, because about four copies of the logits are in memory.
_CHUNK = 256


class Quality:
    """Perplexity, passkeys and near ties of the given patches, compared with the unpatched model."""

    def __init__(self, case: Case, texts: list[torch.Tensor], passkeys: Callable[[int, int], tuple[list[int], int]] | None) -> None:
        self.case, self.proof, self.passkeys = case, case.proof, passkeys
        self.texts = [ids[: case.longest] for ids in texts]
        self.chunk = min(_CHUNK, that_fit(16 * case.vocabulary))

    @property
    def promises(self) -> list[str]:
        """Names of the promises that can be judged here."""
        found = [NOT_TOO_GOOD]
        if max(map(len, self.texts)) <= self.case.reach:
            found.insert(0, BEYOND_THE_WINDOW)
        if all(promise.same_logits for promise in self.case.promises.values()):
            found.append(SAME_PERPLEXITY)
        return found

    @property
    def work(self) -> Work:
        """Cost of scoring."""
        return Work(0, 2 * sum(map(len, self.texts)))

    @property
    def passkey_work(self) -> Work:
        """Cost of `measure_passkeys`."""
        distances, trials = self._distances
        return Work(0, 2 * trials * sum(distance + 24 for distance in distances))

    @property
    def _distances(self) -> tuple[list[int], int]:
        """Numbers of tokens between a passkey and the question for it, and the number of trials of each."""
        case = self.case
        reach = case.reach or 128
        distances = sorted({max(16, reach // 4), max(32, reach // 2), reach + 64, 2 * reach + 64})
        distances, trials = (distances, 8) if case.thorough else (distances[1:3], 4)
        return [distance for distance in distances if case.longest is None or distance + 64 <= case.longest], trials

    def run(self, wanted: Collection[str]) -> None:
        """Measure everything, and judge the wanted promises."""
        case = self.case
        plain, patched = self._nll(case.plain, "unpatched", ties=True), self._nll(case.full, case.spec)
        self._perplexity(plain, patched)
        if BEYOND_THE_WINDOW in wanted:
            case.check("all", BEYOND_THE_WINDOW, self._too_short)
        if NOT_TOO_GOOD in wanted:
            case.check("all", NOT_TOO_GOOD, lambda: self._not_too_good(plain, patched))
        if SAME_PERPLEXITY in wanted:
            case.check("all", SAME_PERPLEXITY, lambda: self._same(plain, patched))

    def _nll(self, view: Any, what: str, ties: bool = False) -> list[torch.Tensor]:
        """Nats of every token of every document; with ``ties``, near ties are counted too."""
        close = count = 0

        def notice(model: Any, args: Any, output: Any) -> None:
            nonlocal close, count
            best = output.logits.topk(2, -1).values
            close += int(((best[..., 0] - best[..., 1]) <= torch.finfo(best.dtype).eps * best[..., 0].abs()).sum())
            count += best[..., 0].numel()

        found = []
        hook = view.register_forward_hook(notice) if ties else None
        try:
            for number, ids in enumerate(self.texts, 1):
                self.case.advance(f"{what}: perplexity of document {number} of {len(self.texts)}")
                found.append(stream_nll(view, ids, chunk=self.chunk))
        finally:
            if hook is not None:
                hook.remove()
        if ties:
            self.proof.near_tie_rate = close / count
        return found

    def _perplexity(self, plain: list[torch.Tensor], patched: list[torch.Tensor]) -> None:
        difference = _difference(patched, plain)
        ratio = paired.Interval(*(perplexity_of(each) for each in (difference.value, difference.low, difference.high)))
        means = [perplexity_of(torch.cat(nll).mean().item()) for nll in (plain, patched)]
        self.proof.perplexity = Perplexity(len(plain), sum(map(len, plain)), means[0], means[1], ratio, _curve(plain, patched))

    def _too_short(self) -> Check:
        raise NotJudged(f"no document is longer than the {self.case.reach} tokens beyond which the patches act: score more text")

    def _same(self, plain: list[torch.Tensor], patched: list[torch.Tensor]) -> Check:
        case = self.case
        found = size(case, largest(([left[None, :, None]], [right[None, :, None]]) for left, right in zip(patched, plain, strict=True)))
        kept, bound = judged(found, [tight(case)])
        return Check(case.spec, "all", SAME_PERPLEXITY, "kept" if kept else "broken", found, bound.value, bound.why, "nats of every token")

    def _not_too_good(self, plain: list[torch.Tensor], patched: list[torch.Tensor]) -> Check:
        """Check that a patch is not much better than the unpatched model.

        A model degrades beyond the length that it was made for, and a patch may help there; so the unpatched model is scored with a
        short context too.
        """
        case = self.case
        gains = [_difference(patched, plain)]
        limit = case.target.position_limit
        if limit is not None and any(len(ids) > limit for ids in self.texts):
            case.advance(f"unpatched: perplexity with at most {limit} tokens of context")
            gains.append(_difference(patched, [_nll_of_short_context(case.plain, ids, limit, self.chunk) for ids in self.texts]))
        if len(plain) == 1:
            raise NotJudged("one document gives no interval: give several texts, or a longer one")
        nearest = max(gains, key=lambda gain: gain.high)
        change = f"{math.expm1(nearest.value):+.2%} [{math.expm1(nearest.low):+.2%}, {math.expm1(nearest.high):+.2%}] of perplexity"
        reference = (
            "the unpatched model" if len(gains) == 1 else f"the better of the unpatched model with all context and with {limit} tokens"
        )
        status: Status = "broken" if nearest.high < -_TOO_GOOD else "kept"
        better = Bound(_TOO_GOOD, "nats per token better")
        return Check(
            case.spec, "all", NOT_TOO_GOOD, status, max(0.0, -nearest.high), better.value, better.why, f"{change} compared with {reference}"
        )

    def measure_passkeys(self) -> None:
        """Measure the share of passkeys that are completed, by distance."""
        case = self.case
        assert self.passkeys is not None
        distances, trials = self._distances
        for distance in distances:
            case.advance(f"passkeys at distance {distance}")
            right = [0, 0]
            for trial in range(trials):
                ids, length = self.passkeys(distance, trial)
                row = torch.tensor([ids], device=case.model.device)
                wanted = torch.arange(row.shape[1] - length - 1, row.shape[1] - 1)
                for side, view in enumerate((case.plain, case.full)):
                    likeliest = next(fed(view, row, [], at=wanted))[0].argmax(-1)
                    right[side] += bool(torch.equal(likeliest, row[0, -length:]))
            self.proof.passkey.append(Passkey(distance, right[0] / trials, right[1] / trials, trials))


def _difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> paired.Interval:
    """Mean nats per token by which ``left`` is above ``right``, with its interval over documents."""
    means = [[nll.double().mean().item() for nll in side] for side in (left, right)]
    return paired.mean_difference(means[0], means[1], weights=[len(nll) for nll in left])


def _nll_of_short_context(view: Any, ids: torch.Tensor, limit: int, chunk: int) -> torch.Tensor:
    """Negative log-likelihood of each token, given at least limit / 2 and at most limit tokens before it."""
    step = max(1, limit // 2)
    parts = [stream_nll(view, ids[:limit], chunk=chunk)]
    for start in range(limit, len(ids), step):
        parts.append(stream_nll(view, ids[start - step - 1 : start + step], chunk=chunk)[-len(ids[start : start + step]) :])
    return torch.cat(parts)[: len(ids) - 1]


def _curve(plain: list[torch.Tensor], patched: list[torch.Tensor], bins: int = 16) -> list[tuple[float, float, float]]:
    longest = max(map(len, plain))
    edges = sorted({0, *(round(16 * (longest / 16) ** (i / bins)) for i in range(bins + 1)), longest} & set(range(longest + 1)))
    points: list[tuple[float, float, float]] = []
    for start, stop in itertools.pairwise(edges):
        left, right = (torch.cat([nll[start:stop] for nll in side]).mean().item() for side in (plain, patched))
        points.append(((start + stop) / 2, perplexity_of(left), perplexity_of(right)))
    return points
