"""The down_proj of the experts that stay, refitted one after the other to what the dense layer's experts gave.

p_t = Σ_k a_kt W_k h_kt is what the kept experts add to token t, a_kt the router's weight after the cut and h_kt what
enters the projection of expert k. One expert at a time is fitted to what all others leave open,

    W'_k = argmin Σ_t w_t‖y_t − (p_t − a_kt W_k h_kt) − a_kt W h_kt‖² + λ‖W − W_k‖²

in ascending order, each behind the ones before (block Gauss-Seidel): all at once would answer for the same error as
often as a token has experts. Residuals are those after the best common factor, as of scales (see `routed`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.stream.hidden import Slabs
from gemcut.surgery.heal.layer import Fitted
from gemcut.surgery.heal.routed import Recorder
from gemcut.surgery.heal.settings import FIT, HELD_OUT, INNER, SAMPLES_PER_COLUMN, Job
from gemcut.surgery.heal.solve import CHUNK_ROWS, Moments, refit
from gemcut.surgery.heal.states import Layout
from gemcut.surgery.heal.unseen import Residuals, by_class


class Inner(Recorder):
    """Keeps what enters down_proj of every routed pair: h [P, I], token, expert and gate [P], in order of experts."""

    h: torch.Tensor
    token: torch.Tensor
    expert: torch.Tensor
    gate: torch.Tensor

    def begin(self, inputs: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> None:
        self.token, self.expert, self.gate = token.clone(), expert.clone(), gate.clone()
        self.h = torch.empty(0)

    def inner(self, expert: int, rows: slice, h: torch.Tensor) -> None:
        if not self.h.numel():
            self.h = torch.empty((len(self.token), h.shape[-1]), dtype=h.dtype, device=h.device)
        self.h[rows] = h


class DownRows:
    """Every token and routed pair of one layer, in nameless files of `folder`: they are needed once for each expert.

    Args:
        top_k: experts of a token; inner: I; dtype: of h.
    """

    def __init__(
        self, layout: Layout, top_k: int, hidden: int, inner: int, dtype: torch.dtype, eps: float, folder: Path
    ) -> None:
        tokens = sum(len(row.ids) for row in layout.rows)
        slabs = Slabs(0, folder)
        self.layout, self.eps = layout, eps
        self.h = slabs.make(tokens * top_k, inner, dtype)
        self.target = slabs.make(tokens, hidden, torch.float32)  # √w y
        self.given = slabs.make(tokens, hidden, torch.float32)  # √w p
        self._pair_token = torch.empty(tokens * top_k, dtype=torch.int64)
        self._pair_expert = torch.empty(tokens * top_k, dtype=torch.int64)
        self._pair_factor = torch.empty(tokens * top_k, dtype=torch.float64)  # a √w
        self.part = torch.empty(tokens, dtype=torch.int64)
        self.cls = torch.empty(tokens, dtype=torch.int64)
        self.tokens = self.pairs = 0
        self.finite = True

    def add(self, k: int, seen: Inner, y: torch.Tensor) -> None:
        """Batch k, padding included: pairs of the cut layer, y [B·S, H] of the dense one."""
        y = y.cpu()
        row_of = torch.full((len(y),), -1, dtype=torch.int64)
        root = (y.double().square().mean(-1) + self.eps).rsqrt()
        for part in self.layout.parts:
            at = self.layout.chosen(k, part)
            here = slice(self.tokens, self.tokens + len(at))
            self.tokens = here.stop
            row_of[at] = torch.arange(here.start, here.stop)
            self.part[here], self.cls[here] = part, self.layout.class_of(k, part)
            self.target[here] = (y[at].double() * root[at, None]).float()
        token = seen.token.cpu()
        real = row_of[token] >= 0
        here = slice(self.pairs, self.pairs + int(real.sum()))
        self.pairs = here.stop
        self.h[here] = seen.h.cpu()[real]
        self.finite = self.finite and bool(torch.isfinite(seen.h).all() and torch.isfinite(y).all())
        self._pair_token[here], self._pair_expert[here] = row_of[token][real], seen.expert.cpu()[real]
        self._pair_factor[here] = seen.gate.cpu()[real].double() * root[token][real]

    def restart(self, experts: Sequence[int], weight: torch.Tensor) -> None:
        """`given` is what the kept experts add with weights [E, H, I]."""
        self.given.zero_()
        for expert in experts:
            for rows, x in self.inputs(expert):
                self.given[rows] += (x @ weight[expert].double().t()).float()

    def inputs(self, expert: int, parts: Sequence[int] | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens [n] of one expert and a √w h [n, I] float64, some at a time; of these parts of the corpus only."""
        pairs = torch.nonzero(self._pair_expert[: self.pairs] == expert)[:, 0]
        if parts is not None:
            pairs = pairs[torch.isin(self.part[self._pair_token[pairs]], torch.tensor(list(parts)))]
        for first in range(0, len(pairs), CHUNK_ROWS):
            at = pairs[first : first + CHUNK_ROWS]
            yield self._pair_token[at], self.h[at].double() * self._pair_factor[at, None]

    def measure(self, parts: Sequence[int]) -> Residuals:
        """min_α sqrt(Σ‖αp − y‖² / Σ‖y‖²), weighted, of what is given now."""
        sums = np.zeros((3, len(self.layout.classes)))  # p·y, p·p, y·y
        chosen = torch.nonzero(torch.isin(self.part[: self.tokens], torch.tensor(list(parts))))[:, 0]
        for first in range(0, len(chosen), CHUNK_ROWS):
            at = chosen[first : first + CHUNK_ROWS]
            p, y, of = self.given[at].double(), self.target[at].double(), self.cls[at].numpy()
            for row, values in enumerate((p * y, p * p, y * y)):
                sums[row] += np.bincount(of, values.sum(-1).numpy(), minlength=sums.shape[1])
        there = [i for i in range(sums.shape[1]) if sums[2, i] > 0]
        return Residuals(_apart(sums.sum(1)), {self.layout.classes[i]: _apart(sums[:, i]) for i in there})

    def samples(self, part: int) -> dict[str, int]:
        """Tokens of a part by class."""
        counts = torch.bincount(self.cls[: self.tokens][self.part[: self.tokens] == part]).tolist()
        return {self.layout.classes[i]: n for i, n in enumerate(counts) if n}


