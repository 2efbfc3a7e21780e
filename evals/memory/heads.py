"""Which kv heads bring a needle back: by attention from the answer to the needle, then by how little the others need.

python heads.py [ROWS]: prints the heads by attention mass, and the recall when only the best n of them see everything.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from cases import Rows, needles
from offline import SINKS, ask, k, read
from reader import Asked, Full, Reader

from patchkit.models import load_model


class Watched(Asked):
    """Adds up the attention that each head gives, from the token before each token of the answer, to the same token of the needle."""

    def __init__(self, dump: Full, rows: Rows, end: int) -> None:
        everything = [torch.ones_like(k(dump, 0)[..., :end, 0], dtype=torch.bool)] * dump.reader.layers
        super().__init__(dump, end, everything)
        self.mass = torch.zeros(dump.reader.layers, dump.reader.heads)
        forced = rows.forced[:, -rows.scored :]
        self.at = []
        for row in range(len(rows.ids)):
            text = rows.ids[row].tolist()
            place = next(i for i in range(rows.places[row], end) if text[i : i + rows.scored] == forced[row].tolist())
            self.at.append(place)
        self.scored = rows.scored

    def __call__(self, index: int, q: torch.Tensor, kk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = super().__call__(index, q, kk, v)
        reader, tokens = self.read.reader, q.shape[2]
        at = torch.arange(self.end + self.seen, self.end + self.seen + tokens)
        rq = reader.rotate(q, at)[:, :, -self.scored :]
        keys = self.r[index].repeat_interleave(reader.heads // reader.groups, 1)
        scores = rq @ keys.mT * reader.dim**-0.5
        own = torch.arange(keys.shape[2])[None] <= self.end + self.seen + torch.arange(tokens)[-self.scored :, None]
        weights = scores.masked_fill(~own, -torch.inf).softmax(-1)
        for row, place in enumerate(self.at):
            for i in range(self.scored):
                self.mass[index] += weights[row, :, i, place + i] / (len(self.at) * self.scored)
        return out


def only(dump: Full, end: int, heads: set[tuple[int, int]], window: int) -> list[torch.Tensor]:
    """Masks under which these (layer, kv head) see everything and all others sinks and a window."""
    found = []
    for layer in range(dump.reader.layers):
        mask = torch.zeros_like(k(dump, 0)[..., :end, 0], dtype=torch.bool)
        mask[..., :SINKS] = mask[..., end - window :] = True
        for group in range(dump.reader.groups):
            if (layer, group) in heads:
                mask[:, group] = True
        found.append(mask)
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    model, tokenizer = load_model("smollm2")
    reader: Any = Reader(model)
    rows = needles(tokenizer, int(sys.argv[1]) if len(sys.argv) > 1 else 12, 1200)
    dump = read(reader, rows.ids)
    watched = Watched(dump, rows, 1800)
    watched.step(torch.cat([rows.tails, rows.forced[:, :-1]], 1))
    mass = watched.mass.view(reader.layers, reader.groups, -1).amax(-1)
    ranked = [(int(i) // reader.groups, int(i) % reader.groups) for i in mass.flatten().argsort(descending=True)]
    print([(f"{layer}.{group}", round(float(mass[layer, group]), 2)) for layer, group in ranked[:40]], flush=True)
    for window in (64, 252):
        for n in (0, 4, 8, 12, 16, 24, 32, 48, 90):
            hits, logs = ask(dump, rows, 1800, only(dump, 1800, set(ranked[:n]), window))
            print(f"window {window}, the best {n:2d} heads see all: {int(hits.sum()):2d}/{len(hits)} {logs.mean():7.3f}", flush=True)


if __name__ == "__main__":
    main()
