"""Importance of query heads, layer by layer: from the stored Gram matrices, or measured elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.families.base import Attention
from gemcut.families.heads import HeadMode, kv_heads_after, legal_head_counts
from gemcut.records.gram import load_gram
from gemcut.records.statistics import StatisticsIndex, load_index_of
from gemcut.score.criterion import Checked, Choice, Param, Real, Whole, check_params, real, refuse_flat, text, whole
from gemcut.score.head_cost import RIDGE_REL, Balance, LayerCost, Rule
from gemcut.score.sums import rank01
from gemcut.types import F64, Estimate, Scores

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
_ENOUGH = 4  # tokens per column below which a refit follows the noise


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """What a criterion may ask of one layer; nothing is read before it is asked for."""

    checkpoint: Checkpoint
    folder: Path
    index: StatisticsIndex
    layer: int
    attention: Attention
    balance: Balance
    drop: int
    given: F64 | None  # [U], this layer's row of the importance

    def measured(self) -> F64:
        """The importance that was measured elsewhere, [U]."""
        assert self.given is not None
        return self.given

    def weight(self) -> F64:
        """o_proj's weight, float64 [H, d]."""
        return _values(self.checkpoint, self.attention.o, 2)

    def gamma(self) -> F64:
        """The weight of the RMSNorm behind the branch, float64 [H]."""
        family, names = self.checkpoint.family, self.checkpoint.tensors.keys()
        moe = family.top_k(self.checkpoint.text_config) > 0
        norms = family.norms(family.layer_prefix(names, self.layer), moe)
        return _values(self.checkpoint, norms.attention, 1)

    def gram(self) -> F64:
        """The Gram matrix of the concatenated head outputs, float64 [d, d].

        Raises:
            UsageError: there is none, or it saw fewer tokens than it has columns.
            CheckpointError: it is as wide as another model's.
        """
        found = load_gram(self.folder, self.index, self.layer)
        d, n = self.attention.heads * self.attention.head_dim, found.n
        where = f"layer {self.layer}"
        if len(found.g) != d:
            raise CheckpointError(
                "the Gram matrix is of another width", where=where, got=len(found.g), wanted=f"{d} columns"
            )
        if n < d:
            raise UsageError(
                "the Gram matrix saw fewer tokens than it has columns",
                where=where,
                got=f"{n} tokens, {d} columns",
                wanted=f"at least {d} tokens, better {_ENOUGH * d}",
                hint="observe a corpus with so many tokens: what was not seen looks as if it cost nothing",
            )
        if n < _ENOUGH * d:
            log.warning("%s: %d tokens for %d columns; %d or more would be safer", where, n, d, _ENOUGH * d)
        return found.g


@dataclass(frozen=True, slots=True)
class HeadCriterion:
    """A way to rank query heads. `rank` may assume that its parameters were checked; [U], higher is kept first.

    measured: the numbers come from outside (they need the whole model), as `importance`.
    joint: the ranking depends on how many heads go, and on the balance.
    """

    name: str
    about: str
    source: str
    rank: Callable[[HeadLayer, Checked], F64]
    params: Mapping[str, Param] = field(default_factory=dict)
    measured: bool = False
    joint: bool = False


def _obs(layer: HeadLayer, params: Checked) -> F64:
    """E(P) = tr(W_P S_P W_Pᵀ), S_P = ((G⁻¹)_PP)⁻¹: what is lost for good when the set P goes and the rest is refitted.

    P is searched jointly: greedy, then single exchanges under the KV balance. Values are no independent scores: the
    i-th head of P to go has i (0, 1, …), and each other head has |P| + E({h}) / tr(W G Wᵀ), so that the lowest |P|
    values are the set that was found, for this |P| and this balance only.

    gamma = scaled: rows of W times the weight of the norm behind the branch: damage where it joins the residual.
    """
    one = layer.attention
    gamma = layer.gamma() if text(params, "gamma") == "scaled" else None
    cost = LayerCost(layer.gram(), layer.weight(), one.heads, one.head_dim, real(params, "ridge_rel"), gamma)
    values = layer.drop + cost.singles() / (cost.total or 1.0)
    for position, head in enumerate(cost.best(layer.drop, layer.balance)):
        values[head] = position
    return values


def _norm(layer: HeadLayer, params: Checked) -> F64:
    """S[h] = Σ_t w_t ‖W_h x_t,h‖² = tr(W_h G_hh W_hᵀ): what the head adds to the branch, w_t = 1 / mean(y_t²).

    gamma = scaled: rows of W times the weight of the norm behind the branch.
    """
    one, gram, weight = layer.attention, layer.gram(), layer.weight()
    if text(params, "gamma") == "scaled":
        weight = weight * layer.gamma()[:, None]
    out = np.empty(one.heads, np.float64)
    for h in range(one.heads):
        at = slice(h * one.head_dim, (h + 1) * one.head_dim)
        out[h] = float((weight[:, at] @ gram[at, at] * weight[:, at]).sum())
    return out


