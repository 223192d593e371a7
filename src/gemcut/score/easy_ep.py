"""easy_ep: weighted output norm, counted more where the branch turns the residual."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Criterion, Ranking
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = Σ_t (1 − cos(r_t, r_t + y_t))·g[t, e]·‖f_e(x_t)‖₂, float64 [L, E].

    r is the residual that enters the MoE branch and y the experts' summed output.

    Source: EASY-EP, arXiv:2504.06792 (a = b = 1, Z = 1, with its token weight). There y is what is added to the
    residual; in Gemma 4 a norm lies between, so y is the branch before that norm.
    """
    return Ranking(values=sums.pooled("easy"))


CRITERION = Criterion(
    name="easy_ep",
    about="sum of weighted output norm, times how far the branch turns the token",
    source="arXiv:2504.06792",
    rank=rank,
)
