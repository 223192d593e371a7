"""One output projection: what passes through it, its refit, and whether that is better than leaving it cut."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gemcut.errors import QualityError
from gemcut.records.heal import ClassResidual
from gemcut.surgery.heal.settings import FIT, HELD_OUT, INNER, HealSettings, Job
from gemcut.surgery.heal.solve import Moments, choose_ridge, refit
from gemcut.surgery.heal.states import Layout
from gemcut.surgery.heal.unseen import Rows, Unseen, by_class

_LEAST_SCALE = 0.1


class Tap:
    """Keeps a linear layer's last input and output. Use as a context."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear
        self._handle: Any = None
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def __enter__(self) -> Tap:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            del module
            self._seen = (args[0], output)

        self._handle = self._linear.register_forward_hook(hook)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handle.remove()
        self._seen = None

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Input [B·S, d] and output [B·S, H] of the last call; they are forgotten here."""
        assert self._seen is not None, "the layer did not run its output projection"
        x, y = self._seen
        self._seen = None
        return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What a refit came to; see `records.heal.LayerHeal`. `weight` [H, d], dropped columns exactly zero, in the
    checkpoint's dtype: the healed one where it is used, else the cut one."""

    weight: torch.Tensor
    used: bool
    ridge: float
    lam: float
    ridge_residuals: dict[str, float]
    condition: float
    fit_before: float
    fit_after: float
    held_out_before: float
    held_out_after: float
    by_class: Mapping[str, ClassResidual]
    held_out_uncut: float | None = None


class Sums:
    """What one layer's refit is made of: moments of what is fitted on, rows of the inner split and of what is held out.

    A context. All in units of the residual stream. The branch adds γ ⊙ y/rms(y) to it, rms(y)² = mean(y²) + eps, so
    that with y of the dense layer and w_t = 1/rms(y_t)² the rows of γ ⊙ W are fitted to

        t_t = γ ⊙ y_t/rms(y_t) + r_t − r̂_t

    r and r̂ being the residual streams of the dense and of the cut model before the branch: what the layers before
    failed to give is asked of this one. A layer that cannot give it is no worse off: it is least squares.

    Args:
        gamma: float64 [H], the weight of the norm behind the branch.
        folder: for the rows.
    """

    def __init__(
        self, job: Job, hidden: int, layout: Layout, eps: float, gamma: torch.Tensor, place: torch.device, folder: Path
    ) -> None:
        self.columns = torch.from_numpy(job.columns).to(place)
        self.layout, self.eps, self.scale = layout, eps, safe_scale(gamma).to(wide_device(place))
        self._fit = Moments.zeros(hidden, len(self.columns), self.scale.device)
        self._folder, self._hidden = folder, hidden
        self._rows: dict[int, Rows] = {}
        self._uncut, self._size = 0.0, 0.0

    def add(
        self, k: int, x: torch.Tensor, y: torch.Tensor, drift: torch.Tensor | None, uncut: torch.Tensor | None
    ) -> None:
        """x [B·S, d], y [B·S, H] and r − r̂ [B·S, H] (None: zero) of batch k, padding included.

        Args:
            uncut: [B·S, H], what the whole projection gives of the cut model's inputs; None: y.
        """
        for part in self.layout.parts:
            at = self.layout.chosen(k, part).to(x.device)
            if not len(at):
                continue
            kept, target = x[at][:, self.columns], y[at].to(self.scale.device, torch.float64)
            root = (target.square().mean(-1) + self.eps).rsqrt()
            target = target * root[:, None] * self.scale
            if drift is not None:
                target += drift[at.to(drift.device)].to(target.device, torch.float64)
            if part == FIT:
                self._fit.add(kept, root, target)
            else:
                self._part(part, x.dtype).add(kept, root, target, self.layout.class_of(k, part))
            if part == HELD_OUT and uncut is not None:
                given = uncut[at].to(target.device, torch.float64) * root[:, None] * self.scale
                self._uncut += float((given - target).square().sum())
                self._size += float(target.square().sum())

    def _part(self, part: int, dtype: torch.dtype) -> Rows:
        if part not in self._rows:
            self._rows[part] = Rows(self._folder, self._hidden, len(self.columns), dtype, self.layout.classes)
        return self._rows[part]

    def finish(self, job: Job, weight: torch.Tensor, dtype: torch.dtype, settings: HealSettings) -> Fitted:
        """The refit of everything but what is held out."""
        fitted = fit_layer(
            job,
            weight,
            dtype,
            fit=self._fit,
            inner=self._rows.get(INNER),
            held_out=self._rows[HELD_OUT],
            ridges=settings.ridges,
            scale=self.scale,
        )
        uncut = math.sqrt(self._uncut / self._size) if self._size > 0 else 0.0
        return dataclasses.replace(fitted, held_out_uncut=uncut)

    def __enter__(self) -> Sums:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for rows in self._rows.values():  # gives the disk back
            rows.close()


