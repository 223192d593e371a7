"""What can be chosen about a heal, what is healed, and which items are held out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import UsageError
from gemcut.records.heal import ExpertRefit, HealMethod, HealTarget
from gemcut.stream.corpus import Corpus
from gemcut.stream.hidden import BATCH_TOKENS
from gemcut.surgery import check_plan
from gemcut.types import I64, Json, Plan, Site

# Raised by hand whenever the numbers that a heal writes change: an older folder is then not taken for a finished one.
HEAL_VERSION = 2
SAMPLES_PER_COLUMN = 4  # fewer tokens leave the fit rank-deficient or noisy, which its own residual cannot see
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)

FIT, INNER, HELD_OUT = 0, 1, 2
JobKind: TypeAlias = Literal["heads", "scales", "down_proj"]


@dataclass(frozen=True, slots=True)
class HealSettings:
    """One heal.

    method: "sequential": inputs from the already cut and healed layers before, targets from the dense model;
        "local": inputs of the dense model too, each layer as if it alone were cut.
    target: "stream": what the branch must add so that the residual stream behind it is the dense model's again;
        "branch": what the dense model's branch added. Of heads, and of no weight in a local heal.
    ridges: λ in units of tr(G_KK)/|K|; the best on an inner split of the items is taken. One: no inner split.
    every: one item in so many is held out, and another is the inner split.
    experts: what is refitted of a cut of experts: the router's scale of each that stays, or its down_proj.
    heal_all: refit layers without a dropped head as well, behind the first that has one (sequential only).
    device, dtype: as in `observe`; None computes in the dtype that the checkpoint is stored in.
    batch_tokens: padded positions that go through a layer together.
    """

    method: HealMethod = "sequential"
    target: HealTarget = "stream"
    ridges: tuple[float, ...] = RIDGES
    every: int = 8
    experts: ExpertRefit = "scales"
    heal_all: bool = False
    device: str = "cpu"
    dtype: str | None = None
    batch_tokens: int = BATCH_TOKENS

    def __post_init__(self) -> None:
        if self.method not in ("sequential", "local"):
            raise UsageError("there is no such heal", got=self.method, wanted="sequential or local")
        if self.target not in ("stream", "branch"):
            raise UsageError("there is no such target of a heal", got=self.target, wanted="stream or branch")
        if self.experts not in ("scales", "down_proj"):
            raise UsageError("there is no such refit of experts", got=self.experts, wanted="scales or down_proj")
        good = [r for r in self.ridges if math.isfinite(r) and r > 0]
        if not good or len(good) != len(self.ridges) or len(set(good)) != len(good):
            raise UsageError(
                "the ridges of a heal must be different positive numbers",
                got=", ".join(map(str, self.ridges)) or "none",
                wanted=f"for example {RIDGES[-2]}",
                hint="no ridge at all makes a fit follow noise",
            )
        if self.every < 3:
            raise UsageError("every is too small: two items in `every` are not fitted on", got=self.every, wanted="3")
        if self.batch_tokens < 1:
            raise UsageError("batch_tokens is too small", got=self.batch_tokens, wanted="at least 1")
        if self.heal_all and self.method == "local":
            raise UsageError("a local heal of a layer without a dropped head changes nothing", got="heal_all")

    def identity(self, stored: str) -> dict[str, Json]:
        """Every setting: a heal that resumes must not mix two of them.

        Args:
            stored: the checkpoint's own dtype: asking for it by name asks for nothing else.
        """
        fields = {**dataclasses.asdict(self), "ridges": list(self.ridges), "dtype": self.dtype or stored}
        return {"version": HEAL_VERSION, **fields}


@dataclass(frozen=True, slots=True)
class Job:
    """What to refit in one layer: an output projection, tensor on disk [H, units·head_dim], or, with a head_dim of 1,
    the scales of experts, [units], or their down_proj, [units, H, I]. `module` holds it, below the decoder layer;
    `norm` is the tensor of the norm behind the branch."""

    layer: int
    module: str
    tensor: str
    units: int
    head_dim: int
    kept: tuple[int, ...]
    norm: str
    kind: JobKind = "heads"

    @property
    def columns(self) -> I64:
        """int64 [K]: the input columns of the kept heads, or the kept experts."""
        first = np.asarray(self.kept, np.int64)[:, None] * self.head_dim
        return (first + np.arange(self.head_dim)).reshape(-1)

    @property
    def cuts(self) -> bool:
        """Whether a unit is dropped here."""
        return len(self.kept) < self.units


def jobs_of(base: Checkpoint, plan: Plan, *, heal_all: bool = False, experts: ExpertRefit = "scales") -> dict[int, Job]:
    """What to refit, by layer; see `HealSettings`.

    Raises:
        UsageError: the plan drops nothing.
        CheckpointError: it was made for another checkpoint.
    """
    sites = check_plan(plan, base, gguf=plan.params.get("gguf_only") is True)
    cut = sorted(layer for layer, one in plan.layers.items() if one.drop)
    if not cut:
        raise UsageError(f"the plan drops no {plan.kind[:-1]}: there is nothing to heal", where=base.name)
    if plan.kind == "experts":
        return {layer: _of_experts(base, plan, site, experts) for layer, site in sorted(sites.items())}
    names = base.tensors.keys()
    jobs = {}
    for layer in sorted({site.layer for site in base.sites if site.kind == "heads"}):
        if layer not in cut and not (heal_all and layer > cut[0]):
            continue
        attention = base.family.attention(base.text_config, names, layer)
        prefix = base.family.layer_prefix(names, layer)
        kept = tuple(sorted(plan.layers[layer].keep)) if layer in plan.layers else tuple(range(attention.heads))
        jobs[layer] = Job(
            layer=layer,
            module=attention.o.removeprefix(prefix).removesuffix(".weight"),
            tensor=attention.o,
            units=attention.heads,
            head_dim=attention.head_dim,
            kept=kept,
            norm=base.family.norms(prefix, base.family.top_k(base.text_config) > 0).attention,
        )
    return jobs


def _of_experts(base: Checkpoint, plan: Plan, site: Site, what: ExpertRefit) -> Job:
    """The router's scales of one layer, the only part of a site with one number for each expert; or its down_proj."""
    names = [part.name for part in site.slices]
    tensor = next(n for n in names if (n.endswith("down_proj") if what == "down_proj" else len(base.ref(n).shape) == 1))
    prefix = base.family.layer_prefix(base.tensors.keys(), site.layer)
    norm = base.family.norms(prefix, True).experts
    assert norm is not None, "a layer with experts has a norm behind them"
    return Job(
        layer=site.layer,
        module=tensor.removeprefix(prefix).rpartition(".")[0],
        tensor=tensor,
        units=site.units,
        head_dim=1,
        kept=tuple(sorted(plan.layers[site.layer].keep)),
        norm=norm,
        kind=what,
    )


