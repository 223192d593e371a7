"""The heal's folder while it grows: what was asked for, what is finished, what a killed heal left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save

from gemcut import __version__
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError
from gemcut.records.fields import Fields, to_json
from gemcut.records.heal import HEAL_FILE, LayerHeal, load_heal, read_layer_heal
from gemcut.store import fingerprint, write_bytes
from gemcut.stream.resume import LayerWork
from gemcut.types import Json, Plan

WORK = LayerWork("heal", "heal", "model, plan, corpus or settings")


def plan_fingerprint(plan: Plan) -> str:
    """sha256 of what a plan decides: which units of which layers stay. Its reasons and its method do not enter."""
    layers: dict[str, Json] = {str(layer): list(one.keep) for layer, one in plan.layers.items()}
    return fingerprint({"model": plan.model_fingerprint, "kind": plan.kind, "units": plan.units, "layers": layers})


def request_of(base: Checkpoint, plan: Plan, source: dict[str, Json], settings: dict[str, Json]) -> dict[str, Json]:
    """Everything that decides a heal's numbers. Its fingerprint names the heal.

    Args:
        source: the text that is fitted on, by hashes.
        settings: every setting.
    """
    return {
        "model_fingerprint": base.fingerprint,
        "plan_fingerprint": plan_fingerprint(plan),
        "source": source,
        "settings": settings,
    }


def stack() -> dict[str, str]:
    """Package versions that decide the last bits."""
    return {"gemcut": __version__, **{name: version(name) for name in ("numpy", "torch", "transformers")}}


def finished(out: Path, digest: str, *, force: bool) -> bool:
    """Whether `out` is this very heal, whole.

    Raises:
        UsageError: it is something else, and not `force`.
    """
    return WORK.finished(out, digest, _fingerprint_of, force=force)


def _fingerprint_of(out: Path) -> str | None:
    return load_heal(out / HEAL_FILE).fingerprint if (out / HEAL_FILE).is_file() else None


@dataclass
class Finished:
    """Layers that the pass is through with (`next_layer` is the first that it is not), and what it found in them."""

    next_layer: int = 0
    layers: list[LayerHeal] = field(default_factory=list)
    embedded: bool = False

    def save(self, folder: Path, digest: str) -> None:
        """Make it known, atomically."""
        WORK.save(folder, digest, {"next_layer": self.next_layer, "layers": to_json(self.layers)})


def left_behind(folder: Path, digest: str, *, force: bool) -> Finished:
    """What a killed heal of the same fingerprint left in `folder`; with `force`, or where it is unusable, nothing.

    Raises:
        UsageError: an unfinished heal of another fingerprint lies there, and not `force`.
    """

    def read(f: Fields) -> Finished:
        done = Finished(f.count("next_layer"), list(f.children("layers", read_layer_heal)), embedded=True)
        for one in done.layers:
            if one.file is not None and not (folder / one.file).is_file():
                raise CheckpointError("a healed tensor is gone", where=one.file)
        return done

    return WORK.left_behind(folder, digest, read, force=force) or Finished()


def save_healed(folder: Path, layer: int, name: str, weight: torch.Tensor) -> tuple[str, str]:
    """Write one healed tensor, whole or not at all; its file name and the BLAKE3 of its bytes."""
    weight = weight.cpu().contiguous()
    file = f"layer-{layer:03d}.safetensors"
    write_bytes(folder / file, save({name: weight}, metadata={"format": "pt"}))
    raw: memoryview = weight.reshape(-1).view(torch.uint8).numpy().data
    return file, blake3(raw).hexdigest()


def tidy(folder: Path, layers: Sequence[LayerHeal]) -> None:
    """Remove all but the healed tensors: hidden states, progress, and what killed writes left."""
    kept = {one.file for one in layers}
    for stray in folder.iterdir():
        if stray.name not in kept:
            stray.unlink()
