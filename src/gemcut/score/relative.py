"""relative: the expert's share of the branch that it is added to."""

from __future__ import annotations

from gemcut.score.criterion import Checked, Choice, Criterion, Ranking, text
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """S[l, e] = Σ_t g[t, e]·‖f_e(x_t)‖₂ / ‖y_t‖₂ over routed tokens (form=sum), or per routed token (form=mean).

    y is the experts' summed output, [L, E] float64, no unit.

    Ours. Gemma 4 normalises the experts' sum before it joins the residual, so a token whose branch is large counts
    no more than one whose branch is small; the absolute norm in `reap` says otherwise.
    """
    return Ranking(values=sums.pooled("gf_rel" if text(params, "form") == "sum" else "gf_rel/n"))


CRITERION = Criterion(
    name="relative",
    about="router weight × output norm, relative to the branch's own norm",
    source="own; REAP made relative",
    rank=rank,
    params={"form": Choice("mean", ("mean", "sum"))},
)
