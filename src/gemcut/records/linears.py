"""The sums over the inputs of every linear layer, as an observation keeps them: one decoder layer at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gemcut.errors import CheckpointError, UsageError
from gemcut.records.statistics import StatisticsIndex, open_layer
from gemcut.types import F32, F64

_PREFIX = "linear."
_KEYS = ("n", "a2", "a4", "amax")
_OPTIONAL = "a1"


@dataclass(frozen=True, slots=True, eq=False)
class LinearSums:
    """Sums over the rows a [T, F] that entered one linear, S = 2 halves of the corpus (parity of the question's index).

    n = Σ 1 [S, U]   a1 = Σ a, a2 = Σ a², a4 = Σ a⁴ [S, U, F], float64   amax = max |a| [U, F], float32.
    a1 is None where the observation is older than it.
    U: experts of a fused tensor; 1, with `grouped` False, for a linear that every token enters.
    """

    n: F64
    a2: F64
    a4: F64
    amax: F32
    grouped: bool
    a1: F64 | None = None

    @property
    def columns(self) -> int:
        """F, the width of the input."""
        return int(self.a2.shape[-1])


def load_linears(
    folder: Path, index: StatisticsIndex, layer: int, *, check_hash: bool = False
) -> Mapping[str, LinearSums]:
    """All linears of one decoder layer by their module's path (`self_attn.q_proj`, `experts.down_proj`).

    Linears that share their input (q, k and v; gate and up) are stored once and share one object here.

    Args:
        check_hash: compare the layer's file with its recorded sha256, which reads all of it, Gram matrices too.

    Raises:
        UsageError: the observation has no such layer, or was made before these sums were kept.
        CheckpointError: the file is missing, truncated or changed; sums of another form, or that cannot be sums.
    """
    with open_layer(folder, index, layer, check_hash=check_hash) as (f, where):
        names = set(f.keys())
        modules = sorted(name[len(_PREFIX) : -3] for name in names if _is_linear(name))
        if not modules:
            raise UsageError(
                "the statistics hold no sums of linear layers", where=where, hint="observe again: gemcut observe"
            )
        out = {module: _read(f, names, module, where) for module in modules}
        aliases = _aliases((f.metadata() or {}).get("aliases", "{}"), out, where)
    return out | {name: out[target] for name, target in aliases.items()}


def _is_linear(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(".a2")


def _read(f: Any, names: set[str], module: str, where: str) -> LinearSums:
    """One linear's four tensors, held against each other's shapes before any value is read."""
    forms: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in _KEYS:
        name = f"{_PREFIX}{module}.{key}"
        if name not in names:
            raise CheckpointError(f"{name} is missing", where=where, hint="observe again")
        part = f.get_slice(name)
        forms[key] = (str(part.get_dtype()), tuple(part.get_shape()))
    if f"{_PREFIX}{module}.{_OPTIONAL}" in names:
        part = f.get_slice(f"{_PREFIX}{module}.{_OPTIONAL}")
        forms[_OPTIONAL] = (str(part.get_dtype()), tuple(part.get_shape()))
    shape = forms["a2"][1]
    grouped = len(shape) == 3
    wanted = {
        "n": ("F64", shape[:-1]), "a2": ("F64", shape), "a4": ("F64", shape), "amax": ("F32", shape[1:]),
    }  # fmt: skip
    if _OPTIONAL in forms:
        wanted[_OPTIONAL] = ("F64", shape)
    if len(shape) not in (2, 3) or shape[0] != 2 or forms != wanted:
        raise CheckpointError(f"the sums of {module} have another form", where=where, got=forms)
    found = {key: f.get_tensor(f"{_PREFIX}{module}.{key}") for key in forms}
    if not grouped:
        found = {key: values[None] if key == "amax" else values[:, None] for key, values in found.items()}
    sums = LinearSums(**found, grouped=grouped)
    _check(sums, module, where)
    return sums


def _check(sums: LinearSums, module: str, where: str) -> None:
    """What cannot have been summed must never become an importance."""

    def refuse(what: str, got: object) -> NoReturn:
        raise CheckpointError(
            f"the sums of {module}'s input are impossible: {what}", where=where, got=got, hint="observe again"
        )

    for key, values in (("n", sums.n), ("a2", sums.a2), ("a4", sums.a4), ("amax", sums.amax)):
        # the sum is not finite as soon as one value is not, and the least is negative as soon as one is
        if not np.isfinite(values.sum()) or not np.isfinite(values).all():
            refuse(f"{key} is not finite", "NaN or infinity")
        if values.size and values.min() < 0:
            refuse(f"{key} is negative", float(values.min()))
    if sums.a1 is not None and not np.isfinite(sums.a1).all():
        refuse("a1 is not finite", "NaN or infinity")
    if (sums.n != np.rint(sums.n)).any():
        refuse("a count is no whole number", float(sums.n[sums.n != np.rint(sums.n)][0]))
    if (sums.a2[sums.n == 0] != 0).any():
        refuse("no token was counted, and yet something was summed", "n = 0")


def _aliases(text: str, sums: Mapping[str, LinearSums], where: str) -> dict[str, str]:
    """Which linears share the input of another one."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not all(
        isinstance(v, str) and v in sums and k not in sums for k, v in said.items()
    ):
        raise CheckpointError(
            "the list of linears that share their input is damaged", where=where, got=text[:80], hint="observe again"
        )
    return {str(k): str(v) for k, v in said.items()}
