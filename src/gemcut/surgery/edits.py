"""What a plan means for each tensor and for config.json, and the plans that mean nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from gemcut.checkpoint.edited import EditedCheckpoint, edited_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.families.base import Attention
from gemcut.families.heads import kept_kv_heads, mode_of
from gemcut.surgery.heal.edits import heal_edits
from gemcut.types import Edit, Edits, Json, LayerPlan, Mask, Plan, Site, Take


def edits_for(plan: Plan, base: Checkpoint, healed: Path | None = None, *, gguf: bool = False) -> Edits:
    """What the plan means for each tensor; with a heal, what it refitted in the plan's layers.

    Experts are taken out of every fused tensor of the site (gate_up_proj, down_proj, router rows, per_expert_scale).

    Masked heads: the columns of o_proj that read a dropped head become zero, and the rows of q_proj that made its
    query, which nothing needs any more. The columns are what removes the head; zero queries alone would attend
    evenly and leave the mean of V behind.

    Structural: rows of q_proj and columns of o_proj leave with the dropped heads, rows of k_proj and v_proj with KV
    heads that lost every query head. The order stays, and every query head keeps its KV head.

    Args:
        gguf: for a GGUF file, which has head counts for every layer: a structural plan need not be uniform.
    Raises:
        UsageError, CheckpointError: see `check_plan`.
    """
    sites = check_plan(plan, base, gguf=gguf)
    edits: dict[str, Edit] = {}
    for layer, one in sorted(plan.layers.items()):
        if plan.kind == "experts":
            for part in sites[layer].slices:
                edits[part.name] = Take(part.axis, positions(one.keep, part.block))
        elif mode_of(plan) == "structural":
            edits |= _without_heads(base, layer, one)
        elif one.drop:
            for part in sites[layer].slices:
                edits[part.name] = Mask(part.axis, positions(sorted(one.drop), part.block))
    # a plan may have been reduced to some of the layers that were healed
    return edits if healed is None else heal_edits(healed, edits, layers=plan.layers.keys())


def config_for(plan: Plan, base: Checkpoint) -> Mapping[str, Json]:
    """config.json after the cut; masking heads changes none of it."""
    return base.family.shrink(base.config, plan)


def cut_for_gguf(base: Checkpoint, plan: Plan, healed: Path | None = None) -> EditedCheckpoint:
    """The cut as a checkpoint that is read and never written: a GGUF file may say what no config.json can.

    Its config keeps the base's head counts where the plan takes heads out; the file's are counted in the shapes.

    Raises:
        UsageError, CheckpointError: see `check_plan`.
    """
    edits = edits_for(plan, base, healed, gguf=True)
    return edited_checkpoint(base, edits, config_for(plan, base) if plan.kind == "experts" else base.config)


def _without_heads(base: Checkpoint, layer: int, one: LayerPlan) -> dict[str, Take]:
    shape = base.family.attention(base.text_config, base.tensors, layer)
    return without_heads(shape, {name: ref.shape for name, ref in base.tensors.items()}, layer, one)


def without_heads(
    attention: Attention, shapes: Mapping[str, tuple[int, ...]], layer: int, one: LayerPlan
) -> dict[str, Take]:
    """Query heads of one layer out of its tensors, and the KV heads that nothing reads any more.

    Raises:
        UsageError: the layer has no keys of its own, or heads would read another KV head.
        CheckpointError: the number of KV heads and the shapes disagree.
    """
    if attention.shares_kv:
        raise UsageError(
            "a layer that reads the keys and values of another cannot lose heads, only have them masked",
            where=f"layer {layer}",
            hint="plan with mode mask",
        )
    width = attention.head_dim
    kv = kept_kv_heads(attention.group, one.keep, where=f"layer {layer} of the plan")
    edits: dict[str, Take] = {attention.q: Take(0, positions(one.keep, width))}
    for name in (attention.k, attention.v):
        if name is None:
            continue
        rows = (shapes.get(name) or (0,))[0]
        if rows != attention.kv_heads * width:
            raise CheckpointError(
                "config.json and the weights disagree about the number of KV heads",
                where=name,
                got=f"{rows} rows",
                wanted=f"{attention.kv_heads * width}: {attention.kv_heads} heads of {width}",
            )
        edits[name] = Take(0, positions(kv, width))
    edits[attention.o] = Take(1, positions(one.keep, width))
    return edits


def check_plan(plan: Plan, base: Checkpoint, *, gguf: bool = False) -> Mapping[int, Site]:
    """Refuse a plan that does not fit this checkpoint; return the sites that it names, by layer.

    Args:
        gguf: allow what a GGUF file can hold and a config.json cannot: a structural plan of heads with other numbers
            in every layer, or of some layers.

    Raises:
        CheckpointError: the plan was made for another checkpoint (fingerprint, layers or number of units).
        UsageError: a unit is out of range, named twice, or neither kept nor dropped with a reason; the layers keep
            different numbers of experts, or fewer than the router selects; a structural plan of heads that the
            architecture cannot hold (see its `shrink`).
    """
    if plan.model_fingerprint != base.fingerprint:
        raise CheckpointError(
            "the plan was made for another checkpoint",
            where=base.name,
            got=f"fingerprint {base.fingerprint[:12]}",
            wanted=plan.model_fingerprint[:12] or "the fingerprint in the plan's `model`",
            hint="plan again from statistics of this checkpoint",
        )
    sites = {site.layer: site for site in base.sites if site.kind == plan.kind}
    top_k = base.family.top_k(base.text_config) if plan.kind == "experts" else 0
    check_units(plan, {layer: site.units for layer, site in sites.items()}, top_k, where=base.name)
    if plan.kind == "heads" and mode_of(plan) == "structural" and not gguf:
        base.family.shrink(base.config, plan)
    return {layer: sites[layer] for layer in plan.layers}


def check_units(plan: Plan, units: Mapping[int, int], top_k: int, *, where: str) -> None:
    """Hold a plan against the units that each layer has.

    Args:
        units: layer → units of the plan's kind.   top_k: experts of a token.   where: what the model is called.
    Raises:
        CheckpointError, UsageError: see `check_plan`.
    """
    if not units:
        raise UsageError(f"this checkpoint has no {plan.kind} to cut", where=where)
    strange = sorted(plan.layers.keys() - units.keys())
    absent = sorted(units.keys() - plan.layers.keys()) if plan.kind == "experts" else []
    if strange or absent or not plan.layers:
        raise CheckpointError(
            f"the plan and the checkpoint disagree about the layers that have {plan.kind}",
            where=where,
            got=f"a plan for {len(plan.layers)} layers",
            wanted=f"{len(units)} layers; see layer {(strange or absent or [0])[0]}",
        )
    for layer, one in sorted(plan.layers.items()):
        if plan.units != units[layer]:
            raise CheckpointError(
                f"the plan was made for another number of {plan.kind}",
                where=f"layer {layer}",
                got=plan.units,
                wanted=units[layer],
            )
        _check_layer(plan, layer, one)
    if plan.kind == "experts":
        _check_counts(plan, top_k)


def _check_layer(plan: Plan, layer: int, one: LayerPlan) -> None:
    where = f"layer {layer} of the plan"
    outside = [u for u in (*one.keep, *one.drop) if not 0 <= u < plan.units]
    if outside:
        raise UsageError(
            "the plan names a unit that does not exist", where=where, got=outside[0], wanted=f"0…{plan.units - 1}"
        )
    if list(one.keep) != sorted(set(one.keep)):
        raise UsageError("the kept units are not in ascending order, or one comes twice", where=where)
    both = set(one.keep) & set(one.drop)
    neither = set(range(plan.units)) - set(one.keep) - set(one.drop)
    if both or neither:
        raise UsageError(
            f"unit {min(both or neither)} is {'both kept and dropped' if both else 'neither kept nor dropped'}",
            where=where,
        )
    if not one.keep:
        raise UsageError("the plan keeps nothing", where=where)
    silent = [u for u, why in one.drop.items() if not why.strip()]
    if silent:
        raise UsageError(f"unit {silent[0]} is dropped without a reason", where=where, hint="say why in the plan")


def _check_counts(plan: Plan, top_k: int) -> None:
    counts = {layer: len(one.keep) for layer, one in plan.layers.items()}
    few = min(counts, key=lambda layer: counts[layer])
    if counts[few] < top_k:
        raise UsageError(
            "the plan keeps fewer experts than the router selects",
            where=f"layer {few} of the plan",
            got=f"{counts[few]} kept",
            wanted=f"at least {top_k}",
            hint=f"plan with --keep {top_k} or more",
        )
    many = max(counts, key=lambda layer: counts[layer])
    if counts[few] != counts[many]:
        raise UsageError(
            "the layers keep different numbers of experts, and the config has one number for all",
            where=f"layers {few} and {many} of the plan",
            got=f"{counts[few]} and {counts[many]}",
            hint="plan with one --keep",
        )


def positions(units: Collection[int], block: int) -> tuple[int, ...]:
    """Places on an axis of units that are `block` wide."""
    return tuple(unit * block + i for unit in units for i in range(block))
