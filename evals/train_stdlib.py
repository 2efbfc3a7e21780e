# ruff: noqa: E402  (the path is set before the modules of evals/ are imported)
"""Train the bundled models, ``stdlib-7m`` and ``stdlib-1m-draft``, on the standard library of this Python.

    python evals/train_stdlib.py tokenizer
    python evals/train_stdlib.py target          # about an hour on 2 cores; stop it and call it again to resume
    python evals/train_stdlib.py draft           # learns from the target's predictions too; about 15 minutes
    python evals/train_stdlib.py continuations   # what the target writes after training prompts; about 15 minutes
    python evals/train_stdlib.py distill         # the draft again, on what the target writes; about 25 minutes
    python evals/train_stdlib.py evaluate        # held-out loss, bits per byte, draft/target agreement
    python evals/train_stdlib.py acceptance      # tokens per target step when the draft proposes
    python evals/train_stdlib.py heads           # EAGLE or Medusa heads on the continuations; about half an hour
    python evals/train_stdlib.py linear          # linear attention for stdlib-7m; about 15 minutes

Matrices are trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), everything
else with Adam; the learning rate warms up, stays, and falls linearly over the last 40 % of the steps.
Everything is seeded; a GPU is used if there is one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import rich
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache

from evals.stdlib_tokens import BOUNDARY, CONTEXT, MODELS, batch_of, load_tokens
from patchkit import _compat
from patchkit.measure.environment import environment
from patchkit.measure.stdlib_text import read_texts, stdlib_files
from patchkit.training.heads import accepted_by_position, optimizers_of, train_heads
from patchkit.training.heads_loss import agreement
from patchkit.training.linearize import linearize

VOCABULARY = 4096
SHAPES = {
    "stdlib-7m": dict(hidden_size=256, intermediate_size=672, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2),
    "stdlib-1m-draft": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
}
STEPS = {"stdlib-7m": 900, "stdlib-1m-draft": 1080}
TAUGHT = 0.1  # the last part of the draft's steps, in which it learns from the target too
WRITTEN = 256  # tokens of a prompt with the target's continuation
TOP = 8  # most likely tokens that are kept of the target's distribution at each position

WORK = ROOT / "evals" / "work"
CONTINUATIONS = WORK / "continuations"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def tokenizer() -> None:
    """Fit the byte-level BPE on the training files and write it into the folders of both models."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[BOUNDARY], initial_alphabet=alphabet)
    bpe.train_from_iterator(read_texts(stdlib_files("train")), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOUNDARY, eos_token=BOUNDARY, pad_token=BOUNDARY)
    for name in SHAPES:
        fast.save_pretrained(MODELS / name)


@app.command()
def target(steps: int = STEPS["stdlib-7m"], seed: int = 0) -> None:
    """Train stdlib-7m."""
    train("stdlib-7m", steps, seed, teacher=None)


@app.command()
def draft(steps: int = STEPS["stdlib-1m-draft"], seed: int = 1) -> None:
    """Train stdlib-1m-draft on the text and, in the last steps, half on the target's predictions."""
    teacher = LlamaForCausalLM.from_pretrained(MODELS / "stdlib-7m", dtype=torch.float32).to(DEVICE).eval()
    train("stdlib-1m-draft", steps, seed, teacher=teacher)


@app.command()
def evaluate(blocks: Annotated[int, typer.Option(help="held-out blocks of 512 tokens, spread over all files")] = 400) -> None:
    """Held-out loss per token and per byte of both models, and how often their greedy choices agree."""
    tokens, n_bytes = load_tokens("heldout")
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, blocks).long()
    batch = torch.stack([tokens[s : s + CONTEXT] for s in starts]).long()
    bytes_per_token = n_bytes / len(tokens)
    loss, greedy = {}, {}
    for name in SHAPES:
        model = LlamaForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).to(DEVICE).eval()
        with torch.inference_mode():
            logits = torch.cat(
                [model(input_ids=rows.to(DEVICE), use_cache=False).logits[:, :-1].cpu() for rows in tqdm(batch.split(16), name)]
            )
        loss[name] = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
        greedy[name] = logits.argmax(-1)
    result = {
        "nats_per_token": loss,
        "bits_per_byte": {name: value / math.log(2) / bytes_per_token for name, value in loss.items()},
        "bytes_per_token": bytes_per_token,
        "greedy_agreement": (greedy["stdlib-7m"] == greedy["stdlib-1m-draft"]).float().mean().item(),
        "tokens": batch.numel(),
        "environment": environment(),
    }
    print(json.dumps(result, indent=2))


