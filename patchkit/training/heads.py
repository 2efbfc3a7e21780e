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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from patchkit.anatomy.layers import decoder_layers
from patchkit.errors import PatchError
from patchkit.speculation.heads import EagleHead, Heads, MedusaHeads, TrainedFor
from patchkit.training.heads_loss import accepted_by_position, hidden_states, layers_of, loss_of
from patchkit.training.muon import optimizers_of
from patchkit.views import evaluating, frozen

# Share of positions that are scored, sampled for each step: logits over the vocabulary cost more than EAGLE's layer.
_SCORED = {"medusa": 1.0, "eagle": 0.25, "eagle3": 0.25}
_ALONE = 0.4  # share of EAGLE's steps, the first ones, that continue the model's features only, which costs less
_SECONDS_BETWEEN_CHECKPOINTS = 60.0
# With ``minutes``, this many steps are timed first; until then the run has practically no end.
_TIMED_STEPS, _UNTIMED_STEPS = 8, 10**9


def train_heads(
    model: Any,
    tokens: torch.Tensor,
    kind: Literal["medusa", "eagle", "eagle3"] = "eagle",
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
    """Train draft heads for ``model``, which is not changed.

    Args:
        kind: "medusa"; "eagle", which continues the last hidden states; or "eagle3", which continues the outputs of a low, a middle and a
            high layer, and is not asked to reproduce hidden states (Li et al. 2025, https://arxiv.org/abs/2503.01840).
        tokens: one sequence [n] int, from which pieces are cut at random, or sequences [N, n >= length].
        depth: Medusa's number of heads; for EAGLE, the number of its own consecutive features that it learns to continue from.
        batch, length: sequences per step, and tokens per sequence.
        on_policy: share of steps on the model's own greedy continuations of the first quarter of each sequence. Heads are used on such
            text; these steps take many times longer.
        peak: highest learning rate, in units of 0.02 for Muon and 0.003 for Adam.
        checkpoint: a file that is written every minute, at the end, and at SIGINT or SIGTERM; training resumes from it if it exists.
        minutes: duration of training instead of ``steps``, whose number then follows from the time of the first few.
        progress: whether to show a bar, with the loss and, for each drafted position, how often all drafts so far are the model's choice.

    Raises:
        UnsupportedModel: the model has no LM head or embeddings that heads could share.
        PatchError: options or tokens that cannot be used, or a checkpoint of another run.
        KeyboardInterrupt: SIGINT or SIGTERM was received; the current step is finished first.
    """
    if kind not in _SCORED:
        raise PatchError(f"there are no {kind!r} heads: use kind='medusa', kind='eagle' or kind='eagle3'")
    if min(steps, depth, batch) < 1 or length < depth + 3 or not 0 <= on_policy <= 1:
        raise PatchError("steps, depth and batch must be at least 1, length at least depth + 3, and on_policy between 0 and 1")
    if tokens.shape[-1] < length:
        raise PatchError(f"{tokens.shape[-1]} tokens of text are fewer than one piece of {length}: give more text, or a smaller length")
    facts = TrainedFor.of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads: Heads
        if kind == "medusa":
            heads = MedusaHeads(facts.hidden_size, depth)
        else:
            heads = EagleHead(facts.hidden_size, facts.embedding_size, layers=three_layers(model) if kind == "eagle3" else None)
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
        # Checkpoints of a time when it was not kept have the LM head's fingerprint alone.
        known = TrainedFor(**saved["trained_for"]) if "trained_for" in saved else replace(facts, samples={})
        known.warn_if_partial(f"the checkpoint {checkpoint}")
        other = known.other_weight(facts)
        if other is not None:
            raise PatchError(f"{checkpoint} belongs to a model with another {other}: delete it, or name another checkpoint")
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
            saved["trained_for"] = asdict(facts)
            torch.save(saved, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)

    with evaluating(model), frozen(model), _noted_signals() as interrupted:
        while step < steps:
            begun = time.monotonic()
            random = torch.Generator().manual_seed(1_000_003 * seed + step)
            texts = _texts(tokens, batch, length, random).to(model.device)
            if torch.rand((), generator=random) < on_policy:
                texts = _continued(model, texts)
            hidden = hidden_states(model, texts, layers_of(heads))
            if step == 0 and isinstance(heads, EagleHead):  # start at the features' own mean and spread
                last = hidden[..., : facts.hidden_size].float().flatten(0, 1)
                heads.norm_out.weight.data.copy_(last.std(0))
                heads.norm_out.bias.data.copy_(last.mean(0))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))
            # While steps are being timed, both kinds alternate.
            alone = step % 2 == 0 if steps == _UNTIMED_STEPS else step < _ALONE * steps
            now = 1 if kind != "medusa" and alone else depth
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
                kept = "" if checkpoint is None else f"; {checkpoint} resumes from there"
                raise KeyboardInterrupt(f"stopped after {step} steps of training{kept}")
    bar.close()
    return heads.eval().requires_grad_(False)


def three_layers(model: Any) -> tuple[int, ...]:
    """Return the indices of a low, a middle and a high decoder layer, whose outputs EAGLE-3's heads read; fewer of a model with fewer."""
    depth = len(decoder_layers(model))
    high = depth - 3 if depth >= 8 else depth - 1
    return tuple(sorted({min(2, (depth - 1) // 3), depth // 2, high}))


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Record SIGINT and SIGTERM within this context instead of acting on them, so that the current step can finish."""
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
