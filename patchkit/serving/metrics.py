"""Figures of a server for Prometheus: `Metrics`, with a registry of its own, so that two servers fit in a process."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Seconds, from one fast token to a long text.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters, gauges and histograms. One request with n choices counts as n.

    Args:
        spec: the model's patches, a label of ``patchkit_patch_info``.
    """

    def __init__(self, spec: str) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("patchkit_requests", "Choices that have ended, by the reason", ["finish"], registry=self.registry)
        self.refused = Counter("patchkit_refused", "Requests that were refused, by the HTTP status", ["status"], registry=self.registry)
        self.running = self._gauge("running", "Choices that are generated now")
        self.waiting = self._gauge("waiting", "Choices of which nothing was fed yet")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of the prompts of all choices")
        self.generated_tokens = self._counter("generated_tokens", "New tokens")
        self.first_token = self._seconds("time_to_first_token", "From the arrival of a choice to its first token")
        self.between_tokens = self._seconds("inter_token", "Between two tokens of a choice; a round of n tokens counts n times")
        self.whole = self._seconds("e2e", "From the arrival of a choice to its end")
        self.prefix_hit_tokens = self._counter("prefix_hit_tokens", "Tokens of the prompts of all choices that did not have to be fed")
        self.draft_tokens = self._counter("draft_tokens", "Drafts")
        self.accepted_tokens = self._counter("accepted_tokens", "Drafts that were accepted")
        self.forced_tokens = self._counter("forced_tokens", "Tokens that a grammar left no choice for")
        self.kv_bytes = self._gauge("kv_bytes", "Bytes of the caches")
        patches = Gauge("patchkit_patch_info", "The patches of the model", ["spec"], registry=self.registry)
        patches.labels(spec=spec).set(1)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(f"patchkit_{name}", about, registry=self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"patchkit_{name}", about, registry=self.registry)

    def _seconds(self, name: str, about: str) -> Histogram:
        return Histogram(f"patchkit_{name}_seconds", about, registry=self.registry, buckets=_SECONDS)