def _loo(layer: HeadLayer, params: Checked) -> F64:
    """S[h] = NLL(model without head h) − NLL(model), nats per token: the head's output is zero, all else stays.

    Measured on the whole model, one run for every head.
    """
    del params
    return layer.measured()


def _taylor(layer: HeadLayer, params: Checked) -> F64:
    """S[h] = Σ |∂NLL / ∂α_h| at α = 1, α_h a factor on the head's output: one backward pass for all heads.

    Measured on the whole model. Source: Michel et al., arXiv:1905.10650.
    """
    del params
    return layer.measured()


def _random(layer: HeadLayer, params: Checked) -> F64:
    """Uniform numbers in [0, 1) from PCG64 seeded with (seed, layer number), or those that are given."""
    if layer.given is not None:
        return layer.given
    return np.random.default_rng([whole(params, "seed"), layer.layer]).random(layer.attention.heads)


HEAD_CRITERIA: Mapping[str, HeadCriterion] = {
    one.name: one
    for one in (
        HeadCriterion("random", "uniform random numbers: the floor", "none", _random, {"seed": Whole(0, 0)}),
        HeadCriterion(
            "norm",
            "squared norm of what the head adds to the branch, relative to the branch",
            "baseline",
            _norm,
            {"gamma": Choice("plain", ("plain", "scaled"))},
        ),
        HeadCriterion(
            "taylor", "first-order change of the loss when the head fades", "arXiv:1905.10650", _taylor, measured=True
        ),
        HeadCriterion("loo", "change of the loss without the head", "baseline", _loo, measured=True),
        HeadCriterion(
            "obs",
            "exact cost of removing a set of heads and refitting the others, searched jointly",
            "Hassibi & Stork 1993; arXiv:2412.18110, arXiv:2403.12983",
            _obs,
            {"ridge_rel": Real(RIDGE_REL, 1e-6, 1e6), "gamma": Choice("scaled", ("scaled", "plain"))},
            joint=True,
        ),
    )
}
HEAD_DEFAULT = "obs"


def head_criterion_named(name: str) -> HeadCriterion:
    """The criterion of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in HEAD_CRITERIA:
        raise UsageError(f"there is no criterion of heads {name!r}", wanted=", ".join(HEAD_CRITERIA))
    return HEAD_CRITERIA[name]


def balance_of(attention: Attention, drop: int, mode: HeadMode = "mask", where: str | None = None) -> Balance:
    """Which sets of `drop` heads this layer may lose: spread over the KV groups for masks; for a structural cut the
    same number of every group where that is possible, else whole groups.

    Raises:
        UsageError: no set has this number; the legal ones near it are named.
    """
    rule: Rule = "spread"
    if mode == "structural" and 0 <= drop < attention.heads:
        kept = kv_heads_after(attention, attention.heads - drop)
        if kept is None:
            counts = [attention.heads - m for m in legal_head_counts({0: attention})]
            near = [*sorted(n for n in counts if n < drop)[-2:], *sorted(n for n in counts if n > drop)[:2]]
            raise UsageError(
                "a structural cut of so many heads would give query heads another KV head",
                where=where,
                got=f"{drop} of {attention.heads} heads on {attention.kv_heads} KV heads",
                wanted=" or ".join(map(str, near)),
                hint="remove another number, or plan with mode mask",
            )
        rule = "equal" if kept == attention.kv_heads else "groups"
    balance = Balance(attention.kv_heads, attention.group, rule)
    balance.require(drop, where)
    return balance


def score_heads(
    checkpoint: Checkpoint,
    statistics_folder: Path,
    criterion: str = HEAD_DEFAULT,
    *,
    drop: int,
    mode: HeadMode = "mask",
    layers: Collection[int] | None = None,
    importance: F64 | None = None,
    params: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Rank the query heads of every layer; one layer's matrices are in memory at a time.

    With `obs` the values depend on `drop` and `mode`, which therefore stand among the scores' parameters: the `drop`
    lowest values of a layer are its jointly best set (see the criterion). With the others a plan has to keep the
    balance by itself.

    Args:
        drop: heads that will go from each layer.
        mode: what will be done with them; decides which sets are allowed, see `balance_of`.
        layers: all that have heads, or these.
        importance: float64 [L, U] for criteria that are measured elsewhere, a row for each scored layer, ascending.

    Returns:
        Scores of kind "heads", values float64 [L, U]; higher is kept first.

    Raises:
        UsageError: unknown criterion, parameter or layer; a count that no set of heads has; an importance that is
            missing, not asked for or of another shape; statistics without Gram matrices, or with fewer tokens than
            columns.
        CheckpointError: statistics of another model, or matrices of another width.
        QualityError: a layer whose scores are all equal, or not finite.
    """
    chosen = head_criterion_named(criterion)
    checked = check_params(criterion, chosen.params, params or {})
    index = load_index_of(statistics_folder, checkpoint.fingerprint)
    shapes = _shapes(checkpoint, layers)
    units = max(one.heads for one in shapes.values())
    _check_importance(chosen, importance, (len(shapes), units))
    balances = {layer: balance_of(one, drop, mode, f"layer {layer}") for layer, one in shapes.items()}
    values = np.empty((len(shapes), units), np.float64)
    for row, (layer, one) in enumerate(shapes.items()):
        given = None if importance is None else np.asarray(importance[row], np.float64)
        view = HeadLayer(checkpoint, statistics_folder, index, layer, one, balances[layer], drop, given)
        values[row] = chosen.rank(view, checked)
        if progress is not None:
            progress(row + 1, len(shapes), f"layer {layer}")
    scores = Scores(
        criterion=criterion,
        params=checked | ({"drop": drop, "mode": mode} if chosen.joint else {}),
        kind="heads",
        layers=tuple(shapes),
        values=values,
        model_fingerprint=index.meta.model_fingerprint,
        statistics_fingerprint=index.fingerprint,
        corpus_hash=index.meta.corpus_hash,
    )
    refuse_flat(scores)
    return scores


