"""ean: expert activation norm, without the router's weight."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Choice, Criterion, Ranking, text
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = Σ_t ‖f_e(x_t)‖₂ over routed tokens (form=sum), or that divided by n (form=mean), float64 [L, E].

    Units: norm of the hidden state (sum: times tokens). A never-routed expert has 0.

    Source: arXiv:2606.15716, a = 0, b = 1, Z = 1 or N. The REAP authors' code takes the sum as "ean_sum". The form
    `mean` equals `man`; it is here because both are published under the name EAN.
    """
    return Ranking(values=sums.pooled("f" if text(params, "form") == "sum" else "f/n"))


CRITERION = Criterion(
    name="ean",
    about="sum (or mean) of the expert's output norm",
    source="arXiv:2606.15716",
    rank=rank,
    params={"form": Choice("sum", ("sum", "mean"))},
)
