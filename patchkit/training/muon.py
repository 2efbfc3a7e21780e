"""Muon: momentum with orthogonalised updates, for matrices."""

from __future__ import annotations

import torch
from torch import nn


def optimizers_of(module: nn.Module, peak: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for all matrices except embeddings, Adam for the rest; every group's highest learning rate is its entry ``peak``."""
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
    """Muon: orthogonalised momentum (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

    Matrices of one shape share a batched Newton-Schulz iteration in fp32.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters from their gradients."""
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
    """Approximate the nearest semi-orthogonal matrix of each of ``x`` [N, rows, columns] by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x