@app.command()
def continuations(
    batches: Annotated[int, typer.Option(help="of 128 texts each")] = 64,
    sampled: Annotated[float, typer.Option(help="share of batches that are sampled; the others are greedy")] = 0.2,
    seed: int = 2,
) -> None:
    """Let stdlib-7m continue pieces of training text, and keep its most likely tokens at every position."""
    teacher = LlamaForCausalLM.from_pretrained(MODELS / "stdlib-7m", dtype=torch.float32).to(DEVICE).eval()
    tokens, _ = load_tokens("train")
    CONTINUATIONS.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(batches), "continuations"):
        file = CONTINUATIONS / f"{index:04}.pt"
        if file.exists():
            continue
        random = torch.Generator().manual_seed(1000 * seed + index)
        length = int(torch.randint(32, 129, (), generator=random))
        starts = torch.randint(len(tokens) - length, (128,), generator=random)
        prompts = torch.stack([tokens[s : s + length] for s in starts]).long()
        temperature = 0.7 + 0.3 * float(torch.rand((), generator=random)) if torch.rand((), generator=random) < sampled else 0.0
        written = continued(teacher, prompts, WRITTEN, temperature, random)
        torch.save(dict(zip(("tokens", "top_tokens", "top_probabilities"), written, strict=True)) | {"prompt": length}, file)


