"""One output projection: what passes through it, its refit, and whether that is better than leaving it cut."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from gemcut.errors import QualityError
from gemcut.surgery.heal.settings import FIT, HELD_OUT, INNER, HealSettings, Job
from gemcut.surgery.heal.solve import Moments, choose_ridge, condition, refit
from gemcut.surgery.heal.states import Layout


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


class Sums:
    """Moments of one layer, apart for what is fitted on, the inner split and what is held out."""

    def __init__(self, job: Job, hidden: int, layout: Layout, eps: float, device: torch.device) -> None:
        # float64 does not exist on Apple's devices
        place = torch.device("cpu") if device.type == "mps" else device
        self.columns = torch.from_numpy(job.columns).to(device)
        self.layout, self.eps = layout, eps
        self._parts = {part: Moments.zeros(hidden, len(self.columns), place) for part in set(layout.part_of.tolist())}

    def add(self, k: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """x [B·S, d] and y [B·S, H] of batch k, padding included."""
        for part, moments in self._parts.items():
            at = self.layout.chosen(k, part).to(x.device)
            if len(at):
                moments.add(x[at][:, self.columns], y[at], self.eps)

    def finish(self, job: Job, weight: torch.Tensor, dtype: torch.dtype, settings: HealSettings) -> Fitted:
        """The refit of everything but what is held out. Ends the sums."""
        return fit_layer(
            job,
            weight,
            dtype,
            fit=self._parts.pop(FIT),
            inner=self._parts.pop(INNER, None),
            held_out=self._parts.pop(HELD_OUT),
            ridges=settings.ridges,
        )


def fit_layer(
    job: Job,
    weight: torch.Tensor,
    dtype: torch.dtype,
    *,
    fit: Moments,
    inner: Moments | None,
    held_out: Moments,
    ridges: tuple[float, ...],
) -> Fitted:
    """Choose the ridge, refit, round to the checkpoint's dtype, and measure what was rounded.

    Args:
        weight: the whole projection as it is stored, float64 [H, d].
        dtype: of the checkpoint; float64 is rounded by way of float32, to nearest even both times.
        fit, inner: `inner` chooses the ridge and is then added to `fit`, in place; None where there is one ridge.
    Raises:
        QualityError: sums or new weights are not finite, or no system can be solved; names the layer.
    """
    where = f"layer {job.layer}, {job.tensor}"
    if not (fit.finite() and held_out.finite() and (inner is None or inner.finite())):
        raise QualityError("the sums of a heal are not finite", where=where, hint="compute in float32")
    device = fit.g.device
    columns = torch.from_numpy(job.columns)
    start = weight[:, columns].to(device)
    ridge = ridges[0]
    tried: dict[float, float] = {}
    if inner is not None:
        ridge, tried = choose_ridge(fit, inner, start, ridges, where)
        fit.absorb(inner)
        del inner
    new = refit(fit, start, ridge, where)
    kept = new.weight.to("cpu", torch.float32).to(dtype)
    if not bool(torch.isfinite(kept).all()):
        raise QualityError("healed weights are not finite", where=where, got=f"{dtype}", hint="raise the ridge")
    before, after = held_out.residual(start), held_out.residual(kept)
    used = after < before
    whole = torch.zeros(weight.shape, dtype=dtype)
    whole[:, columns] = kept if used else weight[:, columns].to(dtype)
    return Fitted(
        weight=whole,
        used=used,
        ridge=ridge,
        lam=new.lam,
        ridge_residuals={f"{r:g}": residual for r, residual in tried.items()},
        condition=condition(fit, new.lam),
        fit_before=fit.residual(start),
        fit_after=fit.residual(kept),
        held_out_before=before,
        held_out_after=after,
    )
