"""The Gram matrix of the concatenated head outputs, weighted as the norm behind the branch weighs them."""

from __future__ import annotations

import torch

_STAGED_ROWS = 2048
_BLOCK = 512


class GramSum:
    """For inputs x [T, d] of o_proj and its outputs y [T, H], over a strided subset of tokens, per split s:

        w_t = 1 / (mean(y_t²) + eps)        the RMSNorm behind o_proj divides by exactly this
        g[s] = Σ_t w_t x_t x_tᵀ  [d, d]     x[s] = Σ_t w_t x_t  [d]     w[s] = Σ_t w_t     n[s] = Σ_t 1

    float32 products over 2048 rows, added up in float64. Only the upper block triangle is computed.
    """

    def __init__(self, width: int, splits: int, eps: float, device: torch.device | None = None) -> None:
        self.splits, self.eps = splits, eps
        self._g = torch.zeros((splits, width, width), dtype=torch.float64, device=device)
        self._x = torch.zeros((splits, width), dtype=torch.float64, device=device)
        self._w = torch.zeros(splits, dtype=torch.float64, device=device)
        self._n = torch.zeros(splits, dtype=torch.float64)
        self._rows = [torch.empty((_STAGED_ROWS, width), dtype=torch.float32, device=device) for _ in range(splits)]
        self._filled = [0] * splits

    def add(self, x: torch.Tensor, y: torch.Tensor, split: int) -> None:
        """Rows x [n, d] and y [n, H] of one split."""
        s = split % self.splits
        weight = 1.0 / (y.float().square().mean(-1) + self.eps)  # [n]
        rows = x.float()
        self._w[s] += weight.double().sum()
        self._n[s] += len(x)
        self._x[s] += (weight.double()[None, :] @ rows.double())[0]
        rows = rows * weight.sqrt()[:, None]
        while len(rows):
            at = self._filled[s]
            part = rows[: _STAGED_ROWS - at]
            self._rows[s][at : at + len(part)] = part
            self._filled[s] += len(part)
            rows = rows[len(part) :]
            if self._filled[s] == _STAGED_ROWS:
                self._flush(s)

    def _flush(self, s: int) -> None:
        rows = self._rows[s][: self._filled[s]]
        self._filled[s] = 0
        width = rows.shape[1]
        for i in range(0, width, _BLOCK):
            left = rows[:, i : i + _BLOCK].t()
            for j in range(i, width, _BLOCK):
                self._g[s, i : i + _BLOCK, j : j + _BLOCK] += left @ rows[:, j : j + _BLOCK]

    def finite(self) -> bool:
        """Whether every sum so far is a number."""
        return bool(torch.isfinite(self._w).all() and torch.isfinite(self._x).all())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """`gram.<name>.{g, x, w, n}`, float64. Ends the sum: what is staged is added and the triangle mirrored."""
        for s in range(self.splits):
            if self._filled[s]:
                self._flush(s)
            width = self._g.shape[1]
            for i in range(0, width, _BLOCK):
                for j in range(i, width, _BLOCK):
                    block = self._g[s, i : i + _BLOCK, j : j + _BLOCK]
                    if i == j:
                        block.copy_((block + block.t()) / 2)
                    else:
                        self._g[s, j : j + _BLOCK, i : i + _BLOCK] = block.t()
        out = {"g": self._g.cpu(), "x": self._x.cpu(), "w": self._w.cpu(), "n": self._n}
        return {f"gram.{name}.{key}": value for key, value in out.items()}
