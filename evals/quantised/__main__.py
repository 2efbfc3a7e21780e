"""Quantised checkpoints of one model, by every loader, under every patch.

    python -m evals.quantised [--model tiny | stdlib-7m | smollm2] [--loaders NAME ...] [--patches SPEC ...] [--out DIR]

Writes DIR/NAME_OF_MODEL.json and a table, DIR/NAME_OF_MODEL.md. A fault is an error of any kind but a refusal before the model is
changed, or a difference between the model before it was patched and after it was unpatched.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from evals.quantised.checkpoints import CHECKPOINTS, Checkpoint, write_gptq
from evals.quantised.matrix import Outcome, is_lossy, outcome, specs
from patchkit.measure.environment import environment, version_of

RESULTS = Path(__file__).resolve().parents[1] / "results" / "quantised"
_NEW_TOKENS = 24
_PROMPTS = {"smollm2": "The history of the lighthouse begins with a fire on a hill, and", "stdlib-7m": "import os\n\n\ndef read(path):\n"}


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.quantised", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "stdlib-7m", "smollm2"), default="tiny")
    parser.add_argument("--loaders", nargs="*", default=list(CHECKPOINTS), choices=list(CHECKPOINTS), metavar="NAME")
    parser.add_argument("--patches", nargs="*", default=None, metavar="SPEC")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of three layers in bfloat16, which every library can quantise."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,  # random logits of a tiny model are nearly flat
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).bfloat16().eval()


def prepared(model: str, folder: Path) -> torch.Tensor:
    """Write the model in floating point to ``folder``, and return the prompt [1, T]."""
    if model == "tiny":
        tiny_llama().save_pretrained(folder)
        return (torch.arange(40) * 37 % 250 + 3)[None]
    from patchkit.models import load_model

    loaded, tokenizer = load_model(model, torch.bfloat16)
    loaded.save_pretrained(folder)
    return torch.as_tensor(tokenizer(_PROMPTS[model])["input_ids"])[None]


def row_of(checkpoint: Checkpoint, folder: Path, ids: torch.Tensor, chosen: list[str]) -> list[Outcome]:
    """The outcomes of all patches on one checkpoint; after a fault the model is loaded again."""
    model, found = checkpoint.open(folder), []
    for spec in chosen:
        found.append(outcome(model, spec, ids, _NEW_TOKENS, keeps_state=checkpoint.keeps_state))
        print(f"{checkpoint.name}: {spec}: {cell(found[-1])}", flush=True)
        if found[-1].fault is not None:
            model = checkpoint.open(folder)
    return found


def cell(found: Outcome) -> str:
    """What the table has of an outcome."""
    if found.fault is not None:
        return "**fault**"
    if found.refusal is not None:
        return "refused"
    if found.same_text:
        return "same text"
    return "its own text" if is_lossy(found.spec) else f"other text, logits {found.logit_error:.2g} off"


def table(rows: dict[str, list[Outcome]]) -> str:
    chosen = [found.spec for found in next(iter(rows.values()))]
    lines = [f"| loader | {' | '.join(f'`{spec}`' for spec in chosen)} |", "|---" * (len(chosen) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(map(cell, found))} |" for name, found in rows.items())]) + "\n"


def gptq_refusal(dense: Path, folder: Path) -> str:
    """What loading a GPTQ checkpoint says here."""
    write_gptq(dense, folder)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def main(arguments: list[str] | None = None) -> int:
    """Run everything; returns 1 if there is a fault."""
    options = options_of(arguments)
    transformers.logging.set_verbosity_error()
    rows: dict[str, list[Outcome]] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ids = prepared(options.model, root / "dense")
        for number, checkpoint in enumerate(CHECKPOINTS[each] for each in options.loaders):
            if not checkpoint.is_installed:
                missing[checkpoint.name] = f"{checkpoint.package} is not installed"
                continue
            try:
                checkpoint.write(root / "dense", root / str(number))
            except Exception as error:  # of the library itself: it cannot quantise this model
                missing[checkpoint.name] = f"{checkpoint.package} failed to quantise the model: {type(error).__name__}: {error}"
                continue
            rows[checkpoint.name] = row_of(checkpoint, root / str(number), ids, options.patches or specs())
        gptq = gptq_refusal(root / "dense", root / "gptq")
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "what": "every loader of quantised checkpoints under every patch; greedy text in fp32 against that of the unpatched model",
        "model": options.model,
        "new_tokens": _NEW_TOKENS,
        "loaders": {name: [found.as_dict() for found in each] for name, each in rows.items()},
        "left_out": missing,
        "gptq": gptq,
        "environment": environment() | {name: version_of(name) for name in ("torchao", "bitsandbytes", "compressed-tensors")},
    }
    (options.out / f"{options.model}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{options.model}.md").write_text(table(rows), encoding="utf-8")
    faults = [f"{name}: {found.spec}: {found.fault}" for name, each in rows.items() for found in each if found.fault is not None]
    print(*faults, f"{len(faults)} faults in {sum(map(len, rows.values()))} cells", sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
