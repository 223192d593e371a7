"""frequency: how many tokens the router sends to an expert."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Criterion, Ranking
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = Σ_c n[c, l, e], float64 [L, E], in routed tokens.

    Source: the usual baseline ("token count", a = b = 0, Z = 1 in arXiv:2606.15716). The published tools' `tc` is
    the same number. It does not see how large an expert's output is.
    """
    return Ranking(values=sums.pooled("n"))


CRITERION = Criterion(
    name="frequency",
    about="tokens routed to the expert",
    source="baseline",
    rank=rank,
)
