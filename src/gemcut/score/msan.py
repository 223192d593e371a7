"""msan: mean squared activation norm, gate-free."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Criterion, Ranking
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = Σ_t ‖f_e(x_t)‖₂² / N_e, float64 [L, E]; 0 for a never-routed expert.

    Source: arXiv:2606.15716 (a = 0, b = 2, Z = N). From the paper: the authors' code was not compared.
    """
    return Ranking(values=sums.pooled("f2/n"))


CRITERION = Criterion(
    name="msan",
    about="mean squared output norm per routed token, without the router's weight",
    source="arXiv:2606.15716",
    rank=rank,
)
