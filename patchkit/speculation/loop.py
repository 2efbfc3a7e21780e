"""Speculative generation as transformers' `custom_generate`: draft, verify in one forward of the target, keep what is accepted, repeat.

Prompts, processors, stopping criteria and lengths are prepared by `generate` itself. Processors and criteria are called once for every
emitted token, with the prefixes and in the order of plain decoding. Tokens after the end of a row are dropped.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from patchkit import _compat
from patchkit.speculation.batch import Batch
from patchkit.speculation.refusals import Call, refuse_call
from patchkit.speculation.row import Row
from patchkit.speculation.rows import Rows
from patchkit.speculation.shared import Speculation
from patchkit.speculation.tree import stacked


def speculate(speculation: Speculation, streamer: Any, call: Call) -> Any:
    """Generate by speculative decoding, in place of transformers' own sampling loop.

    Args:
        streamer: receives every token once it is final, after ``release()``; None for none.
        call: what `generate` has prepared, with prompts [B, L] int64, left-padded.

    Returns:
        Token ids [B, L + new] int64, or a `GenerateDecoderOnlyOutput` if the config asks for one.

    Raises:
        Unserved: only the stock method can serve the call; nothing was computed.
    """
    refuse_call(call, has_streamer=streamer is not None)
    speculation.exclusive.take(f"generate of this {type(call.model).__name__}")
    try:
        batch = Batch(speculation, call, Rows(call))
        rows = list(batch.rows.rows)
        if streamer is not None:
            streamer.release()
            rows[0].sink = functools.partial(_put, streamer)
        try:
            batch.prefill()
            while len(batch.rows):
                batch.round()
        finally:
            batch.close()
        if streamer is not None:
            streamer.end()
        batch.publish()
        return _output(rows, batch.cache, call.config)
    finally:
        speculation.exclusive.give_back()


def _put(streamer: Any, tokens: list[int]) -> None:
    for token in tokens:
        streamer.put(torch.tensor([token]))


def _output(rows: list[Row], cache: Any, config: Any) -> Any:
    longest = max(len(row.tokens) for row in rows)
    # Without an EOS token there may be no padding token either, and all rows are as long (`refuse_call`).
    pad = _compat.padding_token(config) or 0
    sequences = torch.stack([torch.nn.functional.pad(row.tokens, (0, longest - len(row.tokens)), value=pad) for row in rows])
    if not config.return_dict_in_generate:
        return sequences
    output: Any = GenerateDecoderOnlyOutput  # its annotations want tuples of one
    return output(
        sequences=sequences,
        scores=stacked([row.scores for row in rows]) if rows[0].keeps_scores else None,
        logits=stacked([row.logits for row in rows]) if rows[0].keeps_logits else None,
        # The cache of a batch ends with the keys of its last row only.
        **{_compat.CACHE: cache if len(rows) == 1 else None},
    )
