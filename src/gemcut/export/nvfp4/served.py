"""What vLLM makes of an ignore list: its names, its fused modules, its experts. Run on every export.

Rules, as vLLM has them: a plain entry is renamed like the weights and must equal the path; `re:` is matched from the
start of vLLM's own path and is not renamed. A fused module asks for each of its shards, those that a layer lacks
included (v_proj where keys serve as values), and refuses to load when they disagree. Experts ask for expert 0's three
projections, with `moe.` in the path.
Source: vLLM quantization/utils/…/compressed_tensors/utils.py: should_ignore_layer; compressed_tensors_moe.py, mid 2026.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from gemcut.errors import CheckpointError
from gemcut.families.linears import LinearGroup, Linears

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def check_served(
    ignore: Sequence[str],
    groups: Sequence[LinearGroup],
    quantised: Collection[str],
    others: Collection[str],
    linears: Linears,
) -> None:
    """Hold an ignore list against what is quantised, under the checkpoint's names and under vLLM's.

    Args:
        ignore: as in config.json.   groups: all matrices of the decoder.   quantised: modules that have NVFP4 tensors.
        others: every other module that may be a linear (vision tower, router, head).
    Raises:
        CheckpointError: a fused module's shards disagree; a module is quantised and ignored, or neither; an expert is
            missing, or experts of one layer differ.
    """
    wanted = set(quantised)
    _check_experts(groups, wanted)
    for group in groups:
        for matrix in group.matrices:
            _agree(matrix.module, ignore, linears, stays=matrix.module not in wanted)
    for module in others:
        _agree(module, ignore, linears, stays=True)
    there = {matrix.module for group in groups for matrix in group.matrices}
    for prefix in {group.matrices[0].module.rpartition(".")[0] for group in groups if group.part != "experts"}:
        for fused in linears.fused:
            _check_fused(prefix, fused, there, ignore, linears)


def ignored(name: str, ignore: Sequence[str]) -> bool:
    """Whether a path is in the list."""
    return any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in ignore)


def served_name(name: str, linears: Linears) -> str:
    """vLLM's path of a module of the checkpoint."""
    for ours, theirs in linears.served:
        if name.startswith(ours):
            name = theirs + name[len(ours) :]
            break
    before, dot, expert = name.partition(".experts.")
    return f"{before}.{linears.experts_at}experts.{expert}" if dot else name


def _agree(module: str, ignore: Sequence[str], linears: Linears, *, stays: bool) -> None:
    renamed = [one if one.startswith("re:") else served_name(one, linears) for one in ignore]
    for name, entries in ((module, ignore), (served_name(module, linears), renamed)):
        if ignored(name, entries) != stays:
            raise CheckpointError(
                "the ignore list and the tensors disagree: "
                + ("a module stays, and nothing says so" if stays else "a quantised module is ignored"),
                where=name,
                got=", ".join(one for one in entries if ignored(name, [one])) or "no entry that matches",
            )


def _check_fused(prefix: str, fused: str, there: Collection[str], ignore: Sequence[str], linears: Linears) -> None:
    shards = linears.fused[fused]
    if not any(f"{prefix}.{shard}" in there for shard in shards):
        return
    renamed = [one if one.startswith("re:") else served_name(one, linears) for one in ignore]
    path = served_name(prefix, linears)
    found: Mapping[str, bool] = {shard: ignored(f"{path}.{shard}", renamed) for shard in shards}
    whole = ignored(f"{path}.{fused}", renamed)
    if len(set(found.values())) > 1 or (whole and not all(found.values())):
        raise CheckpointError(
            "a fused module would be quantised in part: servers refuse to load it",
            where=f"{path}.{fused}",
            got=", ".join(f"{shard} {'ignored' if is_so else 'quantised'}" for shard, is_so in found.items()),
            hint="name all of them in the ignore list, those that the layer lacks too",
        )


def _check_experts(groups: Sequence[LinearGroup], quantised: Collection[str]) -> None:
    layers: dict[int, dict[str, bool]] = {}
    for group in groups:
        if group.part == "experts":
            layers.setdefault(group.layer, {}).update({m.module: m.module in quantised for m in group.matrices})
    for layer, modules in layers.items():
        if len(set(modules.values())) > 1:
            odd = next(name for name, is_so in modules.items() if is_so != next(iter(modules.values())))
            raise CheckpointError(
                "some experts of a layer are quantised and others are not", where=f"layer {layer}, {odd}"
            )
        prefix = next(iter(modules)).partition(".experts.")[0]
        count = len(modules) // len(EXPERT_PROJECTIONS)
        names = {f"{prefix}.experts.{e}.{part}" for e in range(count) for part in EXPERT_PROJECTIONS}
        if names != modules.keys():
            raise CheckpointError(
                "the experts are not named as servers want them", where=f"layer {layer}, {min(names ^ modules.keys())}"
            )