def split_items(corpus: Corpus, settings: HealSettings) -> I64:
    """int64 [items]: FIT, INNER or HELD_OUT. Items in order of class, then as they come; of every `every`, one is
    held out and one (with several ridges) is the inner split, so that every class with that many items has both.

    Raises:
        UsageError: too few items.
    """
    count = len(corpus.items)
    if count < settings.every:
        raise UsageError(
            "the corpus has too few items to hold any out",
            got=f"{count} items",
            wanted=f"at least {settings.every}",
            hint="a heal that is not measured on unseen text is not used: give more items",
        )
    order = sorted(range(count), key=lambda i: (corpus.items[i].cls, i))
    out = np.full(count, FIT, np.int64)
    for place, item in enumerate(order):
        if place % settings.every == settings.every - 1:
            out[item] = HELD_OUT
        elif len(settings.ridges) > 1 and place % settings.every == (settings.every - 1) // 2:
            out[item] = INNER
    return out


def refuse_few_samples(jobs: dict[int, Job], samples: int, tokens: int) -> None:
    """The rank guard: SAMPLES_PER_COLUMN tokens for each kept column, in every layer.

    A refit lies in the span of its samples: with fewer than |K| it would be decided by the ridge alone, and its own
    residual would still look perfect.

    Args:
        samples: tokens that are fitted on; tokens: of the whole corpus.
    Raises:
        UsageError: too few.
    """
    widest = max(jobs.values(), key=lambda job: len(job.columns))
    wanted = SAMPLES_PER_COLUMN * len(widest.columns)
    column = "column" if widest.kind == "heads" else "expert"
    if samples < wanted:
        about = f", so a corpus of about {-(-wanted * tokens // samples)}" if samples else ""
        raise UsageError(
            "too few calibration tokens for a heal",
            where=f"layer {widest.layer}: {len(widest.columns)} kept {column}s",
            got=f"{samples} tokens to fit on, of {tokens}",
            wanted=f"at least {wanted} tokens, {SAMPLES_PER_COLUMN} for each {column}{about}",
            hint="give more text, or heal none",
        )
