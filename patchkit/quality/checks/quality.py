"""Perplexity, passkeys and near ties, patched beside unpatched, and what is promised about them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from patchkit.quality import paired
from patchkit.quality.checks.case import Case, NotJudged
from patchkit.quality.perplexity import perplexity_of, stream_nll
from patchkit.quality.proof import Check, Passkey, Perplexity, Status

# A lossy patch that lowers perplexity by more than this, beyond its interval, has seen what it should not.
_TOO_GOOD = 0.05
_PASSKEY_TRIALS = 8


class Quality:
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