@app.command()
def distill(
    steps: int = 400,
    peak: Annotated[float, typer.Option(help="the learning rate's highest value, as a share of the one in training")] = 0.5,
    hard: Annotated[float, typer.Option(help="weight of the target's choice, against its distribution")] = 0.5,
    share: Annotated[float, typer.Option(help="of the new weights in the average with the old ones that is written")] = 0.7,
    seed: int = 3,
    out: Path = MODELS / "stdlib-1m-draft",
) -> None:
    """Distill the predictions of stdlib-7m on its own continuations into stdlib-1m-draft."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(MODELS / "stdlib-1m-draft", dtype=torch.float32).to(DEVICE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizers = optimizers_of(model, peak)
    checkpoint, done = WORK / "distill.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done = saved["done"]
    shards = [torch.load(file, weights_only=True) for file in sorted(CONTINUATIONS.glob("*.pt"))]
    written, top_tokens, top_probabilities = (torch.cat([s[key] for s in shards]) for key in ("tokens", "top_tokens", "top_probabilities"))
    text, _ = load_tokens("train")
    bar = tqdm(total=steps, initial=done, desc="distill", unit="step")
    for step in range(done, steps):
        random = torch.Generator().manual_seed(1000 * seed + step)
        rows = torch.randint(len(written), (28,), generator=random)
        starts = torch.randint(len(text) - WRITTEN, (4,), generator=random)  # real text, so that the draft stays a language model
        batch = torch.cat([written[rows], torch.stack([text[s : s + WRITTEN] for s in starts])]).long().to(DEVICE)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
        log_p = model(input_ids=batch, use_cache=False).logits[:, :-1].log_softmax(-1)
        soft = top_probabilities[rows].float().to(DEVICE)
        soft = (1 - hard) * soft / soft.sum(-1, keepdim=True)
        soft[..., 0] += hard
        taught = -(soft * log_p[:28].gather(-1, top_tokens[rows].long().to(DEVICE))).sum(-1).mean()
        loss = (7 * taught - log_p[28:].gather(-1, batch[28:, 1:, None]).mean()) / 8
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}", taught=f"{taught.item():.3f}")
        if (step + 1) % 50 == 0 or step + 1 == steps:
            tqdm.write(f"step {step + 1}: {acceptance_of(model)}")
            state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], done=step + 1)
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    # An average of both (Wortsman et al. 2022, "Model soups") keeps more of what the draft knew of real text.
    model.load_state_dict({name: tensor.lerp(before[name], 1 - share) for name, tensor in model.state_dict().items()})
    tqdm.write(f"averaged: {acceptance_of(model)}")
    model.to(torch.bfloat16).save_pretrained(out)


@app.command()
def heads(kind: str = "eagle", steps: int = 350, depth: int = 3, batch: int = 16, seed: int = 4) -> None:
    """Train heads for stdlib-7m on its own continuations, write them into its folder, and print the acceptance of held-out drafts."""
    model = LlamaForCausalLM.from_pretrained(MODELS / "stdlib-7m", dtype=torch.float32).to(DEVICE)
    written = torch.cat([torch.load(file, weights_only=True)["tokens"] for file in sorted(CONTINUATIONS.glob("*.pt"))])
    trained = train_heads(
        model, written, kind, steps, depth=depth, batch=batch, length=WRITTEN, seed=seed, checkpoint=WORK / f"{kind}_heads.pt"
    )
    trained.save(MODELS / "stdlib-7m" / f"{kind}_heads.safetensors")
    agrees = agreement(trained, model, heldout_continuations(), max(depth, 6) if kind == "eagle" else depth, first=127)
    result: dict[str, Any] = {"accepted_by_position": accepted_by_position(agrees).tolist()}
    for k in range(2, len(agrees) + 1):
        # The target's own forward gives the first token after the prompt; every later round begins where one ended.
        runs = agrees[:k].int().cumprod(0).sum(0).tolist()
        result[f"tokens_per_step_k{k}"] = tokens_per_step([[run + 1 for run in row] for row in runs])
    print(json.dumps(result, indent=2))


@app.command()
def linear(
    transfer_steps: int = 40, lora_steps: int = 200, batch: int = 4, length: int = 1024, distill: float = 0.5, seed: int = 0
) -> None:
    """Convert stdlib-7m to linear attention, and record the gain of each stage."""
    model = LlamaForCausalLM.from_pretrained(MODELS / "stdlib-7m", dtype=torch.float32).to(DEVICE)
    heldout, _ = load_tokens("heldout")
    WORK.mkdir(exist_ok=True)
    result = linearize(
        model, load_tokens("train")[0], transfer_steps=transfer_steps, lora_steps=lora_steps, batch=batch, length=length,
        distill=distill, seed=seed, heldout=heldout[: 32 * CONTEXT + 1].long(), checkpoint=WORK / "linear.pt",
    )  # fmt: skip
    path = WORK / "linear_state.safetensors"
    result.state.save(path, torch.bfloat16)
    options = dict(transfer_steps=transfer_steps, lora_steps=lora_steps, batch=batch, length=length, distill=distill, seed=seed)
    command = "python evals/train_stdlib.py linear " + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())
    report = result.to_json()
    record = {
        "figure": report["seconds"] / 60,
        "bar": "<= 15 minutes of training",
        **report,
        "bytes": path.stat().st_size,
        "command": command,
        "environment": environment(),
    }
    (ROOT / "evals" / "results" / "conversion_of_stdlib_7m.json").write_text(json.dumps(record, indent=2) + "\n")
    for table in result.tables():
        rich.print(table)


@app.command()
def acceptance(draft: Path = MODELS / "stdlib-1m-draft") -> None:
    """Print the acceptance of the draft on the target's greedy continuations of held-out prompts."""
    print(json.dumps(acceptance_of(LlamaForCausalLM.from_pretrained(draft, dtype=torch.float32).to(DEVICE)), indent=2))


@torch.inference_mode()
def acceptance_of(draft: LlamaForCausalLM, prompts: int = 100) -> dict[str, float]:
    """Share of equal greedy tokens, 128 after each of ``prompts`` held-out prompts of 128 tokens, and tokens per target step."""
    written = heldout_continuations(prompts)
    choice = draft(input_ids=written.to(DEVICE), use_cache=False).logits[:, 127:-1].argmax(-1).cpu()
    agrees = (choice == written[:, 128:]).tolist()
    result = {"agreement": sum(map(sum, agrees)) / sum(map(len, agrees))}
    for k in (3, 4, 6):
        rounds = []
        for row in agrees:
            starts = [row[i : i + k] for i in range(len(row))]
            rounds.append([start.index(False) + 1 if False in start else len(start) + 1 for start in starts])
        result[f"tokens_per_step_k{k}"] = tokens_per_step(rounds)
    return result