def _apart(sums: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    along, given, wanted = (float(x) for x in sums)
    return math.sqrt(max(1.0 - along * along / (given * wanted), 0.0)) if given > 0 and wanted > 0 else 1.0


def fit_down(job: Job, rows: DownRows, weight: torch.Tensor, ridges: Sequence[float]) -> Fitted:
    """Choose the ridge on the inner split, refit on everything but what is held out, round, and measure.

    An expert with fewer than SAMPLES_PER_COLUMN tokens for each of its I columns keeps its weights.

    Args:
        weight: [E, H, I] as it is stored.
    Returns:
        Zeros where an expert goes; `lam` and `condition` are the largest of all experts.
    Raises:
        QualityError: rows or new weights are not finite, or no system can be solved; names the layer.
    """
    where = f"layer {job.layer}, {job.tensor}"
    if not rows.finite:
        raise QualityError("the rows of a heal are not finite", where=where, hint="compute in float32")
    fitted_on, ridge = [FIT, INNER], ridges[0]
    tried: dict[float, float] = {}
    if len(ridges) > 1:
        for one in ridges:
            _sweep(job, rows, weight.clone(), [FIT], one, where)
            tried[one] = rows.measure([INNER]).whole
        ridge = min(tried, key=lambda one: (tried[one], -one))
    rows.restart(job.kept, weight)
    fit_before, before = rows.measure(fitted_on).whole, rows.measure([HELD_OUT])
    new = weight.clone()
    lam, condition = _sweep(job, rows, new, fitted_on, ridge, where)
    if not bool(torch.isfinite(new).all()):
        raise QualityError("healed weights are not finite", where=where, got=f"{new.dtype}", hint="raise the ridge")
    after = rows.measure([HELD_OUT])
    used = after.whole < before.whole
    whole = torch.zeros_like(weight)
    whole[list(job.kept)] = (new if used else weight)[list(job.kept)]
    return Fitted(
        weight=whole,
        used=used,
        ridge=ridge,
        lam=lam,
        ridge_residuals={f"{one:g}": residual for one, residual in tried.items()},
        condition=condition,
        fit_before=fit_before,
        fit_after=rows.measure(fitted_on).whole,
        held_out_before=before.whole,
        held_out_after=after.whole,
        by_class=by_class(before, after, rows.samples(HELD_OUT)),
    )


def _sweep(
    job: Job, rows: DownRows, weight: torch.Tensor, parts: Sequence[int], ridge: float, where: str
) -> tuple[float, float]:
    """Every kept expert once, from what is stored; `weight` becomes the new ones, rounded. Largest λ and condition."""
    rows.restart(job.kept, weight)
    lam = condition = 0.0
    for expert in job.kept:
        start = weight[expert].double()
        moments = Moments.zeros(*start.shape)
        for at, x in rows.inputs(expert, parts):
            open_ = rows.target[at].double() - rows.given[at].double() + x @ start.t()
            moments.add(x, torch.ones(len(x), dtype=torch.float64), open_)
        if moments.n < SAMPLES_PER_COLUMN * start.shape[1]:
            continue
        new = refit(moments, start, ridge, f"{where}, expert {expert}")
        weight[expert] = new.weight.float().to(weight.dtype)
        moved = (weight[expert].double() - start).t()
        for at, x in rows.inputs(expert):
            rows.given[at] += (x @ moved).float()
        lam, condition = max(lam, new.lam), max(condition, new.condition)
    return lam, condition


def token_bytes(base: Checkpoint, jobs: Iterable[Job], item: int) -> int:
    """Disk for each token of `DownRows`, of the widest layer; other heals need none.

    Args:
        item: bytes of one number as it was computed.
    """
    top_k = base.family.top_k(base.text_config)
    shapes = [base.ref(job.tensor).shape for job in jobs if job.kind == "down_proj"]
    return max((top_k * inner * item + 8 * hidden for _, hidden, inner in shapes), default=0)


def refuse_few_routed(base: Checkpoint, jobs: Iterable[Job], samples: int, tokens: int) -> None:
    """The rank guard of `settings.refuse_few_samples` for an expert that is asked as often as the others.

    Args:
        samples: tokens that are fitted on; tokens: of the whole corpus.
    Raises:
        UsageError: it would have fewer than SAMPLES_PER_COLUMN tokens for each column of its down_proj.
    """
    top_k = base.family.top_k(base.text_config)
    for job in jobs:
        inner = base.ref(job.tensor).shape[2]
        wanted = -(-SAMPLES_PER_COLUMN * inner * len(job.kept) // top_k)
        if samples < wanted:
            raise UsageError(
                "too few calibration tokens for a heal of down_proj",
                where=f"layer {job.layer}: {len(job.kept)} kept experts of {inner} columns, {top_k} for each token",
                got=f"{samples} tokens to fit on, of {tokens}",
                wanted=f"at least {wanted} tokens, {SAMPLES_PER_COLUMN} for each column of an average expert",
                hint="give more text, or refit the scales alone",
            )
