"""First sieve of rules: texts are read once with full attention, rules choose from those keys as a stream would, and the question sees
only what they kept. Optimistic by as much as keys made under full attention differ from those of a stream; `honest.py` has the rest.

python offline.py [ROWS] [NAME ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import rules as R
import torch
from cases import Rows, needles
from reader import Asked, Full, Reader

from patchkit.models import load_model

SINKS, TOTAL = 4, 512


def score_of(forced_logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Hits [B] and mean log-probabilities [B] of the answers, read with teacher forcing."""
    logits = forced_logits[:, -rows.scored :].float()
    wanted = rows.forced[:, -rows.scored :]
    return (logits.argmax(-1) == wanted).all(1), logits.log_softmax(-1).gather(2, wanted[..., None])[..., 0].mean(1)


def ask(dump: Full, rows: Rows, end: int, visible: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([rows.tails, rows.forced[:, :-1]], 1)
    return score_of(Asked(dump, end, visible).step(ids), rows)


Masks = Callable[[Full, int, int], torch.Tensor]


def static(score: Callable[[Full, int], torch.Tensor], window: int = 64, block: int = 32, joint: bool = True) -> Callable[..., list[Any]]:
    """Masks by a score that is final when a token leaves."""

    def masks(dump: Full, ends: list[int]) -> list[list[torch.Tensor]]:
        found: list[list[torch.Tensor]] = [[] for _ in ends]
        for layer in range(dump.reader.layers):
            s = score(dump, layer)
            for which, end in enumerate(ends):
                found[which].append(R.top(s[..., :end], R.left(end, window, block), window, SINKS, TOTAL - SINKS - window, joint))
        return found

    return masks


def k(dump: Full, layer: int) -> torch.Tensor:
    return dump.k[layer][:, :, : dump.seen]


def r(dump: Full, layer: int) -> torch.Tensor:
    return dump.r[layer][:, :, : dump.seen]


def v(dump: Full, layer: int) -> torch.Tensor:
    return dump.v[layer][:, :, : dump.seen]


def candidates() -> Iterator[tuple[str, Any]]:
    yield (
        "streaming",
        lambda dump, ends: [
            [R.top(torch.zeros_like(k(dump, 0)[..., :end, 0]), SINKS, TOTAL - SINKS, SINKS, 0, False)] * dump.reader.layers for end in ends
        ],
    )
    kd = lambda d, i: R.keydiff(k(d, i))  # noqa: E731
    for joint in (False, True):
        tag = " joint" if joint else ""
        yield f"keydiff rotated{tag}", static(lambda d, i: R.keydiff(r(d, i)), joint=joint)
        yield f"keydiff{tag}", static(kd, joint=joint)
        yield f"keydiff pool7{tag}", static(lambda d, i: R.pooled(kd(d, i)), joint=joint)
        yield f"keydiff pool15{tag}", static(lambda d, i: R.pooled(kd(d, i), 15), joint=joint)
        yield f"keydiff mean7{tag}", static(lambda d, i: R.mean_pooled(kd(d, i)), joint=joint)
        yield f"keydiff z pool7{tag}", static(lambda d, i: R.pooled(R.z(kd(d, i))), joint=joint)
        yield f"unit keydiff pool7{tag}", static(lambda d, i: R.pooled(R.unit_keydiff(k(d, i))), joint=joint)
        yield f"distance pool7{tag}", static(lambda d, i: R.pooled(R.distance(k(d, i))), joint=joint)
        yield f"centred pool7{tag}", static(lambda d, i: R.pooled(R.centred(k(d, i))), joint=joint)
        yield f"local pool7{tag}", static(lambda d, i: R.pooled(R.local(k(d, i))), joint=joint)
        yield f"lag pool7{tag}", static(lambda d, i: R.pooled(R.lag(k(d, i), v(d, i))), joint=joint)
        yield f"value norm pool7{tag}", static(lambda d, i: R.pooled(v(d, i).norm(dim=-1)), joint=joint)
        yield f"value diff pool7{tag}", static(lambda d, i: R.pooled(R.keydiff(v(d, i))), joint=joint)
        yield f"small keys pool7{tag}", static(lambda d, i: R.pooled(-k(d, i).norm(dim=-1)), joint=joint)
        yield (
            f"keydiff z + value diff z pool7{tag}",
            static(lambda d, i: R.pooled(R.z(kd(d, i)) + R.z(R.keydiff(v(d, i)))), joint=joint),
        )
    yield (
        "surprise pool7",
        static(lambda d, i: R.pooled(d.surprise[:, None, : d.seen].expand(-1, d.reader.groups, -1)), joint=False),  # type: ignore[attr-defined]
    )
    yield (
        "surprise mean7",
        static(lambda d, i: R.mean_pooled(d.surprise[:, None, : d.seen].expand(-1, d.reader.groups, -1)), joint=False),  # type: ignore[attr-defined]
    )
    yield (
        "keydiff z + surprise z pool7 joint",
        static(lambda d, i: R.pooled(R.z(kd(d, i)) + R.z(d.surprise[:, None, : d.seen].expand(-1, d.reader.groups, -1)))),  # type: ignore[attr-defined]
    )


def read(reader: Reader, ids: torch.Tensor, queries: bool = False) -> Full:
    """Read rows with full attention, and record how surprising each token was [B, T]."""
    dump = Full(reader, ids.shape[1], len(ids), queries)
    surprise = torch.zeros(ids.shape)
    for start in range(0, ids.shape[1], 256):
        part = ids[:, start : start + 256]
        h = reader.hidden(part, dump)
        dump.seen += part.shape[1]
        for row in range(len(ids)):
            logits = reader.head(h[row]).log_softmax(-1)
            following = ids[row, start + 1 : start + 1 + part.shape[1]]
            surprise[row, start + 1 : start + 1 + len(following)] = -logits[: len(following)].gather(1, following[:, None])[:, 0]
        print("read", dump.seen, flush=True)
    dump.surprise = surprise  # type: ignore[attr-defined]
    return dump


def report(name: str, dump: Full, rows: Rows, ends: list[int], masks: Any) -> None:
    started = time.time()
    found = masks(dump, ends)
    chosen = time.time() - started
    words = []
    for end, visible in zip(ends, found, strict=True):
        stated = torch.stack(
            [m[b, :, p : p + n].float().mean(1) for m in visible for b, (p, n) in enumerate(zip(rows.places, rows.stated, strict=True))]
        )
        hits, logs = ask(dump, rows, end, visible)
        words.append(f"{int(hits.sum()):3d}/{len(hits)} {logs.mean():7.3f} kept {stated.mean():.2f}")
    print(f"{name:40s} {'   '.join(words)}   ({chosen:.0f} + {time.time() - started - chosen:.0f} s)", flush=True)


def main() -> None:
    count, wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 12, sys.argv[2:]
    torch.set_grad_enabled(False)
    model, tokenizer = load_model("smollm2")
    reader = Reader(model)
    ends = [1800, 3000]
    rows = needles(tokenizer, count, 2400)
    started = time.time()
    dump = read(reader, rows.ids)
    print(f"read in {time.time() - started:.0f} s; needles at {rows.places}; asked at {ends}", flush=True)
    everything = lambda d, ends: [[torch.ones_like(k(d, 0)[..., :end, 0], dtype=torch.bool)] * d.reader.layers for end in ends]  # noqa: E731
    report("unpatched", dump, rows, ends, everything)
    for name, masks in candidates():
        if not wanted or any(word in name for word in wanted):
            report(name, dump, rows, ends, masks)


if __name__ == "__main__":
    main()
