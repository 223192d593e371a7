"""The routed experts of one layer: what each kept one adds to every token, and the refit of their scales.

The norm behind the experts' sum divides by its size, so that a common factor of all scales changes nothing: residuals
here are those after the best common factor, or a heal could win by shrinking every scale alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from gemcut.stream.experts import attach
from gemcut.surgery.heal.layer import Fitted, fit_layer, wide_device
from gemcut.surgery.heal.settings import FIT, HELD_OUT, INNER, HealSettings, Job
from gemcut.surgery.heal.solve import Moments
from gemcut.surgery.heal.states import Layout
from gemcut.surgery.heal.unseen import ClassSums

_CHUNK_TOKENS = 256  # their contributions in float64 at a time
# Where a decoder layer keeps what is asked (see the family's file).
ROUTER, ROUTER_LOGITS, EXPERTS = "router", "router.proj", "experts"


class ScaleMoments(Moments):
    """Sums of a fit of scales s [K] of K kept experts: ŷ_t = Σ_k s_k φ_{k,t}.

        g = Σ_t w_t φ_{k,t}·φ_{l,t} [K, K]    c = Σ_t w_t y_t·φ_{k,t} [1, K]    tt = Σ_t w_t ‖y_t‖²

    so that Σ_t w_t‖y_t − ŷ_t‖² = tt − 2 s cᵀ + s g sᵀ, as in `Moments` with one row.
    """

    def add_routed(self, phi: torch.Tensor, index: torch.Tensor, y: torch.Tensor, eps: float) -> None:
        """Tokens of one batch. w_t = 1 / (mean(y_t²) + eps), as the norm behind the sum has it.

        Args:
            phi: [n, k, H], the unscaled contributions of the k experts that a token is routed to.
            index: int64 [n, k], which of the K kept experts they are.
            y: [n, H].
        """
        count = len(self.g)
        for first in range(0, len(phi), _CHUNK_TOKENS):
            part = slice(first, first + _CHUNK_TOKENS)
            target = y[part].to(self.g.device, torch.float64)
            root = (target.square().mean(-1, keepdim=True) + eps).rsqrt()  # √w [n, 1]
            target = target * root
            rows = phi[part].to(self.g.device, torch.float64) * root[:, :, None]
            at = index[part].cpu().numpy()
            pairs = (at[:, :, None] * count + at[:, None, :]).ravel()
            gram, cross = rows @ rows.transpose(1, 2), (rows @ target[:, :, None])[:, :, 0]
            # bincount adds in order: a device's scatter would not give the same bits twice
            self.g += _summed(pairs, gram, count * count).reshape(count, count).to(self.g.device)
            self.c += _summed(at.ravel(), cross, count).to(self.c.device)
            self.tt += float(target.square().sum())
            self.n += len(rows)

    def residual(self, weight: torch.Tensor) -> float:
        """min_α sqrt(Σ w‖αŷ − y‖² / Σ w‖y‖²) = sqrt(1 − (s cᵀ)² / (s g sᵀ · tt)) of scales [1, K]. 0 is perfect."""
        wide = weight.to(self.g.device, torch.float64)
        size, along = float(((wide @ self.g) * wide).sum()), float((wide * self.c).sum())
        if self.tt <= 0:
            return 0.0
        return math.sqrt(max(1.0 - along * along / (size * self.tt), 0.0)) if size > 0 else 1.0


def _summed(at: np.ndarray[Any, np.dtype[np.int64]], values: torch.Tensor, count: int) -> torch.Tensor:
    return torch.from_numpy(np.bincount(at, weights=values.cpu().numpy().ravel(), minlength=count))


class Recorder:
    """Nothing asked; see `stream.experts.ExpertRecorder`."""

    def begin(self, inputs: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> None:
        pass

    def inputs(self, expert: int, rows: slice, x: torch.Tensor) -> None:
        pass

    def inner(self, expert: int, rows: slice, h: torch.Tensor) -> None:
        pass

    def outputs(self, expert: int, rows: slice, f: torch.Tensor) -> None:
        pass

    def end(self, combined: torch.Tensor) -> None:
        pass


class Target(Recorder):
    """Keeps the experts' summed output y [T, H]."""

    y: torch.Tensor

    def end(self, combined: torch.Tensor) -> None:
        self.y = combined.clone()


