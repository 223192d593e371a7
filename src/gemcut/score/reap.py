"""reap: mean router-weighted output norm per routed token."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Criterion, Ranking
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = Σ_t g[t, e]·‖f_e(x_t)‖₂ / |{t : e routed}|, float64 [L, E].

    g is the weight that the layer really applies: renormalised over the top-k and, for Gemma 4, times
    per_expert_scale. A never-routed expert has 0.

    Source: REAP, arXiv:2510.13999. The authors' code takes g from the softmax over all experts unless told to
    renormalise; here it is always the applied weight, as llm-compressor's modifier does.
    """
    return Ranking(values=sums.pooled("gf/n"))


CRITERION = Criterion(
    name="reap",
    about="mean of router weight × output norm over the expert's tokens",
    source="arXiv:2510.13999",
    rank=rank,
)
