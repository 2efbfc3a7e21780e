"""Train Medusa or EAGLE heads for a frozen model, on hidden states computed as they are needed.

Matrices are trained with Muon, the rest with Adam. Heads learn the model's own distribution, half of it sharpened to its most
likely token, because that token is what a greedy run accepts.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from patchkit.errors import PatchError
from patchkit.speculation.heads import EagleHead, Heads, MedusaHeads, TrainedFor

_FEATURE_WEIGHT = 0.5  # of the smooth L1 distance between EAGLE's features and the model's, beside the cross-entropy
# The share of positions that are scored, drawn anew for each step: logits over the vocabulary cost more than EAGLE's layer.
_SCORED = {"medusa": 1.0, "eagle": 0.25}
_ALONE = 0.4  # the first part of EAGLE's steps, in which it goes on from the model's features only, which costs less
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
# Where a run is given minutes, so many steps are timed, and until then there is no end to it.
_TIMED_STEPS, _UNTIMED_STEPS = 8, 10**9
_LATER = 0.8  # a head that looks one token further weighs this much less, as in Medusa


def train_heads(
    model: Any,
    tokens: torch.Tensor,
    kind: Literal["medusa", "eagle"] = "eagle",
    steps: int = 1000,
    *,
    depth: int = 4,
    batch: int = 16,
    length: int = 256,
    on_policy: float = 0.0,
    peak: float = 1.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
    minutes: float | None = None,
) -> Heads:
    """Heads for ``model``, which stays as it is.

    Args:
        tokens: a text [n] int, from which pieces are cut at random, or texts [N, n >= length].
        depth: Medusa's number of heads; for EAGLE, of how many of its own features in a row it learns to go on from.
        batch, length: texts per step and tokens per text.
        on_policy: the share of steps whose texts are the model's own greedy continuations of their first quarter. Heads are used on
            such text, and it takes many times longer.
        peak: the learning rates' highest value, in units of 0.02 for Muon and 0.003 for Adam.
        checkpoint: a file that is written every minute, at the end, and at SIGINT or SIGTERM, and from which training goes on if it exists.
        minutes: train for about so long, whatever ``steps`` says: their number follows from the time of the first few.
        progress: whether to show a bar, with the loss and, for each drafted position, how often all drafts so far are the model's choice.

    Raises:
        UnsupportedModel: the model has no LM head or embeddings that heads could share.
        PatchError: options or tokens that cannot be used, or a checkpoint of another run.
        KeyboardInterrupt: SIGINT or SIGTERM came, and the step that was under way is done.
    """
    if kind not in ("medusa", "eagle"):
        raise PatchError(f"there are no {kind!r} heads: use kind='medusa' or kind='eagle'")
    if min(steps, depth, batch) < 1 or length < depth + 3 or not 0 <= on_policy <= 1:
        raise PatchError("steps, depth and batch must be at least 1, length at least depth + 3, and on_policy between 0 and 1")
    if tokens.shape[-1] < length:
        raise PatchError(f"{tokens.shape[-1]} tokens of text are fewer than one piece of {length}: give more text, or a smaller length")
    facts = TrainedFor.of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = MedusaHeads(facts.hidden_size, depth) if kind == "medusa" else EagleHead(facts.hidden_size, facts.embedding_size)
    heads.trained_for = facts
    heads.to(model.get_output_embeddings().weight.device)
    optimizers = optimizers_of(heads, peak)
    length_of_run = steps if minutes is None else f"{minutes} minutes"
    run = {"kind": kind, "steps": length_of_run, "depth": depth, "seed": seed, "model": facts.fingerprint}
    done = 0
    if minutes is not None:
        if not 0 < minutes < math.inf:
            raise PatchError(f"minutes={minutes}: give how long to train, more than 0")
        steps = _UNTIMED_STEPS  # until they have been timed
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
        if saved["run"] != run:
            raise PatchError(f"{checkpoint} belongs to another run ({saved['run']}): delete it, or name another checkpoint")
        heads.load_state_dict(saved["heads"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done, steps = saved["done"], saved.get("steps", steps)
    bar = tqdm(total=steps, initial=done, desc=f"{kind} heads", unit="step", disable=not progress)
    shown: torch.Tensor | None = None
    written = time.monotonic()
    step = done
    timed: dict[bool, list[float]] = {True: [], False: []}

    def save() -> None:
        if checkpoint is not None:
            states = [optimizer.state_dict() for optimizer in optimizers]
            saved = {"run": run, "heads": heads.state_dict(), "optimizers": states, "done": step, "steps": steps}
            torch.save(saved, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)

    with _frozen(model), _noted_signals() as interrupted:
        while step < steps:
            begun = time.monotonic()
            random = torch.Generator().manual_seed(1_000_003 * seed + step)
            texts = _texts(tokens, batch, length, random).to(model.device)
            if torch.rand((), generator=random) < on_policy:
                texts = _continued(model, texts)
            hidden = last_hidden_states(model, texts)
            if step == 0 and isinstance(heads, EagleHead):  # start at the features' own mean and spread
                heads.norm_out.weight.data.copy_(hidden.float().flatten(0, 1).std(0))
                heads.norm_out.bias.data.copy_(hidden.float().flatten(0, 1).mean(0))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
            # While steps are being timed, of both kinds by turns.
            alone = step % 2 == 0 if steps == _UNTIMED_STEPS else step < _ALONE * steps
            now = 1 if kind == "eagle" and alone else depth
            positions = torch.randperm(length - depth, generator=random)[: math.ceil((length - depth) * _SCORED[kind])]
            loss, agrees = loss_of(heads, model, texts, hidden, now, positions.to(model.device))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            accepted = accepted_by_position(agrees)
            shown = accepted if shown is None or len(shown) != len(accepted) else shown.lerp(accepted, 0.1)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", accepted=" ".join(f"{share:.2f}" for share in shown.tolist()))
            if minutes is not None and steps == _UNTIMED_STEPS:
                timed[alone].append(time.monotonic() - begun)
                if step >= _TIMED_STEPS and all(timed.values()):
                    seconds = _ALONE * min(timed[True]) + (1 - _ALONE) * min(timed[False])
                    steps = bar.total = max(step, round(60 * minutes / seconds))
            if step == steps or interrupted or time.monotonic() - written > _SECONDS_BETWEEN_CHECKPOINTS:
                save()
                written = time.monotonic()
            if interrupted and step < steps:
                bar.close()
                kept = "" if checkpoint is None else f"; {checkpoint} goes on from there"
                raise KeyboardInterrupt(f"stopped after {step} steps of training{kept}")
    bar.close()
    return heads.eval().requires_grad_(False)


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM within this context, put down instead of being acted on: a step that has begun comes to its end."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can signals be caught
        yield caught
        return
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def loss_of(
    heads: Heads, model: Any, tokens: torch.Tensor, hidden: torch.Tensor, depth: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The training loss on texts [B, T] with the model's ``hidden`` [B, T, D], and for drafts of ``depth`` tokens that begin after
    each of ``positions`` [n], all below T - depth, whether each token is the model's choice: [depth, B, n] bool."""
    head = model.get_output_embeddings()
    if isinstance(heads, EagleHead):
        embedded = model.get_input_embeddings()(tokens[:, 1:]).float()
        features = heads.unrolled(embedded, hidden[:, :-1].float(), depth)
        drafts = [features[j][:, positions + j] for j in range(depth)]
        distances = [F.smooth_l1_loss(features[j][:, j:], hidden[:, j + 1 :].float()) for j in range(depth)]
    else:
        assert isinstance(heads, MedusaHeads)
        drafts = list(heads(hidden[:, positions].float()).unbind(-2))[:depth]
        distances = [hidden.new_zeros(())] * depth
    losses, agrees = [], []
    for j, draft in enumerate(drafts):
        with torch.no_grad():
            logits = head(hidden[:, positions + j + 1]).float()
            choice = logits.argmax(-1)
            wanted = 0.5 * logits.softmax(-1)
            wanted.scatter_add_(-1, choice[..., None], wanted.new_full((*choice.shape, 1), 0.5))
        drafted = head(draft.to(head.weight.dtype)).float()
        losses.append(F.cross_entropy(drafted.flatten(0, 1), wanted.flatten(0, 1)) + _FEATURE_WEIGHT * distances[j])
        agrees.append(drafted.argmax(-1) == choice)
    weights = [_LATER**j for j in range(depth)]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights), torch.stack(agrees)


