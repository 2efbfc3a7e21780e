"""Train the bundled models, ``stdlib-7m`` and ``stdlib-1m-draft``, on the standard library of this Python.

    python evals/train_stdlib.py tokenizer
    python evals/train_stdlib.py target          # about an hour on 2 cores; stop it and call it again to resume
    python evals/train_stdlib.py draft           # learns from the target's predictions too; about 15 minutes
    python evals/train_stdlib.py evaluate        # held-out loss, bits per byte, draft/target agreement

Matrices are trained with Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), everything
else with Adam; the learning rate warms up, stays, and falls linearly over the last 40 % of the steps.
Everything is seeded; a GPU is used when there is one.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchkit.quality.environment import environment
from patchkit.quality.stdlib_text import Split, read_texts, stdlib_files

CONTEXT = 512
VOCABULARY = 4096
BOUNDARY = "<|endoftext|>"
SHAPES = {
    "stdlib-7m": dict(hidden_size=256, intermediate_size=672, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2),
    "stdlib-1m-draft": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
}
STEPS = {"stdlib-7m": 900, "stdlib-1m-draft": 1080}
SEQUENCES = 16  # per step, of CONTEXT tokens each
TAUGHT = 0.1  # the last part of the draft's steps, in which it learns from the target too

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "patchkit" / "models"
WORK = ROOT / "evals" / "work"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def tokenizer() -> None:
    """Fit the byte-level BPE on the training files and write it beside both models."""
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
    """Train stdlib-1m-draft on the text, and at the end half on the target's predictions."""
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


def train(name: str, steps: int, seed: int, teacher: LlamaForCausalLM | None) -> None:
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
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [0.02, 3e-3]

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
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, steps)
        # A teacher costs several times the student's own step, so it comes when the text alone has taught what it can.
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
    """Mean next-token cross-entropy over ``batch`` [B, T], averaged with the one against the teacher's distribution."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = teacher(input_ids=batch, use_cache=False).logits[:, :-1].softmax(-1)
    return 0.5 * loss + 0.5 * F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


def schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))


def batch_of(tokens: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """Blocks [SEQUENCES, CONTEXT] of a permuted epoch; every epoch cuts the text at other places."""
    per_epoch = (len(tokens) - CONTEXT) // CONTEXT // SEQUENCES
    epoch, index = divmod(step, per_epoch)
    random = torch.Generator().manual_seed(1000 * seed + epoch)
    offset = int(torch.randint(CONTEXT, (), generator=random))
    order = torch.randperm(per_epoch * SEQUENCES, generator=random)[index * SEQUENCES : (index + 1) * SEQUENCES]
    return torch.stack([tokens[offset + i * CONTEXT : offset + (i + 1) * CONTEXT] for i in order.tolist()]).long()


def load_tokens(split: Split) -> tuple[torch.Tensor, int]:
    """All files of a split as one token stream [N] (uint16), each file preceded by the boundary token, and its bytes."""
    bpe = Tokenizer.from_file(str(MODELS / "stdlib-7m" / "tokenizer.json"))
    boundary = bpe.token_to_id(BOUNDARY)
    ids: list[int] = []
    n_bytes = 0
    for text in read_texts(stdlib_files(split)):
        ids += [boundary, *bpe.encode(text).ids]
        n_bytes += len(text.encode())
    return torch.tensor(ids, dtype=torch.uint16), n_bytes


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: matrices of one shape share a batched Newton-Schulz iteration in fp32."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalised(torch.stack(updates)), strict=True):
                    p.sub_(update, alpha=scale)


def orthogonalised(x: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each of ``x`` [N, rows, columns], by a quintic Newton-Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


if __name__ == "__main__":
    app()