def _shapes(checkpoint: Checkpoint, layers: Collection[int] | None) -> dict[int, Attention]:
    """Attention of the layers to score, ascending."""
    family, names = checkpoint.family, checkpoint.tensors.keys()
    there = sorted(site.layer for site in checkpoint.sites if site.kind == "heads")
    wanted = there if layers is None else sorted(set(layers))
    if not wanted or not set(wanted) <= set(there):
        raise UsageError(
            "there is no such layer with attention heads",
            got=f"layer {min(set(wanted) - set(there))}" if wanted else "no layer at all",
            wanted=f"some of {there[0]} to {there[-1]}" if there else "a model with attention heads",
        )
    return {layer: family.attention(checkpoint.text_config, names, layer) for layer in wanted}


def _check_importance(chosen: HeadCriterion, importance: F64 | None, shape: tuple[int, int]) -> None:
    if importance is None:
        if chosen.measured:
            raise UsageError(f"{chosen.name!r} is measured on the whole model: pass its numbers as importance")
        return
    if not chosen.measured and chosen.name != "random":
        raise UsageError(f"{chosen.name!r} is computed from the statistics and takes no importance")
    if importance.shape != shape:
        raise UsageError(
            "the importance is of other layers or heads",
            got=list(importance.shape),
            wanted=f"[{shape[0]} layers, {shape[1]} heads]",
        )


def _values(checkpoint: Checkpoint, name: str, rank: int) -> F64:
    """A tensor as float64, in its own shape."""
    ref = checkpoint.ref(name)
    values = decode(ref.dtype, checkpoint.read(name)) if len(ref.shape) == rank else None
    if values is None:
        raise CheckpointError(
            "this tensor cannot be read as numbers",
            where=name,
            got=f"{ref.dtype} {list(ref.shape)}",
            wanted=f"{rank} dimensions of bf16, f16 or f32",
        )
    return values.reshape(ref.shape)


def rank_correlation(a: F64, b: F64, *, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Agreement of two rankings of the same heads: Spearman's ρ of each layer, averaged over layers.

        ρ_l = corr(rank(a_l), rank(b_l)), equal values share their mean rank;   value = Σ_l ρ_l / L

    The 95 % interval is a percentile bootstrap over layers (PCG64 from `seed`); n = L. Shapes: a, b [L, U], float64.
    Heads of one layer are no independent draws, so layers are what is resampled.

    Raises:
        UsageError: shapes that differ, or nothing to correlate.
        QualityError: a layer where all values are equal, or one that is not finite.
    """
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] < 1 or a.shape[1] < 2:
        raise UsageError("two rankings of the same heads are needed", got=f"{list(a.shape)} and {list(b.shape)}")
    centred = []
    for values in (a, b):
        if not np.isfinite(values).all():
            raise QualityError("a value is not finite", where="rank correlation")
        ranks = rank01(np.asarray(values, np.float64)) - 0.5  # mean rank is one half, shared or not
        size = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
        if not (size > 0).all():
            raise QualityError("all heads of a layer have the same value", where=f"row {int(np.argmin(size))}")
        centred.append(ranks / size)
    rho: F64 = np.clip((centred[0] * centred[1]).sum(axis=1), -1.0, 1.0)  # [L]
    draws = np.random.default_rng(seed).integers(0, len(rho), size=(resamples, len(rho)))
    low, high = np.quantile(rho[draws].mean(axis=1), [0.025, 0.975])
    value = float(rho.mean())
    return Estimate(value, min(float(low), value), max(float(high), value), len(rho))
