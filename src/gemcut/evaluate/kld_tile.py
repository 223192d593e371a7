"""What two models say about the same positions: KL divergence, agreement, and the loss of each. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """Per position, for M models (the base first) and M − 1 candidates.

    nll: float64 [M, T], −ln p(next token), nats.   kl: float64 [M − 1, T], KL(base ‖ candidate), nats.
    same: bool [M − 1, T], both models' most likely token is the same.
    """

    nll: torch.Tensor
    kl: torch.Tensor
    same: torch.Tensor


def compare(logits: Sequence[torch.Tensor], target: torch.Tensor) -> Compared:
    """KL divergence, top-token agreement and next-token loss from logits.

        ℓ_m = log_softmax(logits_m);   kl[t] = Σ_v exp(ℓ_0[t,v])·(ℓ_0[t,v] − ℓ_m[t,v]);   nll[t] = −ℓ_m[t, target[t]]

    Equal logits give exactly 0. Rounding can put a true zero at about −1e-17; such values are set to 0.

    Args:
        logits: M tensors float32 [T, V], the base first. Consumed tile by tile: callers pass few positions.
        target: int64 [T], the next token.
    Returns:
        float64 throughout: log_softmax, products and the sum over V.
    Source:
        Kullback & Leibler 1951; the direction and "same top" are those of llama.cpp's perplexity tool, without its
        16-bit stored logits.
    """
    base = logits[0]
    top = base.argmax(-1)
    first = torch.log_softmax(base.double(), dim=-1)  # [T, V]
    weight = first.exp()
    losses = [_loss(first, target)]
    kls, sames = [], []
    for other in logits[1:]:
        second = torch.log_softmax(other.double(), dim=-1)
        losses.append(_loss(second, target))
        sames.append(other.argmax(-1) == top)
        kls.append(second.neg_().add_(first).mul_(weight).sum(-1).clamp_(min=0.0))
    rows = base.shape[0]
    return Compared(
        nll=torch.stack(losses),
        kl=torch.stack(kls) if kls else torch.empty((0, rows), dtype=torch.float64),
        same=torch.stack(sames) if sames else torch.empty((0, rows), dtype=torch.bool),
    )


def _loss(log_probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(-1, target.unsqueeze(-1)).squeeze(-1)
