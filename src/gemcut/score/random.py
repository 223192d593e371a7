"""random: the floor that every criterion has to beat."""

from __future__ import annotations

import numpy as np

from gemcut.score.criterion import Checked, Criterion, Ranking, Whole, whole
from gemcut.score.sums import Sums


def rank(sums: Sums, params: Checked) -> Ranking:
    """Uniform numbers in [0, 1), float64 [L, E], from PCG64 seeded with (seed, layer number).

    Seeding by layer number makes a layer's order independent of which other layers have experts.
    """
    seed = whole(params, "seed")
    rows = [np.random.default_rng([seed, layer]).random(sums.experts) for layer in sums.layers]
    return Ranking(values=np.array(rows, np.float64))


CRITERION = Criterion(
    name="random",
    about="uniform random numbers: the floor that every criterion has to beat",
    source="none",
    rank=rank,
    params={"seed": Whole(0, 0)},
    from_questions=False,
)
