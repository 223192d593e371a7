"""First, second and fourth moments and the largest size of every input column of a linear layer."""

from __future__ import annotations

import torch

from gemcut.observe.settings import SPLITS

# Values converted to float32 at a time and per thread: they stay in a core's cache through all seven passes over them.
_BLOCK_VALUES = 180_224


def make_scratch(device: torch.device | None = None) -> torch.Tensor:
    """Room for one block in float32."""
    return torch.empty(_BLOCK_VALUES * torch.get_num_threads(), dtype=torch.float32, device=device)


class ColumnSums:
    """For inputs a [T, F] of one linear layer, or of U of them (experts), split by the parity of the question:

        n[s, u] = Σ_t 1      a1[s, u, f] = Σ_t a      a2[s, u, f] = Σ_t a²      a4[s, u, f] = Σ_t a⁴
        amax[u, f] = max_t |a|

    float32 squares, summed in float32 over a block of rows (64 of 2816 values for each thread), then in float64.
    """

    def __init__(
        self,
        features: int,
        units: int | None = None,
        device: torch.device | None = None,
        scratch: torch.Tensor | None = None,
    ) -> None:
        """scratch: what `make_scratch` gave, shared by sums that are never filled at the same time."""
        self.grouped, count = units is not None, units or 1
        self.n = torch.zeros((SPLITS, count), dtype=torch.float64)
        self.a2 = torch.zeros((SPLITS, count, features), dtype=torch.float64, device=device)
        self.a1, self.a4 = torch.zeros_like(self.a2), torch.zeros_like(self.a2)
        self._peak = torch.zeros((count, features), dtype=torch.float32, device=device)  # of a²
        self._into = [
            [(self.a1[s, u], self.a2[s, u], self.a4[s, u], self._peak[u]) for u in range(count)] for s in range(SPLITS)
        ]  # views, taken once
        # One part of the rows per thread, in every pass: torch gives each thread the same rows when it squares and, in
        # batched sums, when it adds; a sum over all rows at once would split columns instead, and move the block
        # between cores twice.
        self._parts = torch.get_num_threads() if self.a2.device.type == "cpu" else 1
        flat = make_scratch(device) if scratch is None else scratch
        rows = max(1, flat.numel() // (features * self._parts)) * self._parts
        if rows * features > flat.numel():
            flat = torch.empty(rows * features, dtype=torch.float32, device=device)
        self._wide = flat[: rows * features].view(rows, features)
        self._ones = torch.ones((self._parts, 1, rows // self._parts), dtype=torch.float32, device=device)

    def add(self, a: torch.Tensor, split: int, unit: int = 0) -> None:
        """Rows a [T, F] of one split."""
        a1, a2, a4, peak = self._into[split][unit]
        for block in a.split(len(self._wide)) if len(a) > len(self._wide) else (a,):
            each = -(-len(block) // self._parts)
            flat = self._wide[: each * self._parts]
            if len(block) == len(flat):
                flat.copy_(block)
            else:
                flat[: len(block)].copy_(block)
                flat[len(block) :].zero_()
            parts, ones = flat.view(self._parts, each, -1), self._ones[:, :, :each]
            a1.add_(torch.bmm(ones, parts).sum((0, 1)))
            flat.mul_(flat)
            torch.maximum(peak, parts.amax(1).amax(0), out=peak)
            a2.add_(torch.bmm(ones, parts).sum((0, 1)))
            flat.mul_(flat)
            a4.add_(torch.bmm(ones, parts).sum((0, 1)))
        self.n[split, unit] += len(a)

    def finite(self) -> bool:
        """Whether every sum is a number. a⁴ leaves float32 where |a| is above 4·10⁹."""
        return all(bool(torch.isfinite(sums).all()) for sums in (self.a4, self.a2, self.a1))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """`linear.<name>.{n, a1, a2, a4, amax}`; the axis of the experts is there only for experts."""
        out = {"n": self.n, "a1": self.a1.cpu(), "a2": self.a2.cpu(), "a4": self.a4.cpu()}
        amax = self._peak.sqrt().cpu()
        if not self.grouped:
            out = {key: value[:, 0] for key, value in out.items()}
            amax = amax[0]
        out["amax"] = amax
        return {f"linear.{name}.{key}": value.contiguous() for key, value in out.items()}