def tokens_per_step(gains: list[list[int]]) -> float:
    """Tokens per target step, where a round that begins at position i of a text gains ``gains[text][i]`` tokens."""
    n_steps = 0
    for row in gains:
        position = 0
        while position < len(row):
            position += row[position]
            n_steps += 1
    return sum(map(len, gains)) / n_steps


def heldout_continuations(prompts: int = 100) -> torch.Tensor:
    """Tokens [prompts, 256]: 128 of held-out text and 128 that stdlib-7m chooses greedily after them."""
    file = WORK / f"heldout_continuations_{prompts}.pt"
    if not file.exists():
        teacher = LlamaForCausalLM.from_pretrained(MODELS / "stdlib-7m", dtype=torch.float32).to(DEVICE).eval()
        tokens, _ = load_tokens("heldout")
        starts = torch.linspace(0, len(tokens) - 128, prompts).long()
        torch.save(continued(teacher, torch.stack([tokens[s : s + 128] for s in starts]).long(), 256)[0], file)
    return torch.load(file, weights_only=True).long()


@torch.inference_mode()
def continued(
    model: LlamaForCausalLM, prompts: torch.Tensor, length: int, temperature: float = 0.0, random: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Continuations of ``prompts`` [B, n] by the model, and its distribution at each position but the last.

    Returns:
        Tokens [B, length] uint16; the most likely tokens [B, length - 1, TOP] uint16, and their probabilities, float16.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    fed, parts, top_tokens, top_probabilities = prompts.to(DEVICE), [prompts], [], []
    for _ in range(length - prompts.shape[1]):
        probabilities = model(input_ids=fed, **{_compat.CACHE: cache}).logits.softmax(-1)
        best = probabilities.topk(TOP, dim=-1)
        top_tokens.append(best.indices.to(torch.uint16).cpu())
        top_probabilities.append(best.values.to(torch.float16).cpu())
        if temperature:
            fed = torch.multinomial(probabilities[:, -1].cpu() ** (1 / temperature), 1, generator=random).to(DEVICE)
        else:
            fed = best.indices[:, -1, :1]
        parts.append(fed.cpu())
    return torch.cat(parts, 1).to(torch.uint16), torch.cat(top_tokens, 1), torch.cat(top_probabilities, 1)


def train(name: str, steps: int, seed: int, teacher: LlamaForCausalLM | None) -> None:
    """Train one of SHAPES from random weights, with a checkpoint every 100 steps, and write it into patchkit/models/."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **SHAPES[name],
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    for layer in model.model.layers:  # every block starts as the identity
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    optimizers = optimizers_of(model)

    checkpoint = WORK / f"{name}.pt"
    done, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done, seconds = saved["done"], saved["seconds"]

    tokens, _ = load_tokens("train")
    heldout, _ = load_tokens("heldout")
    probe = torch.stack([heldout[s : s + CONTEXT] for s in torch.linspace(0, len(heldout) - CONTEXT, 32).long()]).long().to(DEVICE)
    bar = tqdm(total=steps, initial=done, desc=name, unit="step")
    for step in range(done, steps):
        started = time.perf_counter()
        batch = batch_of(tokens, step, seed).to(DEVICE)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, steps)
        # A teacher costs several times the student's own step, so it is used in the last steps only.
        loss = loss_on(model, batch, teacher if step >= (1 - TAUGHT) * steps else None)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - started
        bar.update()
        if (step + 1) % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 100 == 0 or step + 1 == steps:
            with torch.no_grad():
                held = sum(loss_on(model, rows, None).item() for rows in probe.split(16)) / 2
            tqdm.write(f"{name} step {step + 1}: held-out {held:.4f} nats/token after {seconds / 60:.1f} min of training")
            WORK.mkdir(exist_ok=True)
            state = dict(model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers], done=step + 1, seconds=seconds)
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    model.to(torch.bfloat16).save_pretrained(MODELS / name)


def loss_on(model: LlamaForCausalLM, batch: torch.Tensor, teacher: LlamaForCausalLM | None) -> torch.Tensor:
    """Mean next-token cross-entropy over ``batch`` [B, T]; with a teacher, its average with the one against the teacher's distribution."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = teacher(input_ids=batch, use_cache=False).logits[:, :-1].softmax(-1)
    return 0.5 * loss + 0.5 * F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate's highest value: warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))


if __name__ == "__main__":
    app()
