"""Scores of a conversion: perplexity on held-out text, fresh and streamed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.api import patch_model
from patchkit.errors import UnsupportedModel
from patchkit.linear.state import LinearState, load_state
from patchkit.measure.perplexity import block_nll, by_position, stream_nll
from patchkit.training.conversion import Score
from patchkit.views import evaluating, twin


class Scorer:
    """Scores models on held-out text, relative to the unpatched one.

    Args:
        target: anatomy of ``model``.
        heldout: token ids [n] to score on.
        context: C, tokens of each sequence that is scored from its beginning.
        limit: positions that the unpatched model was made for.
    """

    def __init__(self, model: Any, target: Target, heldout: torch.Tensor, context: int, limit: int) -> None:
        self.model, self.target, self.heldout, self.context, self.limit = model, target, heldout, context, limit

    def patched(self, state: LinearState) -> Any:
        """A twin of the model, patched with a copy of ``state``."""
        from patchkit.patches.linear import LinearAttention

        frozen = load_state(state.state_dict(), self.target)
        return patch_model(twin(self.model).eval(), LinearAttention(state_dict=frozen), verbose=False)

    def window_alone(self, state: LinearState) -> Any:
        """A twin of the model whose converted layers see sinks and window only; None if streaming refuses it."""
        from patchkit.patches.streaming import StreamingLLM

        alone = StreamingLLM(sinks=state.sinks, window=state.window, layers=tuple(state.layers))
        try:
            return patch_model(twin(self.model).eval(), alone, verbose=False)
        except UnsupportedModel:  # learned positions cannot stream; a linear layer has none
            return None

    def score(self, model: Any) -> Score | None:
        """Perplexity of a model on the held-out text; None if it is shorter than a context."""
        if len(self.heldout) <= self.context:
            return None
        edges = [0, self.context, 8 * self.context, 32 * self.context]
        fresh_reference, streamed_reference = self.references
        with evaluating(model):
            fresh, streamed = block_nll(model, self.heldout, self.context), stream_nll(model, self.heldout)
        buckets = by_position(streamed, edges)
        ratios = by_position(streamed - streamed_reference, edges)
        spans = [f"{bucket.start}-{bucket.stop}" for bucket in buckets]
        return Score(
            by_position(fresh, [0, len(fresh)])[0].perplexity,
            {span: bucket.perplexity for span, bucket in zip(spans, buckets, strict=True)},
            by_position(fresh - fresh_reference, [0, len(fresh)])[0].perplexity,
            {span: bucket.perplexity for span, bucket in zip(spans, ratios, strict=True)},
        )

    @functools.cached_property
    def references(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nats per token [n - 1] of the unpatched model, restarted every C tokens, and every ``limit`` tokens."""
        with evaluating(self.model):
            pieces = [
                stream_nll(self.model, self.heldout[start : start + self.limit + 1])
                for start in range(0, len(self.heldout) - 1, self.limit)
            ]
            return block_nll(self.model, self.heldout, self.context), torch.cat(pieces)
