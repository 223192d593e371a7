"""Which matrices become NVFP4 and which stay, and why; and the patterns that tell loaders so.

Whole groups are chosen, so that fused modules never come apart; and all of a layer's experts or none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gemcut.checkpoint import Checkpoint
from gemcut.errors import UsageError
from gemcut.families.linears import LinearGroup, LinearPart, Linears
from gemcut.nvfp4.choices import Narrow, Targets

_PARTS: Mapping[Targets, tuple[LinearPart, ...]] = {
    "mlp": ("mlp",),
    "mlp+experts": ("mlp", "experts"),
    "all": ("mlp", "experts", "attention"),
}
_GROUP = 16
_EVEN = 64  # weights of a matrix: its scales then end on four bytes, and numbers behind them stay aligned
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class Choice:
    """chosen: groups that become NVFP4.   left: module → why it stays, of targeted parts only.

    all: every group of the decoder.   ignore: patterns for loaders, `re:` ones and names.
    """

    chosen: tuple[LinearGroup, ...]
    left: Mapping[str, str]
    all: tuple[LinearGroup, ...]
    ignore: tuple[str, ...]

    @property
    def tensors(self) -> Mapping[str, tuple[LinearGroup, ...]]:
        """Stored tensor → the groups whose matrices come out of it, in the order of its rows."""
        out: dict[str, list[LinearGroup]] = {}
        for group in self.chosen:
            for name in dict.fromkeys(matrix.tensor for matrix in group.matrices):
                out.setdefault(name, []).append(group)
        return {name: tuple(groups) for name, groups in out.items()}


def choose(
    checkpoint: Checkpoint,
    targets: Targets,
    ignore: Sequence[str] = (),
    *,
    narrow: Narrow = "keep",
) -> Choice:
    """Decide about every matrix; headers only.

    Args:
        ignore: regular expressions, searched for in module paths; what matches stays as it is.
        narrow: whether matrices whose width is no multiple of 16 stay as they are, or are an error.
    Raises:
        UsageError: a pattern is no regular expression, matches nothing, or takes some of what servers fuse; nothing is
            left to quantise; a width, with `narrow` "refuse"; an architecture that no family knows.
    """
    linears = checkpoint.family.linears()
    shapes = {name: ref.shape for name, ref in checkpoint.tensors.items()}
    groups = linears.groups(checkpoint.text_config, shapes)
    parts = _PARTS[targets]
    left: dict[str, str] = {}
    for group in (group for group in groups if group.part in parts):
        why = _unfit(checkpoint, group)
        if why and narrow == "refuse":
            raise UsageError(
                f"a matrix cannot become NVFP4: {why}",
                where=group.matrices[0].module,
                hint="leave such matrices as they are: --narrow keep",
            )
        left |= {matrix.module: why for matrix in group.matrices if why}
    for pattern in ignore:
        left |= _matched(pattern, [group for group in groups if group.part in parts], linears)
    whole_layers = {g.layer for g in groups if g.part == "experts" and any(m.module in left for m in g.matrices)}
    for group in groups:
        if group.part == "experts" and group.part in parts and group.layer in whole_layers:
            for matrix in group.matrices:
                left.setdefault(matrix.module, "other experts of the layer stay")
    chosen = tuple(g for g in groups if g.part in parts and not any(m.module in left for m in g.matrices))
    if not chosen:
        first = next(iter(left.items()), ("", "the model has no such matrices"))
        raise UsageError(
            "nothing is left to quantise", where=first[0] or checkpoint.name, got=f"targets {targets}: {first[1]}"
        )
    return Choice(chosen, left, groups, ignore_patterns(checkpoint, groups, chosen, linears))


def _unfit(checkpoint: Checkpoint, group: LinearGroup) -> str:
    """Why a group cannot become NVFP4; empty where it can."""
    for matrix in group.matrices:
        dtype = checkpoint.ref(matrix.tensor).dtype
        if dtype not in _FLOATS:
            return f"its weights are {dtype}"
        if matrix.columns % _GROUP or not matrix.columns:
            return f"a width of {matrix.columns} is not a multiple of {_GROUP}"
        if matrix.rows * matrix.columns % _EVEN or not matrix.rows:
            return f"{matrix.rows} × {matrix.columns} weights are not a multiple of {_EVEN}"
    return ""


def _matched(pattern: str, groups: Sequence[LinearGroup], linears: Linears) -> dict[str, str]:
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UsageError("not a regular expression", where="--ignore", got=f"{pattern}: {error}") from None
    matched: dict[str, str] = {}
    for group in groups:
        here = [matrix.module for matrix in group.matrices if found.search(matrix.module)]
        if here and len(here) < len(group.matrices):
            other = next(matrix.module for matrix in group.matrices if matrix.module not in here)
            raise UsageError(
                "the pattern takes a part of what servers fuse into one module",
                where="--ignore",
                got=f"{here[0]} without {other.rsplit('.', 1)[-1]}",
                wanted=" or ".join("all of " + ", ".join(shards) for shards in linears.fused.values()),
            )
        matched |= dict.fromkeys(here, f"matches {pattern}")
    if not matched:
        raise UsageError("the pattern matches nothing that would be quantised", where="--ignore", got=pattern)
    return matched


@dataclass(frozen=True, slots=True)
class _Staying:
    """Linears of one kind that stay.   layers: () for all of them.   inside: what they lie in, `mlp`, `experts`."""

    layers: tuple[int, ...]
    inside: str
    names: tuple[str, ...]  # () for all that lie in it


def ignore_patterns(
    checkpoint: Checkpoint, groups: Sequence[LinearGroup], chosen: Sequence[LinearGroup], linears: Linears
) -> tuple[str, ...]:
    """Patterns that match every linear that stays, under the checkpoint's names, vLLM's, and those of fused modules.

    Loaders match from the start of a path, hence `.*`. Attention is named by its projections: a pattern that takes the
    attention module itself would leave the scales of an FP8 cache without an owner.
    """
    out = ["lm_head", *(f"re:.*{word}.*" for word in _words(checkpoint))]
    for one in _staying(groups, chosen, linears):
        place = rf"\.layers\.(?:{'|'.join(map(str, one.layers))})" if one.layers else ""
        if one.names:
            out.append(rf"re:.*{place}\.{re.escape(one.inside)}\.(?:{'|'.join(one.names)})$")
        else:
            out.append(rf"re:.*{place}\.(?:{re.escape(linears.experts_at)})?{one.inside}.*")
    return tuple(out)


def exclude_wildcards(
    checkpoint: Checkpoint, groups: Sequence[LinearGroup], chosen: Sequence[LinearGroup], linears: Linears
) -> tuple[str, ...]:
    """The same as shell wildcards, which is what modelopt's layout has."""
    out = ["lm_head", *(f"*{word}*" for word in _words(checkpoint))]
    for one in _staying(groups, chosen, linears):
        places = [f"*.layers.{layer}." for layer in one.layers] or ["*."]
        for place in places:
            if one.names:
                out += [f"{place}{one.inside}.{name}" for name in one.names]
            else:
                out += [f"{place}{before}{one.inside}*" for before in ("", linears.experts_at)]
    return tuple(out)


def _words(checkpoint: Checkpoint) -> list[str]:
    parts = {checkpoint.family.component(name) for name in checkpoint.tensors}
    return ["embed", *(["vision", "audio"] if "vision" in parts else []), *(["router"] if "router" in parts else [])]


def _staying(groups: Sequence[LinearGroup], chosen: Sequence[LinearGroup], linears: Linears) -> list[_Staying]:
    taken = {(group.layer, group.input) for group in chosen}
    out: list[_Staying] = []
    for what in dict.fromkeys(group.input for group in groups):
        mine = [group for group in groups if group.input == what]
        layers = sorted({group.layer for group in mine})
        staying = [layer for layer in layers if (layer, what) not in taken]
        if not staying:
            continue
        inside, _, first = what.rpartition(".")
        names = () if mine[0].part == "experts" else _with_fused(first, linears)
        one = _Staying(() if staying == layers else tuple(staying), inside, names)
        if one not in out:
            out.append(one)
    return out


def _with_fused(name: str, linears: Linears) -> tuple[str, ...]:
    """The names that are fused with this one, also those that a layer lacks, and the fused module's own."""
    for fused, shards in linears.fused.items():
        if name in shards:
            return (*shards, fused)
    return (name,)
