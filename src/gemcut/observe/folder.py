"""The statistics folder while it grows: what was asked for, what is finished, what a killed pass left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemcut import __version__
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.observe.settings import ObserveSettings
from gemcut.records.statistics import STATISTICS_FILE, STATISTICS_SCHEMA, LayerFile
from gemcut.store import PARTIAL, disk_errors, fsync_folder, read_json, sha256_file, write_json
from gemcut.stream.corpus import Corpus
from gemcut.stream.model import stored_dtype
from gemcut.stream.weights import DTYPE_NAMES
from gemcut.types import Json, Question, StatisticsMeta

REQUEST_FILE = "observation.json"
PROGRESS_FILE = "progress.json"
_FORCE = "choose another -o, or pass --force to observe again"


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
    if force or not out.exists():
        return False
    if not (out / STATISTICS_FILE).is_file() or not (out / REQUEST_FILE).is_file():
        raise UsageError("the output exists and is no observation", where=str(out), hint=_FORCE)
    found = read_json(out / REQUEST_FILE, "observation").get("fingerprint")
    if found != digest:
        raise UsageError(
            "the output holds an observation of another model, corpus or settings",
            where=str(out),
            got=f"{str(found)[:12]}…",
            wanted=f"{digest[:12]}…",
            hint=_FORCE,
        )
    return True


@dataclass
class Finished:
    """Finished layers of a pass, in order, and the inputs that linear layers were found to share."""

    layers: list[LayerFile] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    embedded: bool = False

    def save(self, folder: Path, digest: str) -> None:
        """Make it known, atomically."""
        layers: list[Json] = [{"layer": f.layer, "file": f.file, "sha256": f.sha256} for f in self.layers]
        write_json(folder / PROGRESS_FILE, {"fingerprint": digest, "layers": layers, "aliases": dict(self.aliases)})


def left_behind(folder: Path, digest: str, *, force: bool) -> Finished:
    """What a killed pass of the same fingerprint left in `folder`; with `force`, or where it is unusable, nothing.

    Raises:
        UsageError: an unfinished pass of another fingerprint lies there, and not `force`.
    """
    if not folder.exists():
        return Finished()
    path = folder / PROGRESS_FILE
    if force or not path.is_file():
        shutil.rmtree(folder)
        return Finished()
    try:
        body = read_json(path, "progress")
        found, layers, aliases = body["fingerprint"], body["layers"], body["aliases"]
        if found != digest:
            raise UsageError(
                "an unfinished observation of another model, corpus or settings lies in the way",
                where=str(folder),
                got=f"{str(found)[:12]}…",
                wanted=f"{digest[:12]}…",
                hint=_FORCE,
            )
        assert isinstance(layers, list)
        assert isinstance(aliases, dict)
        files = [_layer_file(entry) for entry in layers]
        if [f.layer for f in files] != list(range(len(files))) or not all((folder / f.file).is_file() for f in files):
            raise KeyError("layers")
        return Finished(files, {str(k): str(v) for k, v in aliases.items()}, embedded=True)
    except (KeyError, AssertionError, CheckpointError):
        shutil.rmtree(folder)
        return Finished()


def _layer_file(entry: Json) -> LayerFile:
    assert isinstance(entry, dict)
    layer, file, digest = entry["layer"], entry["file"], entry["sha256"]
    assert isinstance(layer, int)
    assert file == layer_name(layer)
    return LayerFile(layer=layer, file=layer_name(layer), sha256=str(digest))


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
