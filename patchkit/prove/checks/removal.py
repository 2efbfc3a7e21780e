"""Checks that patches act, that memory is bounded where promised, and that nothing is left when patches are removed."""

from __future__ import annotations

import functools

from patchkit import api
from patchkit.measure.latency import prefilled_cache
from patchkit.patch import Patch
from patchkit.prove.checks.case import Case, NotJudged
from patchkit.prove.checks.feeding import listed
from patchkit.prove.checks.generating import generated, prompts
from patchkit.prove.proof import Check
from patchkit.testing import assert_restored
from patchkit.views import cache_bytes


def restored(case: Case) -> None:
    """Check that unpatching restores the model."""

    def run() -> Check:
        promise = "nothing is left when removed"
        if any(patch.irreversible for patch in case.patches):
            raise NotJudged("these options declare that they cannot be undone")
        assert case.before is not None
        api.unpatch_model(case.full)
        try:
            assert_restored(case.before, case.full)
        except AssertionError as found:
            return Check(case.spec, "all", promise, "broken", detail=str(found))
        finally:
            case.before = None
            api.patch_model(case.full, *case.patches, verbose=False)
        return Check(case.spec, "all", promise, "kept", detail="everything, bit by bit")

    case.check("all", "nothing is left when removed", run)


def acted(case: Case) -> None:
    """Check that the counters of every patch rose; text is generated first if nothing else made them rise."""

    def run(patch: Patch) -> Check:
        for attempt in range(2):
            hits = case.facts(patch).hits
            counted = sum(hits.get(name, 0) for name in patch.acts) if patch.acts else sum(hits.values())
            if counted or attempt:
                break
            generated(case, case.full, prompts(case)[0])
        counters = ", ".join(f"{name} {count}" for name, count in hits.items()) or "no counters moved"
        return Check(case.spec, patch.spec, "it acted", "kept" if counted else "broken", detail=counters)

    for patch in sorted(case.patches, key=lambda patch: patch.stage):
        case.check(patch.spec, "it acted", functools.partial(run, patch))


def bounded(case: Case) -> None:
    """Check that the cache stops growing."""
    promised = [promise for promise in case.promises.values() if promise.bounded]

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

    case.check("all", "memory is bounded", run)
