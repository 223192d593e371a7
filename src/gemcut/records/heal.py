"""`heal.json`: what a heal of a cut found, layer by layer, and where the healed tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, cast

from gemcut.records.fields import Fields, open_record, to_json
from gemcut.records.typed import read
from gemcut.store import write_json
from gemcut.types import Json

HEAL_SCHEMA = 2
HEAL_FILE = "heal.json"
HealMethod: TypeAlias = Literal["sequential", "local"]
HealTarget: TypeAlias = Literal["stream", "branch"]
ExpertRefit: TypeAlias = Literal["scales", "down_proj"]


@dataclass(frozen=True, slots=True)
class ClassResidual:
    """Held-out residuals of one class of text, as in `LayerHeal`, and the tokens behind them."""

    before: float
    after: float
    samples: int


@dataclass(frozen=True, slots=True)
class LayerHeal:
    """One layer's output projection, or the scales or down_proj of its experts: refitted, measured, and used or not.

    Residuals are relative, sqrt(Σ ‖Ŷ − T‖² / Σ ‖T‖²), of what the branch adds to the residual stream against what it
    should add, of the weights in the dtype that they are stored in; `before` is the cut without a heal of this layer,
    behind healed ones. `held_out_*` are of items that no fit has seen. Of experts, T is the dense layer's sum and Ŷ is
    that of the kept experts times the factor that fits T best: the norm behind it divides by its size, and a common
    factor is no gain.

    kept: heads or experts that stay; `units` were there, each `head_dim` columns wide (experts: 1).
    samples, held_out_samples: tokens behind the fit, and behind the held-out residuals.
    ridge: λ in units of tr(G_KK)/|K|.   ridge_residuals: held-out residual of each ridge that was tried (inner split).
    condition: λ_max/λ_min of G_KK + λI; of several down_proj the largest, as of `lam`.
    by_class: the held-out residuals of every class of text apart, so that a calibration too narrow for some text is
        seen; empty where the classes are not known (a heal from statistics).
    held_out_uncut: the residual that the layer would have behind the healed ones if it were whole: what the layers
        before lost. None of experts.
    used: the heal beats the cut without it on held-out items; else the layer keeps its old weights.
    file, blake3: where the healed tensor lies, and the hash of its bytes; None where it is not used.
    """

    layer: int
    tensor: str
    units: int
    head_dim: int
    kept: tuple[int, ...]
    samples: int
    held_out_samples: int
    ridge: float
    lam: float
    ridge_residuals: Mapping[str, float]
    condition: float
    fit_before: float
    fit_after: float
    held_out_before: float
    held_out_after: float
    used: bool
    file: str | None
    blake3: str | None
    by_class: Mapping[str, ClassResidual]
    held_out_uncut: float | None = None

    @property
    def harm(self) -> float:
        """What this layer's own cut adds to the squared held-out residual, with what is written; below zero where its
        heal makes up for more of the layers before than it costs."""
        written = self.held_out_after if self.used else self.held_out_before
        return written**2 - (self.held_out_uncut or 0.0) ** 2

    @property
    def dropped(self) -> tuple[int, ...]:
        """Heads or experts that go."""
        return tuple(sorted(set(range(self.units)) - set(self.kept)))


@dataclass(frozen=True, slots=True)
class HealReport:
    """A whole heal. `fingerprint` is of everything that decides its numbers: base, plan, corpus and settings."""

    fingerprint: str
    method: HealMethod
    model_fingerprint: str
    model_name: str
    plan_fingerprint: str
    corpus_hash: str
    template_hash: str
    bos_policy: str
    settings: Mapping[str, Json]
    dtype: str
    items: int
    held_out_items: int
    tokens: int
    layers: tuple[LayerHeal, ...]
    stack: Mapping[str, str]

    @property
    def used(self) -> tuple[int, ...]:
        """Layers whose healed weights are used."""
        return tuple(one.layer for one in self.layers if one.used)


def save_heal(report: HealReport, path: Path) -> None:
    """Write `heal.json`; the caller writes it last, after every tensor it speaks of."""
    body = cast("dict[str, Json]", to_json(report))
    write_json(path, {"schema": HEAL_SCHEMA, **body})


def load_heal(path: Path) -> HealReport:
    """Read `heal.json`.

    Raises:
        UsageError: there is no such file.
        CheckpointError: wrong types, another schema, a layer twice, or a file name that leaves the folder.
    """
    f = open_record(path, "heal", HEAL_SCHEMA)
    layers = f.children("layers", read_layer_heal)
    numbers = [one.layer for one in layers]
    if numbers != sorted(set(numbers)):
        f.refuse("layers", numbers, "every layer once, ascending")
    hashes = {name: f.digest(name) for name in ("fingerprint", "plan_fingerprint")}
    model = f.text("model_fingerprint", empty=False)
    return read(HealReport, f, layers=layers, model_fingerprint=model, **hashes)


def read_layer_heal(f: Fields) -> LayerHeal:
    """One layer of the record."""
    units = f.count("units", 1, 1 << 16)
    classes = f.child("by_class")
    one = read(
        LayerHeal,
        f,
        layer=f.count("layer", 0, 1 << 12),
        tensor=f.text("tensor", empty=False),
        units=units,
        head_dim=f.count("head_dim", 1, 1 << 16),
        kept=f.counts("kept", units - 1, distinct=True),
        file=None if f.raw("file") is None else f.file_name("file"),
        blake3=None if f.raw("blake3") is None else f.digest("blake3"),
        by_class={name: _read_class(classes.child(name)) for name in classes.names()},
    )
    if one.used is (one.file is None) or one.used is (one.blake3 is None):
        f.refuse("file", one.file, "a file and its hash exactly where the heal is used")
    return one


def _read_class(f: Fields) -> ClassResidual:
    return read(ClassResidual, f, samples=f.count("samples", 1))
