"""Per expert, class and question: how often, how strongly and how loudly each routed expert spoke."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from gemcut.observe.batches import Batch, Layout
from gemcut.observe.columns import ColumnSums
from gemcut.types import EXPERT_SUMS, F32, F64, QUESTION_SUMS

Refuse = Callable[[str, int, int | None], NoReturn]
"""Called with (what is not finite, token in corpus order, expert)."""


class RoutedSums:
    """One layer's expert sums; the recorder of `stream.experts`. f = unweighted expert output, g = final top-k weight.

        n = Σ 1    g = Σ g    f = Σ ‖f‖    f2 = Σ ‖f‖²    gf = Σ g‖f‖    gf2 = Σ (g‖f‖)²    gf_rel = Σ g‖f‖/‖y‖
        easy = Σ (1 − cos(r, r + y))·g‖f‖      f_max = max |component of f|

    y [T, H] is the experts' summed output, r [T, H] the residual that enters the branch; where y = 0, gf_rel adds 0.
    Norms and dot products in float32, everything summed in float64, item by item.
    Source: REAP arXiv:2510.13999 (gf), arXiv:2606.15716 (f, f2), EASY-EP arXiv:2504.06792 (easy).
    """

    def __init__(
        self,
        layout: Layout,
        widths: tuple[int, int, int],
        device: torch.device,
        scratch: torch.Tensor,
        refuse: Refuse,
    ) -> None:
        """widths: (E, H, I)."""
        experts, hidden, inner = widths
        self.layout, self.experts = layout, experts
        self._refuse = refuse
        classes, questions = len(layout.corpus.classes), len(layout.corpus.items)
        self.by_class: dict[str, F64] = {name: np.zeros((classes, experts)) for name in EXPERT_SUMS}
        self.f_max: F64 = np.zeros((classes, experts))
        self.by_question: dict[str, F32] = {name: np.zeros((questions, experts), np.float32) for name in QUESTION_SUMS}
        self.gate_up = ColumnSums(hidden, experts, device, scratch)
        self.down = ColumnSums(inner, experts, device, scratch)
        self._batch: Batch | None = None
        self._residual = self._sizes = self._peaks = torch.empty(0)
        self._pairs: tuple[NDArray[np.int64], NDArray[np.int64], F64] | None = None

    def start(self, batch: Batch) -> None:
        """The batch that the next forward call runs."""
        self._batch = batch

    def residual(self, residual: torch.Tensor) -> None:
        """r [T, H]: what enters the router."""
        self._residual = residual

    # ------------------------------------------------------------ called by stream.experts

    def begin(self, inputs: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> None:
        del inputs
        self._sizes = torch.empty(len(token), dtype=torch.float32, device=token.device)
        self._peaks = torch.empty_like(self._sizes)
        self._pairs = (token.cpu().numpy(), expert.cpu().numpy(), gate.double().cpu().numpy())

    def inputs(self, expert: int, rows: slice, x: torch.Tensor) -> None:
        del rows
        assert self._batch is not None
        self.gate_up.add(x, self._batch.split, expert)

    def inner(self, expert: int, rows: slice, h: torch.Tensor) -> None:
        del rows
        assert self._batch is not None
        self.down.add(h, self._batch.split, expert)

    def outputs(self, expert: int, rows: slice, f: torch.Tensor) -> None:
        del expert
        torch.linalg.vector_norm(f, dim=-1, out=self._sizes[rows])
        self._peaks[rows] = torch.maximum(f.amax(-1), -f.amin(-1))

    def end(self, combined: torch.Tensor) -> None:
        assert self._batch is not None
        assert self._pairs is not None
        token, expert, gate = self._pairs
        size = self._sizes.double().cpu().numpy()
        self._check(size, token, expert)
        loud, turn = self._per_token(combined)
        if not np.isfinite(loud[token]).all() or not np.isfinite(turn[token]).all():
            at = int(np.argmax(~np.isfinite(loud[token] + turn[token])))
            self._refuse("the experts' summed output", int(self._batch.token[token[at]]), None)
        weighted = gate * size
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.where(loud[token] > 0, weighted / loud[token], 0.0)
        values = {
            "n": None, "g": gate, "f": size, "f2": size * size, "gf": weighted, "gf2": weighted * weighted,
            "gf_rel": relative, "easy": turn[token] * weighted,
        }  # fmt: skip
        self._add(token, expert, values)
        peaks = self._peaks.double().cpu().numpy()
        classes = self.layout.class_of[np.asarray(self._batch.items)]
        np.maximum.at(self.f_max, (classes[self._batch.row[token]], expert), peaks)
        self._residual = self._sizes = self._peaks = torch.empty(0)
        self._pairs = None

    # ------------------------------------------------------------

    def _add(
        self, token: NDArray[np.int64], expert: NDArray[np.int64], values: dict[str, NDArray[np.float64] | None]
    ) -> None:
        assert self._batch is not None
        items = np.asarray(self._batch.items)
        classes = self.layout.class_of[items]
        key = self._batch.row[token] * self.experts + expert
        cells = len(items) * self.experts
        for name, value in values.items():
            sums = np.bincount(key, weights=value, minlength=cells).astype(np.float64).reshape(len(items), -1)  # [B, E]
            np.add.at(self.by_class[name], classes, sums)
            if name in self.by_question:
                self.by_question[name][items] = sums

    def _per_token(self, combined: torch.Tensor) -> tuple[F64, F64]:
        """‖y‖ and 1 − cos(r, r + y) for every token, float64 [T].

        sin² from Lagrange's identity, ‖r‖²‖y‖² − (r·y)², which loses no digits where the branch turns r only a little.
        """
        rr, yy, ry = (np.zeros(len(combined)) for _ in range(3))
        for first in range(0, len(combined), 128):
            at = slice(first, first + 128)
            r, y = self._residual[at].float(), combined[at].float()
            yy[at] = torch.linalg.vector_norm(y, dim=-1).double().cpu().numpy()
            rr[at] = torch.linalg.vector_norm(r, dim=-1).double().cpu().numpy()
            ry[at] = (r * y).sum(-1).double().cpu().numpy()
        loud = yy.copy()
        rr, yy = rr * rr, yy * yy
        ss = np.maximum(rr + 2 * ry + yy, 0.0)  # ‖r + y‖²
        with np.errstate(divide="ignore", invalid="ignore"):
            cos = np.where(rr * ss > 0, (rr + ry) / np.sqrt(rr * ss), 1.0)
            sin2 = np.where(rr * ss > 0, np.maximum(rr * yy - ry * ry, 0.0) / (rr * ss), 0.0)
            turn = np.where(cos > 0, sin2 / (1.0 + cos), 1.0 - cos)
        return loud, turn

    def _check(self, size: F64, token: NDArray[np.int64], expert: NDArray[np.int64]) -> None:
        if not np.isfinite(size).all():
            assert self._batch is not None
            at = int(np.argmax(~np.isfinite(size)))
            self._refuse("an expert's output", int(self._batch.token[token[at]]), int(expert[at]))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything under the names that the statistics file has."""
        out = {f"experts.by_class.{name}": torch.from_numpy(value) for name, value in self.by_class.items()}
        out["experts.by_class.f_max"] = torch.from_numpy(self.f_max)
        out |= {f"experts.by_question.{name}": torch.from_numpy(v) for name, v in self.by_question.items()}
        return out | self.gate_up.tensors("experts.gate_up_proj") | self.down.tensors("experts.down_proj")
