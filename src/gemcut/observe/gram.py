"""The Gram matrix of the concatenated head outputs, weighted as the norm behind the branch weighs them."""

from __future__ import annotations

import torch

_STAGED_ROWS = 2048
_BLOCK = 512
_ADDED_ROWS = 256


class GramSum:
    """For inputs x [T, d] of o_proj and its outputs y [T, H], over a strided subset of tokens, per split s:

        w_t = 1 / (mean(y_t²) + eps)        the RMSNorm behind o_proj divides by exactly this
        g[s] = Σ_t w_t x_t x_tᵀ  [d, d]     x[s] = Σ_t w_t x_t  [d]     w[s] = Σ_t w_t     n[s] = Σ_t 1

    float32 products over 2048 rows, added up in float64. Only the upper block triangle is computed.
    """

    def __init__(self, width: int, splits: int, eps: float, device: torch.device | None = None) -> None:
        self.splits, self.eps = splits, eps
        # the upper triangle of blocks only: the whole matrix, with its mirror, exists when the layer's weights do not
        self._edges = [(i, min(i + _BLOCK, width)) for i in range(0, width, _BLOCK)]
        self._blocks = [
            {
                (i, j): torch.zeros((self._size(i), self._size(j)), dtype=torch.float64, device=device)
                for i in range(len(self._edges))
                for j in range(i, len(self._edges))
            }
            for _ in range(splits)
        ]
        self._width = width
        self._x = torch.zeros((splits, width), dtype=torch.float64, device=device)
        self._w = torch.zeros(splits, dtype=torch.float64, device=device)
        self._n = torch.zeros(splits, dtype=torch.float64)
        self._rows = [torch.empty((_STAGED_ROWS, width), dtype=torch.float32, device=device) for _ in range(splits)]
        self._filled = [0] * splits

    def add(self, x: torch.Tensor, y: torch.Tensor, split: int) -> None:
        """Rows x [n, d] and y [n, H] of one split."""
        for part, out in zip(x.split(_ADDED_ROWS), y.split(_ADDED_ROWS), strict=True):
            self._add(part.float(), out.float(), split % self.splits)

    def _add(self, rows: torch.Tensor, out: torch.Tensor, s: int) -> None:
        weight = 1.0 / (out.square().mean(-1) + self.eps)  # [n]
        self._w[s] += weight.double().sum()
        self._n[s] += len(rows)
        self._x[s] += weight @ rows
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
        for (i, j), block in self._blocks[s].items():
            left, right = self._edges[i], self._edges[j]
            block += rows[:, left[0] : left[1]].t() @ rows[:, right[0] : right[1]]

    def _size(self, i: int) -> int:
        return self._edges[i][1] - self._edges[i][0]

    def finite(self) -> bool:
        """Whether every sum so far is a number."""
        return bool(torch.isfinite(self._w).all() and torch.isfinite(self._x).all())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """`gram.<name>.{g, x, w, n}`, float64. Ends the sum: what is staged is added and the triangle mirrored."""
        whole = torch.empty((self.splits, self._width, self._width), dtype=torch.float64)
        for s in range(self.splits):
            if self._filled[s]:
                self._flush(s)
            while self._blocks[s]:
                (i, j), block = self._blocks[s].popitem()
                rows, columns = slice(*self._edges[i]), slice(*self._edges[j])
                if i == j:
                    block = (block + block.t()) / 2
                whole[s, rows, columns] = block
                whole[s, columns, rows] = block.t()
        self._rows.clear()
        out = {"g": whole, "x": self._x.cpu(), "w": self._w.cpu(), "n": self._n}
        return {f"gram.{name}.{key}": value for key, value in out.items()}
