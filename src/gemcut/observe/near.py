"""The experts that were almost chosen: who would inherit whose tokens."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gemcut.observe.batches import Batch


class NearSums:
    """Router logits z [T, E] beside the top-k that was taken. Runners-up rank k+1 … min(2k, E) by logit.

    count[e]  = Σ_t [e is a runner-up]          margin[e] = Σ_t (z of the k-th − z_e), over the same tokens
    heir[i,j] = Σ_t [i is routed, j is the first runner-up]
    sample_token [n], sample_index, sample_logit [n, min(2k, E)]: raw logits of the tokens in `chosen`
    """

    def __init__(self, experts: int, top_k: int, chosen: NDArray[np.bool_]) -> None:
        self.experts, self.top_k = experts, top_k
        self.runners = min(top_k, experts - top_k)
        self.chosen = chosen
        self.count = np.zeros(experts)
        self.margin = np.zeros(experts)
        self.heir = np.zeros((experts, experts))
        self._sample: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]] = []

    def add(self, batch: Batch, logits: torch.Tensor, routed: torch.Tensor) -> None:
        """logits [T, E], routed [T, k] (expert indices, best first), padding included."""
        token = batch.token
        if batch.live is not None:
            live = batch.live.to(logits.device)
            logits, routed, token = logits[live], routed[live], token[batch.live.numpy()]
        logits = logits.float()
        taken = logits.gather(1, routed)
        masked = logits.scatter(1, routed, float("-inf"))
        rest = torch.topk(masked, self.runners, dim=1)
        if self.runners:
            near = rest.indices.cpu().numpy()
            gap = (taken.amin(1, keepdim=True) - rest.values).double().cpu().numpy()
            self.count += np.bincount(near.ravel(), minlength=self.experts)
            self.margin += np.bincount(near.ravel(), weights=gap.ravel(), minlength=self.experts)
            pairs = routed.cpu().numpy() * self.experts + near[:, :1]
            self.heir += np.bincount(pairs.ravel(), minlength=self.experts**2).reshape(self.heir.shape)
        kept = self.chosen[token]
        if kept.any():
            at = torch.from_numpy(kept).to(logits.device)
            index = torch.cat([routed[at], rest.indices[at]], 1).to(torch.int32).cpu().numpy()
            value = torch.cat([taken[at], rest.values[at]], 1).cpu().numpy()
            self._sample.append((token[kept], index, value))

    def tensors(self) -> dict[str, torch.Tensor]:
        """`near.*`; the sample in token order."""
        wide = self.top_k + self.runners
        token = np.concatenate([np.zeros(0, np.int64), *(s[0] for s in self._sample)])
        index = np.concatenate([np.zeros((0, wide), np.int32), *(s[1] for s in self._sample)])
        value = np.concatenate([np.zeros((0, wide), np.float32), *(s[2] for s in self._sample)])
        order = np.argsort(token)
        out = {
            "count": self.count, "margin": self.margin, "heir": self.heir,
            "sample_token": token[order], "sample_index": index[order], "sample_logit": value[order],
        }  # fmt: skip
        return {f"near.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in out.items()}
