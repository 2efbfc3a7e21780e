"""Attention transfer: train each layer's hybrid attention to reproduce its softmax attention on the same inputs.

The teacher is the model itself, on sequences no longer than its trained context; every layer learns from the softmax model's own hidden
states, not from the outputs of converted layers below it. LoLCATs (Zhang et al. 2024, https://arxiv.org/abs/2410.10254),
section 3.1, calls this attention transfer. Differs from it in the closed form, and in that a layer's loss is relative to the
size of its outputs, so that all layers have the same weight.

Shapes: H heads, V value dimension, N texts, T tokens.
"""

from __future__ import annotations

import math

import torch

from patchkit.training.student import AttentionInputs, Student

# Strength of the regularisation towards the identity, as a share of the features' own variance.
RIDGE = 1e-8


@torch.no_grad()
def errors(student: Student, texts: torch.Tensor) -> dict[int, float]:
    """RMS error of each layer's outputs on texts [N, T], relative to the RMS of the teacher's."""
    squares: dict[int, tuple[float, float]] = {}

    def watch(index: int, inputs: AttentionInputs, wanted: torch.Tensor) -> None:
        given = inputs.through(student.state.parts[index], student.state)
        wrong, size = squares.get(index, (0.0, 0.0))
        squares[index] = wrong + (given - wanted).square().sum().item(), size + wanted.square().sum().item()

    with student.watched(watch) as model:
        for text in texts:
            model(input_ids=text[None].to(model.device), use_cache=False)
    return {index: math.sqrt(wrong / size) for index, (wrong, size) in sorted(squares.items())}


@torch.no_grad()
def fit_readouts(student: Student, texts: torch.Tensor, ridge: float = RIDGE) -> None:
    """Set every layer's readout R [H, V, V] by ridge regression: minimise ``|y R - teacher|^2 + ridge |R - I|^2`` over texts [N, T].

    ``ridge`` is in units of the mean square of y; the sums are float64.
    """
    sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    parts = student.state.parts
    for part in parts.values():
        part.readout = None

    def watch(index: int, inputs: AttentionInputs, wanted: torch.Tensor) -> None:
        given, wanted = (x.transpose(0, 1).flatten(1, 2).double() for x in (inputs.through(parts[index], student.state), wanted))
        gram, cross = given.mT @ given, given.mT @ wanted
        sums[index] = (sums[index][0] + gram, sums[index][1] + cross) if index in sums else (gram, cross)

    with student.watched(watch) as model:
        for text in texts:
            model(input_ids=text[None].to(model.device), use_cache=False)
    for index, (gram, cross) in sums.items():
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        pull = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
        parts[index].add_readout()
        readout = parts[index].readout
        assert readout is not None
        readout.copy_(torch.linalg.solve(gram + pull, cross + pull))


def transfer_loss(student: Student, texts: torch.Tensor) -> float:
    """Mean over layers of the squared error on texts [N, T], relative to the mean square of the teacher's outputs.

    Its gradients are added to those of the parts.
    """
    parts, losses = student.state.parts, []

    def watch(index: int, inputs: AttentionInputs, wanted: torch.Tensor) -> None:
        # A layer's graph ends at its inputs, so each is gone before the next layer runs.
        with torch.enable_grad():
            loss = (inputs.through(parts[index], student.state) - wanted).square().mean() / wanted.square().mean()
            (loss / len(parts)).backward()
        losses.append(loss.item())

    with torch.no_grad(), student.watched(watch) as model:
        model(input_ids=texts.to(model.device), use_cache=False)
    return sum(losses) / len(losses)