def wide_device(device: torch.device) -> torch.device:
    """Where float64 is computed: it does not exist on Apple's devices."""
    return torch.device("cpu") if device.type == "mps" else device


def safe_scale(gamma: torch.Tensor) -> torch.Tensor:
    """γ [H] with |γ| ≥ 0.1 · rms(γ), signs kept.

    A channel that the norm all but switches off would need huge weights to carry anything to the residual stream, and
    those would change rms(y) for all others.
    """
    least = _LEAST_SCALE * float(gamma.square().mean().sqrt())
    signs = torch.where(gamma < 0, -1.0, 1.0).to(gamma.dtype)
    return signs * gamma.abs().clamp(min=least) if least > 0 else torch.ones_like(gamma)


def fit_layer(
    job: Job,
    weight: torch.Tensor,
    dtype: torch.dtype,
    *,
    fit: Moments,
    inner: Unseen | None,
    held_out: Unseen,
    ridges: tuple[float, ...],
    scale: torch.Tensor | None = None,
) -> Fitted:
    """Choose the ridge, refit, round to the checkpoint's dtype, and measure what was rounded.

    Args:
        weight: the whole projection as it is stored, float64 [H, d].
        dtype: of the checkpoint; float64 is rounded by way of float32, to nearest even both times.
        fit, inner: `inner` chooses the ridge and is then added to `fit`, in place; None where there is one ridge.
        scale: float64 [H]: moments and rows are those of scale ⊙ W; None: of W.
    Raises:
        QualityError: sums or new weights are not finite, or no system can be solved; names the layer.
    """
    where = f"layer {job.layer}, {job.tensor}"
    if not (fit.finite() and held_out.finite() and (inner is None or inner.finite())):
        raise QualityError("the sums of a heal are not finite", where=where, hint="compute in float32")
    columns = torch.from_numpy(job.columns)
    rows = torch.ones(len(weight), 1) if scale is None else scale[:, None]
    rows = rows.to(fit.g.device, torch.float64)
    start = weight[:, columns].to(fit.g.device) * rows
    ridge = ridges[0]
    tried: dict[float, float] = {}
    if inner is not None:
        ridge, tried = choose_ridge(fit, lambda one: inner.measure(one).whole, start, ridges, where)
        inner.into(fit)
    new = refit(fit, start, ridge, where)
    kept = (new.weight / rows).to("cpu", torch.float32).to(dtype)
    if not bool(torch.isfinite(kept).all()):
        raise QualityError("healed weights are not finite", where=where, got=f"{dtype}", hint="raise the ridge")
    rounded = kept.to(fit.g.device, torch.float64) * rows
    before, after = held_out.measure(start), held_out.measure(rounded)
    used = after.whole < before.whole
    whole = torch.zeros(weight.shape, dtype=dtype)
    whole[:, columns] = kept if used else weight[:, columns].to(dtype)
    return Fitted(
        weight=whole,
        used=used,
        ridge=ridge,
        lam=new.lam,
        ridge_residuals={f"{r:g}": residual for r, residual in tried.items()},
        condition=new.condition,
        fit_before=fit.residual(start),
        fit_after=fit.residual(rounded),
        held_out_before=before.whole,
        held_out_after=after.whole,
        by_class=by_class(before, after, held_out.samples),
    )
