"""Muon for the matrices, Adam for the rest, and the learning-rate schedule."""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(gradient: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards U Vᵀ of each matrix: `[..., R, C]` float32 in, bfloat16 out.

        X ← aX + (bA + cA²)X,  A = XXᵀ,  X₀ = G/‖G‖

    Source: Muon, K. Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """
    a, b, c = COEFFICIENTS
    x: Tensor = gradient.reshape(-1, *gradient.shape[-2:])
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-2, -1).contiguous()
    for _ in range(5):
        gram = torch.bmm(x, x.transpose(-2, -1))
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    if tall:
        x = x.transpose(-2, -1)
    return x.reshape(gradient.shape)


class Optimizer:
    """Decoupled steps on float32 weights; `kinds` are those of `architecture.tensors`."""

    def __init__(self, weights: dict[str, Tensor], kinds: dict[str, str]) -> None:
        self.weights = weights
        self.kinds = kinds
        self.state: dict[str, Tensor] = {}
        for name, weight in weights.items():
            self.state[f"first.{name}"] = torch.zeros_like(weight, requires_grad=False)
            if kinds[name] != "matrix":
                self.state[f"second.{name}"] = torch.zeros_like(weight, requires_grad=False)

    @torch.no_grad()
    def step(self, step: int, scale: float) -> None:
        """One update; `scale` in [0, 1] multiplies every learning rate. Gradients are cleared."""
        for name, weight in self.weights.items():
            gradient = weight.grad
            if gradient is None:
                continue
            first = self.state[f"first.{name}"]
            if self.kinds[name] == "matrix":
                momentum = min(0.95, 0.85 + 0.1 * step / 300)
                first.lerp_(gradient, 1 - momentum)
                update = orthogonalised(gradient.lerp(first, momentum))
                rate = 0.02 * scale
                weight.mul_(1 - 0.1 * rate)
                weight.add_(update.float(), alpha=-rate * max(1.0, weight.shape[-2] / weight.shape[-1]) ** 0.5)
            else:
                second = self.state[f"second.{name}"]
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient.square(), 0.05)
                rate = {"embedding": 4e-3, "router": 4e-3}.get(self.kinds[name], 2e-3) * scale
                mean = first / (1 - 0.9 ** (step + 1))
                spread = (second / (1 - 0.95 ** (step + 1))).sqrt_().add_(1e-10)
                weight.addcdiv_(mean, spread, value=-rate)
            weight.grad = None


def schedule(step: int, steps: int, warmup: int = 60, decay: float = 0.4) -> float:
    """Warm-up, plateau, then a straight line to 2 %: while on the plateau, `steps` may still be changed."""
    start = steps * (1 - decay)
    if step < warmup:
        return (step + 1) / warmup
    if step < start:
        return 1.0
    return max(0.02, (steps - step) / (steps - start))
