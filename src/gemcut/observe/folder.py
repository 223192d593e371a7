"""The statistics folder while it grows: what was asked for, what is finished, what a killed pass left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemcut import __version__
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError
from gemcut.observe.settings import ObserveSettings
from gemcut.records.fields import Fields
from gemcut.records.statistics import STATISTICS_FILE, STATISTICS_SCHEMA, LayerFile
from gemcut.store import PARTIAL, disk_errors, fsync_folder, read_json, sha256_file
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import stored_dtype
from gemcut.stream.resume import LayerWork
from gemcut.stream.weights import DTYPE_NAMES
from gemcut.types import Json, Question, StatisticsMeta

REQUEST_FILE = "observation.json"
WORK = LayerWork("observation", "observe", "model, corpus or settings")


def request_of(checkpoint: Checkpoint, corpus: Corpus, settings: ObserveSettings) -> dict[str, Json]:
    """What decides every number of an observation. Its fingerprint names the observation."""
    return {
        "model_fingerprint": checkpoint.fingerprint,
        "corpus_hash": corpus.hash,
        "template_hash": corpus.template_hash,
        "bos_policy": corpus.bos_policy,
        "settings": settings.identity(DTYPE_NAMES[stored_dtype(checkpoint)]),
    }


def meta_of(checkpoint: Checkpoint, corpus: Corpus, dtype: str) -> StatisticsMeta:
    """What the sums were made of."""
    experts = [site for site in checkpoint.sites if site.kind == "experts"]
    return StatisticsMeta(
        schema=STATISTICS_SCHEMA,
        model_fingerprint=checkpoint.fingerprint,
        model_name=checkpoint.name,
        family=checkpoint.family.name,
        corpus_hash=corpus.hash,
        template_hash=corpus.template_hash,
        bos_policy=corpus.bos_policy,
        max_tokens_per_item=corpus.max_tokens_per_item,
        truncated_items=corpus.truncated_items,
        dtype=dtype,
        classes=corpus.classes,
        questions=tuple(Question(row.id, row.cls, len(row.ids), row.weight) for row in corpus.items),
        layers=tuple(site.layer for site in experts),
        experts=experts[0].units if experts else 0,
        top_k=checkpoint.family.top_k(checkpoint.text_config),
        stack={"gemcut": __version__, **{name: version(name) for name in ("numpy", "torch", "transformers")}},
    )


def finished(out: Path, digest: str, *, force: bool) -> bool:
    """Whether `out` is this very observation, whole.

    Raises:
        UsageError: it is something else, and not `force`.
    """
    return WORK.finished(out, digest, _fingerprint_of, force=force)


def _fingerprint_of(out: Path) -> str | None:
    if not (out / STATISTICS_FILE).is_file() or not (out / REQUEST_FILE).is_file():
        return None
    return str(read_json(out / REQUEST_FILE, "observation").get("fingerprint"))


@dataclass
class Finished:
    """Finished layers of a pass, in order, and the inputs that linear layers were found to share."""

    layers: list[LayerFile] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    embedded: bool = False

    def save(self, folder: Path, digest: str) -> None:
        """Make it known, atomically."""
        layers: list[Json] = [{"layer": f.layer, "file": f.file, "sha256": f.sha256} for f in self.layers]
        WORK.save(folder, digest, {"layers": layers, "aliases": dict(self.aliases)})


def left_behind(folder: Path, digest: str, *, force: bool) -> Finished:
    """What a killed pass of the same fingerprint left in `folder`; with `force`, or where it is unusable, nothing.

    Raises:
        UsageError: an unfinished pass of another fingerprint lies there, and not `force`.
    """

    def read(f: Fields) -> Finished:
        layers, aliases = f.children("layers", _layer_file), f.child("aliases")
        if [one.layer for one in layers] != list(range(len(layers))):
            f.refuse("layers", [one.layer for one in layers], "every layer from the first, in order")
        for one in layers:
            if not (folder / one.file).is_file():
                raise CheckpointError("a layer's statistics are gone", where=one.file)
        return Finished(list(layers), {name: aliases.text(name) for name in aliases.names()}, embedded=True)

    return WORK.left_behind(folder, digest, read, force=force) or Finished()


def _layer_file(f: Fields) -> LayerFile:
    one = LayerFile(layer=f.count("layer"), file=f.file_name("file"), sha256=f.digest("sha256"))
    if one.file != layer_name(one.layer):
        f.refuse("file", one.file, layer_name(one.layer))
    return one


def layer_name(layer: int) -> str:
    """File name of one layer's statistics."""
    return f"layer-{layer:03d}.safetensors"


def save_layer(folder: Path, layer: int, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> LayerFile:
    """Write one layer's statistics, whole or not at all."""
    path = folder / layer_name(layer)
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        save_file(dict(tensors), partial, metadata={"aliases": json.dumps(dict(aliases), sort_keys=True)})
        fd = os.open(partial, os.O_RDONLY)
        try:
            os.fchmod(fd, path.parent.stat().st_mode & 0o666)  # safetensors writes for the owner's eyes only
            os.fsync(fd)
        finally:
            os.close(fd)
        digest = sha256_file(partial)
        os.replace(partial, path)
        fsync_folder(folder)
    return LayerFile(layer=layer, file=path.name, sha256=digest)