class Contributions(Recorder):
    """Keeps φ = g·f of every routed pair: phi [T, k, H] in ascending order of experts, and which, expert [T, k]."""

    phi: torch.Tensor
    expert: torch.Tensor

    def begin(self, inputs: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> None:
        order = torch.argsort(token, stable=True)
        self._place = torch.empty_like(order)
        self._place[order] = torch.arange(len(order), device=order.device)
        self._gate = gate
        self.expert = expert[order].reshape(len(inputs), -1)
        wide = torch.promote_types(gate.dtype, inputs.dtype)
        self._flat = torch.empty((len(order), inputs.shape[-1]), dtype=wide, device=inputs.device)
        self.phi = self._flat.reshape(*self.expert.shape, -1)

    def outputs(self, expert: int, rows: slice, f: torch.Tensor) -> None:
        self._flat[self._place[rows]] = f * self._gate[rows, None]


@contextlib.contextmanager
def recorded(module: nn.Module, recorder: Recorder) -> Iterator[None]:
    """The layer's experts tell the recorder; padding passes like any token."""
    experts = module.get_submodule(EXPERTS)
    attach(experts, recorder)
    try:
        yield
    finally:
        attach(experts, None)


def router_scales(module: nn.Module) -> torch.Tensor:
    """A copy of the layer's per_expert_scale [E]."""
    return module.get_submodule(ROUTER).get_parameter("per_expert_scale").detach().clone()


@contextlib.contextmanager
def dropped(job: Job, module: nn.Module, scales: torch.Tensor | None = None) -> Iterator[None]:
    """The layer with its router cut: dropped experts have no logit, the others are renormalised by the router itself.

    Args:
        scales: [E] for per_expert_scale in memory while it lasts (the base's file is only ever read); None: ones, so
            that a gate is the renormalised weight alone.
    """
    gone = torch.tensor(sorted(set(range(job.units)) - set(job.kept)), dtype=torch.int64)
    scale = module.get_submodule(ROUTER).get_parameter("per_expert_scale")

    def mask(linear: nn.Module, args: tuple[torch.Tensor, ...], logits: torch.Tensor) -> torch.Tensor:
        del linear, args
        return logits.index_fill(-1, gone.to(logits.device), float("-inf"))

    before = scale.detach().clone()
    handle = module.get_submodule(ROUTER_LOGITS).register_forward_hook(mask)
    try:
        with torch.no_grad():
            scale.copy_(torch.ones_like(scale) if scales is None else scales.reshape(scale.shape))
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            scale.copy_(before)


class ScaleSums:
    """Moments of one layer's scales, apart for what is fitted on, the inner split and what is held out."""

    def __init__(self, job: Job, layout: Layout, eps: float, device: torch.device) -> None:
        self.layout, self.eps = layout, eps
        self._position = torch.full((job.units,), -1, dtype=torch.int64)
        self._position[list(job.kept)] = torch.arange(len(job.kept))
        self._kept, self._place = len(job.kept), wide_device(device)
        self._sums: dict[int, dict[str, ScaleMoments]] = {}

    def add(self, k: int, seen: Contributions, y: torch.Tensor) -> None:
        """Batch k, padding included: contributions of the cut layer, y [B·S, H] of the dense one."""
        index = self._position.to(seen.expert.device)[seen.expert]
        for part in self.layout.parts:
            at, of = self.layout.chosen(k, part), self.layout.class_of(k, part)
            for number in sorted(set(of.tolist())):
                mine = at[of == number].to(y.device)
                sums = self._of(part, self.layout.classes[number])
                sums.add_routed(seen.phi[mine], index[mine], y[mine], self.eps)

    def _of(self, part: int, cls: str) -> ScaleMoments:
        """K × K numbers a class are little."""
        classes = self._sums.setdefault(part, {})
        if cls not in classes:
            classes[cls] = ScaleMoments.zeros(1, self._kept, self._place)
        return classes[cls]

    def finish(self, job: Job, start: torch.Tensor, dtype: torch.dtype, settings: HealSettings) -> Fitted:
        """The refit of everything but what is held out, of all scales float64 [E]: zeros where an expert goes."""
        sums = {part: ClassSums.of(classes) for part, classes in self._sums.items()}
        fitted = fit_layer(
            job,
            start[None],
            dtype,
            fit=sums[FIT].whole,
            inner=sums.get(INNER),
            held_out=sums[HELD_OUT],
            ridges=settings.ridges,
        )
        return replace(fitted, weight=fitted.weight[0])
