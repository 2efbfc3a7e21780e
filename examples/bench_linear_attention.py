"""Causal attention at growing lengths: explicit softmax, torch's fused softmax (SDPA) and `linear_attention`; then a stack that decodes.

python examples/bench_linear_attention.py [FOLDER] [--lengths 256 1024 4096 16384] [--device cuda] [--dtype bfloat16]

Leaves linear_attention.csv and, where matplotlib is installed, linear_attention.png in FOLDER. Milliseconds are medians of interleaved
rounds; the explicit softmax is left out where its scores would take more than 4 GiB.
"""

import argparse
import csv
import importlib.util
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from patchkit.kernels.linear_attention import linear_attention
from patchkit.kernels.research.linear_attention_step import linear_attention_step


def naive(q, k, v):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def linear(q, k, v):
    return linear_attention(q, k, v)[0]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def medians(forms, given, rounds):
    times = {form.__name__: [] for form in forms}
    for turn in range(rounds + 1):
        for form in forms:
            started = time.perf_counter()
            form(*given)
            synchronize(given[0].device)
            if turn:  # the first warms up
                times[form.__name__].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


class Block(nn.Module):
    """Linear attention and an MLP; at decode it keeps a state instead of keys and values."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x, state, normalizer):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if x.shape[1] == 1:
            y = linear_attention_step(q, k, v, state, normalizer)[0]
        else:
            y, _, *last = linear_attention(q, k, v, state, normalizer)
            state.copy_(last[0])
            normalizer.copy_(last[1])
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def decode(device, dtype, hidden, layers, prompt, tokens):
    """Tokens per second after a prompt, and bytes of state."""
    heads = hidden // 64
    blocks = nn.ModuleList(Block(hidden, heads) for _ in range(layers)).to(device, dtype)
    states = [(torch.zeros(1, heads, 64, 64, device=device), torch.zeros(1, heads, 64, device=device)) for _ in blocks]
    x = torch.randn(1, prompt, hidden, device=device, dtype=dtype)
    for new in range(tokens + 1):
        for block, (state, normalizer) in zip(blocks, states, strict=True):
            x = block(x, state, normalizer)
        x = F.layer_norm(x[:, -1:], (hidden,))
        synchronize(device)
        if new == 0:
            started = time.perf_counter()
    return tokens / (time.perf_counter() - started), sum(part.nbytes for pair in states for part in pair)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stack", type=int, nargs=4, default=[512, 8, 1024, 64], metavar=("HIDDEN", "LAYERS", "PROMPT", "TOKENS"))
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for length in args.lengths:
        given = [torch.randn(1, 8, length, 128, device=args.device, dtype=args.dtype) for _ in range(3)]
        forms = [naive, sdpa, linear] if 8 * length**2 * given[0].element_size() <= 2**32 else [sdpa, linear]
        rows.append({"tokens": length, **medians(forms, given, args.rounds)})
        print(f"{length:6} tokens: " + ", ".join(f"{form.__name__} {rows[-1][form.__name__]:.2f} ms" for form in forms), flush=True)
    with (args.folder / "linear_attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["tokens", "naive", "sdpa", "linear"])
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("matplotlib"):
        from matplotlib.figure import Figure

        figure = Figure()
        axes = figure.subplots()
        for name in ("naive", "sdpa", "linear"):
            axes.loglog(*zip(*[(row["tokens"], row[name]) for row in rows if name in row], strict=True), marker="o", label=name)
        axes.set(xlabel="tokens", ylabel="ms", title=f"causal attention, 8 heads of 128, {args.dtype}, {args.device}")
        axes.legend()
        figure.savefig(args.folder / "linear_attention.png")
    rate, size = decode(args.device, args.dtype, *args.stack)
    print(f"{args.stack[1]} layers x {args.stack[0]}: {rate:.0f} tokens per second, {size} bytes of state at any length")


if __name__ == "__main__":
    main()