def accepted_by_position(agrees: torch.Tensor) -> torch.Tensor:
    """[depth]: the share of drafts whose first 1, 2, ... tokens are all the model's choice."""
    return agrees.int().cumprod(0).flatten(1).float().mean(1).cpu()


@torch.no_grad()
def agreement(heads: Heads, model: Any, texts: torch.Tensor, depth: int, first: int = 0) -> torch.Tensor:
    """[depth, N, n] bool: of drafts that begin after each position from ``first`` on in texts [N, T], which tokens are the model's
    choice; n = T - depth - 1 - first."""
    agrees = []
    for batch in texts.long().to(model.device).split(16):
        positions = torch.arange(first, batch.shape[1] - depth - 1, device=model.device)
        agrees.append(loss_of(heads, model, batch, last_hidden_states(model, batch), depth, positions)[1])
    return torch.cat(agrees, 1)


@torch.no_grad()
def last_hidden_states(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What the LM head is given for texts [B, T]: [B, T, D]."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def _texts(tokens: torch.Tensor, batch: int, length: int, random: torch.Generator) -> torch.Tensor:
    if tokens.ndim == 2:
        return tokens[torch.randint(len(tokens), (batch,), generator=random), :length].long()
    starts = torch.randint(len(tokens) - length + 1, (batch,), generator=random)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()]).long()


def _continued(model: Any, texts: torch.Tensor) -> torch.Tensor:
    prompts = texts[:, : texts.shape[1] // 4]
    new = texts.shape[1] - prompts.shape[1]
    return model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1
    )


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Evaluation mode, and no parameter of the model takes a gradient."""
    training, wanting = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in wanting:
            parameter.requires_grad_(True)


def optimizers_of(module: nn.Module, peak: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices but embeddings, Adam for the rest; every group's highest learning rate is its entry ``peak``."""
    matrices = [p for name, p in module.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in module.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(others, 3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"] * peak
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): matrices of one shape share a
    batched Newton-Schulz iteration in fp32."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    assert p.grad is not None
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
