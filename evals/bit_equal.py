"""Find out whether a refactoring changes a bit: logits and greedy tokens of every patch on eight families of models.

    python evals/bit_equal.py before.json               # before the change: write the digests
    python evals/bit_equal.py before.json --compare     # after it: exit 1 and name each case that differs

The models are tiny and random. Each case feeds a left-padded batch whole, in pieces and token by token, then generates. Two commits are
compared on one machine, with one thread, since libraries choose kernels by processor and by number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from patchkit import PatchError, patch_model
from patchkit.testing import tiny_model

FAMILIES = ("llama", "gpt_neox", "qwen3", "mixtral", "opt", "gemma2", "bloom", "mistral")
SPECS = (
    "streaming(sinks=2, window=12)",
    "streaming(sinks=0, window=12)",
    "streaming(sinks=2, window=12, positions=true)",
    "streaming(sinks=2, window=12, layers=[0])",
    "streaming(sinks=2, window=12, refresh=reencode(every=4))",
    "streaming(sinks=2, window=12, refresh=dynamic_sinks(n=2, every=4))",
    "linear(window=8, sinks=2)",
    "linear(feature_map=hedgehog, window=8, horizon=16)",
    "mlp_int8(mode=weight_only)",
    "mlp_int8(mode=dynamic)",
    "compile(backend=eager)",
    "speculative(k=3)",
    "speculative(draft=eagle(alpha=0.5), k=2)",
    "streaming(sinks=2, window=12) + mlp_int8(mode=weight_only)",
    "streaming(sinks=2, window=12) + compile(backend=eager)",
    "streaming(sinks=2, window=12) + speculative(k=3)",
    "linear(window=8) + mlp_int8(mode=weight_only) + compile(backend=eager)",
)
TOKENS, NEW = 40, 24


def digest(tensor: torch.Tensor) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def fed(model: Any, ids: torch.Tensor, mask: torch.Tensor, pieces: Sequence[int]) -> torch.Tensor:
    """Logits [2, T, V] of a batch that is fed in pieces through one cache."""
    cache, logits, done = None, [], 0
    for count in pieces:
        options = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=ids[:, done : done + count], attention_mask=mask[:, : done + count], use_cache=True, **options)
        cache, done = output.past_key_values, done + count
        logits.append(output.logits)
    return torch.cat(logits, 1)


def computed(family: str, spec: str) -> dict[str, str]:
    """Digests of the results of one patch on one family, or its refusal with the message."""
    torch.manual_seed(0)
    model = tiny_model(family)
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) * 7 % 110 + 5
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    try:
        patch_model(model, spec, verbose=False)
    except PatchError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "whole": lambda: fed(model, ids, mask, [TOKENS]),
        "in pieces": lambda: fed(model, ids, mask, [16, 1, 7, 1, 1, TOKENS - 26]),
        "token by token": lambda: fed(model, ids[:, :20], mask[:, :20], [1] * 20),
        "text": lambda: model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False),
    }
    found = {}
    for name, run in ways.items():
        try:
            with torch.no_grad():
                found[name] = digest(run())
        except (PatchError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"  # below it there may be lines of code
    return found


def all_cases() -> Iterator[tuple[str, dict[str, str]]]:
    """Names and digests of all families with all specs."""
    for family in FAMILIES:
        for spec in SPECS:
            yield f"{family}: {spec}", computed(family, spec)
            torch.compiler.reset()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", action="store_true", help="compare with the file instead of writing it")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = dict(all_cases())
    if not given.compare:
        given.file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{len(found)} cases, {sum('refused' in case for case in found.values())} of them refusals: {given.file}")
        return 0
    before = json.loads(given.file.read_text())
    different = [
        f"{case}: {name}: {before.get(case, {}).get(name)} is now {found.get(case, {}).get(name)}"
        for case in sorted(before.keys() | found.keys())
        for name in sorted(before.get(case, {}).keys() | found.get(case, {}).keys())
        if before.get(case, {}).get(name) != found.get(case, {}).get(name)
    ]
    print("\n".join(different) or f"{len(found)} cases: every bit is the same")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
