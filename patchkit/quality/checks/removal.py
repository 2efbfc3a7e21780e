"""That patches do something, in bounded memory where they promise it, and that nothing is left when they are removed."""

from __future__ import annotations

from patchkit import api
from patchkit.patch import Patch
from patchkit.quality.checks.case import Case, NotJudged
from patchkit.quality.checks.feeding import listed
from patchkit.quality.latency import cache_bytes, prefilled_cache
from patchkit.quality.proof import Check
from patchkit.testing import assert_restored


def restored(case: Case) -> None:
    def run() -> Check:
        promise = "nothing is left when removed"
        if any(patch.irreversible for patch in case.patches):
            raise NotJudged("these options say that they cannot be undone")
        api.unpatch_model(case.full)
        try:
            assert_restored(case.before, case.full)
        except AssertionError as found:
            return Check(case.spec, "all", promise, "broken", detail=str(found))
        finally:
            api.patch_model(case.full, *case.patches, verbose=False)
        return Check(case.spec, "all", promise, "kept", detail="modules, hooks, attributes, weights and logits, bit by bit")

    case.check("all", "nothing is left when removed", run)


def acted(case: Case) -> None:
    for patch, facts in zip(sorted(case.patches, key=lambda patch: patch.stage), api.report(case.full).patches, strict=True):

        def run(patch: Patch = patch, hits: dict[str, int] = facts.hits) -> Check:
            counted = sum(hits.get(name, 0) for name in patch.acts) if patch.acts else sum(hits.values())
            said = ", ".join(f"{name} {count}" for name, count in hits.items()) or "no counters moved"
            return Check(case.spec, patch.spec, "it acted", "kept" if counted else "broken", detail=said)

        case.check(patch.spec, "it acted", run)


def bounded(case: Case) -> None:
    promised = [promise for promise in case.promises.values() if promise.bounded]
    if not promised:
        return

    def run() -> Check:
        settled = max(promise.same_up_to for promise in promised) + 8
        sizes = []
        cache = None
        for _ in range(3):
            cache = prefilled_cache(case.full, settled, chunk=settled, cache=cache)
            cache = prefilled_cache(case.full, 3, chunk=1, cache=cache)
            sizes.append(cache_bytes(cache))
        tokens = [(number + 1) * (settled + 3) for number in range(3)]
        detail = f"cache of {listed(sizes)} bytes after {listed(tokens)} tokens"
        return Check(case.spec, "all", "memory is bounded", "kept" if sizes[1] == sizes[2] else "broken", detail=detail)

    if case.longest is None or 3 * case.reach + 40 <= case.longest:
        case.check("all", "memory is bounded", run)
