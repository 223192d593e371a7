"""What a run would read, write, need and take, before its first minute; and a refusal where it cannot finish.

Times come from rates that are measured while the dry run asks (disk read and write, float32 matrix products), never
from memory of another machine. Arithmetic: two floating point operations per active parameter and token; streamed
stages overlap reading with computing, so that the larger of the two decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemcut import machine, models, records, stages, store, surgery
from gemcut.checkpoint.gather import edited
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import MissingError
from gemcut.plan import plan_heads
from gemcut.recipe import STAGES, HeadWords, HealWords, Observe, PlanWords, Recipe, layers_of
from gemcut.types import DTYPE_BYTES, LayerPlan, Plan, Scores

if TYPE_CHECKING:
    from gemcut.exporting import FileCost
    from gemcut.stream.corpus import Corpus

# Share of the float32 product rate that a streamed forward pass reaches: attention, norms and routing are not products.
EFFICIENCY = 0.35
_CUT_MEMORY_BYTES = 512 << 20  # the bound that bench/bench_cut.py holds
KLD_EXTRA_BYTES = 1 << 30
LIGHT_MEMORY_BYTES = 400 << 20
SMALL_WRITE_BYTES = 4 << 20
LINEAR_SUMS_BYTES = 3 * 2 * 8 + 4  # of each column of a linear's input: three sums of two halves, and the largest


@dataclass(frozen=True, slots=True)
class StageCost:
    """One stage: bytes, peak memory, seconds (None where nothing sensible can be said)."""

    name: str
    state: str  # "to do" or "not asked for"
    read_bytes: int
    write_bytes: int
    memory_bytes: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Preflight:
    """The whole run."""

    stages: tuple[StageCost, ...]
    write_bytes: int
    free_bytes: int
    memory_bytes: int
    available_bytes: int
    basis: str
    files: tuple[FileCost, ...] = ()  # GGUF


def estimate(recipe: Recipe, runs: Path, *, until: str = "report") -> Preflight:
    """Costs of every stage of a recipe up to `until`.

    Raises:
        MissingError: the disk or the memory is too small for it.
    """
    base = models.open_model(recipe.model)
    corpus = stages.corpus_of(recipe.observe, base)
    rates = machine.measure_rates(base.path / next(iter(base.shards)), runs)
    words, costs = recipe.plan, []
    if words is not None or _observes(recipe):
        costs.append(observe_cost(base, corpus, recipe.observe, rates))
    model = base
    if words is not None:
        some = some_heads(base, words) if isinstance(words, HeadWords) else some_experts(base, words)
        model = surgery.cut_for_gguf(base, some) if recipe.gguf or recipe.nvfp4 else base
        costs += _cut_costs(recipe, base, some, rates)
    files: tuple[FileCost, ...] = ()
    if recipe.gguf is not None:
        from gemcut.gguf_preflight import gguf_costs  # it adds up with what stands here

        behind, files = gguf_costs(recipe, base, model, corpus, rates)
        costs += behind
    if recipe.nvfp4 is not None:
        from gemcut.nvfp4_preflight import nvfp4_costs  # it adds up with what stands here

        costs += nvfp4_costs(recipe, base, model, corpus, rates)
    costs.append(StageCost("report", "", 0, SMALL_WRITE_BYTES, LIGHT_MEMORY_BYTES, None))
    costs.sort(key=lambda cost: STAGES.index(cost.name))
    last = STAGES.index(until) if until in STAGES else len(STAGES)
    stated = [_stated(cost, "to do" if STAGES.index(cost.name) <= last else "not asked for") for cost in costs]
    return replace(_whole(stated, runs, rates), files=files)


def _observes(recipe: Recipe) -> bool:
    """Whether statistics are wanted where nothing is cut."""
    words = recipe.gguf
    files = words is not None and words.imatrix is not None and (bool(words.tiers) or words.solves)
    return files or (recipe.nvfp4 is not None and recipe.nvfp4.observes)


def _cut_costs(recipe: Recipe, base: Checkpoint, some: Plan, rates: machine.Rates) -> list[StageCost]:
    """Plan to KLD of a recipe that cuts; `some`: a plan of as many units."""
    choices = 1 + len(recipe.compare)
    kept = planned_bytes(base, some)
    costs = [StageCost("plan", "", 0, choices * SMALL_WRITE_BYTES, LIGHT_MEMORY_BYTES, None)]
    if recipe.heal is not None:
        costs.append(_heal(base, some, recipe.heal, recipe.observe.corpus, rates))
    costs.append(_copy("cut", choices * base.size_bytes, choices * kept, rates))
    costs.append(_copy("verify", base.size_bytes + kept, SMALL_WRITE_BYTES, rates))
    if recipe.canary is not None:
        costs.append(canary_cost(base))
    if recipe.kld is not None:
        text = stages.corpus_of(recipe.kld, base)
        costs.append(kld_cost(base, text, choices, kept, recipe.kld.dtype, rates))
    return costs


def estimate_observe(base: Checkpoint, corpus: Corpus, words: Observe, out: Path) -> Preflight:
    """Costs of one observation."""
    rates = machine.measure_rates(base.path / next(iter(base.shards)), out)
    return _whole([_stated(observe_cost(base, corpus, words, rates), "to do")], out, rates)


def estimate_imatrix(
    base: Checkpoint,
    corpus: Corpus | None,
    words: Observe | None,
    statistics: Path,
    *,
    looks_at_weights: bool,
    out: Path,
) -> Preflight:
    """Costs of an importance matrix; of the observation before it where there are no statistics yet."""
    from gemcut.export.imatrix import wants_importance
    from gemcut.export.layout import layout_of

    rates = machine.measure_rates(base.path / next(iter(base.shards)), out)
    tensors = [tensor for tensor in layout_of(base).tensors if wants_importance(tensor)]
    columns = [(t.shape[0] if len(t.shape) == 3 else 1) * t.shape[-1] for t in tensors]
    costs = []
    if corpus is not None and words is not None:
        costs.append(_stated(observe_cost(base, corpus, words, rates), "to do"))
    read = sum(columns) * LINEAR_SUMS_BYTES + (base.size_bytes if looks_at_weights else 0)
    costs.append(StageCost("imatrix", "to do", read, sum(columns) * 4 + SMALL_WRITE_BYTES, LIGHT_MEMORY_BYTES, None))
    return _whole(costs, statistics if corpus is not None else out, rates)


def estimate_cut(base: Checkpoint, plan_file: Path, out: Path) -> Preflight:
    """Costs of one cut; the plan is read and its counts are used."""
    plan = records.load_plan(plan_file)
    rates = machine.measure_rates(base.path / next(iter(base.shards)), out)
    return _whole([_stated(_copy("cut", base.size_bytes, planned_bytes(base, plan), rates), "to do")], out, rates)


def active_parameters(base: Checkpoint) -> int:
    """Parameters that one token multiplies with: routed experts count top-k of their number; the embedding once."""
    total = routed = 0
    for ref in base.tensors.values():
        part = base.family.component(ref.name)
        if part == "vision":
            continue
        total += ref.elements
        routed += ref.elements if part == "experts" else 0
    units = next((site.units for site in base.sites if site.kind == "experts"), 1)
    return total - routed + routed * base.family.top_k(base.text_config) // units


def planned_bytes(base: Checkpoint, plan: Plan) -> int:
    """Size after a plan."""
    edits = surgery.edits_for(plan, base)
    after = (edited(ref, edits.get(name)) for name, ref in base.tensors.items())
    return sum(DTYPE_BYTES[ref.dtype] * ref.elements for ref in after if ref is not None)


def some_heads(base: Checkpoint, words: HeadWords) -> Plan:
    """A plan of as many heads as the recipe asks for, whichever they are: all that a size depends on."""
    values = np.arange(sum(site.kind == "heads" for site in base.sites), dtype=np.float64)
    heads = max(site.units for site in base.sites if site.kind == "heads")
    every = tuple(site.layer for site in base.sites if site.kind == "heads")
    scores = Scores("none", {}, "heads", every, values[:, None] + np.arange(heads), base.fingerprint, "", "")
    names = base.tensors.keys()
    shapes = {layer: base.family.attention(base.text_config, names, layer) for layer in every}
    return plan_heads(scores, shapes, drop=words.drop, layers=layers_of(words.layers), mode=words.mode).plan


def some_experts(base: Checkpoint, words: PlanWords) -> Plan:
    """A plan of as many experts as the recipe keeps, whichever they are."""
    sites = [site for site in base.sites if site.kind == "experts"]
    layers = {
        site.layer: LayerPlan(tuple(range(words.keep)), dict.fromkeys(range(words.keep, site.units), "any"))
        for site in sites
    }
    return Plan("experts", base.fingerprint, max((site.units for site in sites), default=0), layers)


def observe_cost(base: Checkpoint, corpus: Corpus, words: Observe, rates: machine.Rates) -> StageCost:
    from gemcut.observe.memory import observe_disk_bytes, observe_memory_bytes

    settings = stages.observe_settings(words)
    longest = max(len(row.ids) for row in corpus.items)
    need = observe_memory_bytes(base, settings, longest=longest)
    written = observe_disk_bytes(base, settings, tokens=corpus.tokens, questions=len(corpus.items))
    compute = 2 * active_parameters(base) * corpus.tokens / (rates.flops * EFFICIENCY)
    reading = base.size_bytes / rates.read if rates.read else 0.0
    return StageCost("observe", "", base.size_bytes, written, need, max(compute, reading))


def kld_cost(base: Checkpoint, text: Corpus, choices: int, kept: int, dtype: str, rates: machine.Rates) -> StageCost:
    """So many candidates of `kept` bytes, streamed beside the base."""
    passes = 2 * active_parameters(base) * text.tokens * (1 + choices)
    read = base.size_bytes + choices * kept
    widest = 4 if dtype == "float32" else 2
    layer = max(_layer_bytes(base)) * widest // 2
    hidden = text.tokens * int(str(base.text_config.get("hidden_size", 0))) * widest * (1 + choices)
    seconds = max(passes / (rates.flops * EFFICIENCY), read / rates.read if rates.read else 0.0)
    return StageCost("kld", "", read, SMALL_WRITE_BYTES, 2 * layer + hidden + KLD_EXTRA_BYTES, seconds)


def _heal(base: Checkpoint, plan: Plan, words: HealWords, observed: str, rates: machine.Rates) -> StageCost:
    from gemcut.head_stages import heal_settings
    from gemcut.surgery.heal.memory import heal_disk_bytes, heal_memory_bytes

    settings = heal_settings(words)
    text = stages.corpus_of(words, base, observed)
    longest = max(len(row.ids) for row in text.items)
    compute = 3 * 2 * active_parameters(base) * text.tokens / (rates.flops * EFFICIENCY)  # dense, cut, healed
    reading = base.size_bytes / rates.read if rates.read else 0.0
    return StageCost(
        "heal",
        "",
        base.size_bytes,
        heal_disk_bytes(base, plan, settings, tokens=text.tokens),
        heal_memory_bytes(base, plan, settings, longest=longest),
        max(compute, reading),
    )


def canary_cost(base: Checkpoint) -> StageCost:
    """One model at a time, whole; the salvage search asks again as often as it needs, so that no time is said."""
    small = base.size_bytes <= 1 << 30  # answered in float32
    need = base.size_bytes * (2 if small else 1) + KLD_EXTRA_BYTES
    return StageCost("canary", "", 2 * base.size_bytes, SMALL_WRITE_BYTES, need, None)


def _layer_bytes(base: Checkpoint) -> list[int]:
    layers = sorted({site.layer for site in base.sites})
    prefixes = [base.family.layer_prefix(base.tensors, layer) for layer in layers]
    return [sum(r.size_bytes for r in base.tensors.values() if r.name.startswith(prefix)) for prefix in prefixes] or [0]


def _copy(name: str, read: int, written: int, rates: machine.Rates) -> StageCost:
    seconds = None
    if rates.read and rates.write:
        seconds = read / rates.read + written / rates.write
    return StageCost(name, "", read, written, _CUT_MEMORY_BYTES, seconds)


def _stated(cost: StageCost, state: str) -> StageCost:
    return StageCost(cost.name, state, cost.read_bytes, cost.write_bytes, cost.memory_bytes, cost.seconds)


def _whole(costs: list[StageCost], out: Path, rates: machine.Rates) -> Preflight:
    asked = [cost for cost in costs if cost.state == "to do"]
    written = sum(cost.write_bytes for cost in asked)
    memory = max((cost.memory_bytes for cost in asked), default=0)
    store.need_disk(out, written)
    if memory > machine.total_bytes():
        hungry = max(asked, key=lambda cost: cost.memory_bytes)
        raise MissingError(
            "not enough memory",
            where=f"stage {hungry.name}",
            got=f"{machine.total_bytes() / 2**30:.1f} GiB",
            wanted=f"{memory / 2**30:.1f} GiB",
            hint="lower max_memory_gib or max_tokens",
        )
    read = f"{rates.read / 1e9:.1f} GB/s read" if rates.read else "read rate unknown"
    write = f"{rates.write / 1e9:.1f} GB/s write" if rates.write else "write rate unknown"
    basis = f"rates measured now: {read}, {write}, {rates.flops / 1e9:.0f} GFLOP/s"
    if machine.load() > 1.0:
        basis += "; the machine is loaded, so that times are too long rather than too short"
    return Preflight(tuple(costs), written, store.free_bytes(out), memory, machine.available_bytes(), basis)
