"""All keys of a GGUF file, in the order of llama.cpp's converter: who made the model, how it is sampled, its numbers.

    general.architecture, type · general.sampling.* of generation_config.json · name, licence, base models, tags of the
    model card · the architecture's own keys · general.quantization_version · tokenizer.*

A name comes from the card, from config.json or from the folder; a path of somebody's machine is never written.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import yaml

from gemcut.errors import CheckpointError
from gemcut.export.model_name import NameParts, name_parts, title
from gemcut.export.tokenizer import read_bytes, read_object, tokenizer_metadata
from gemcut.families.gguf import GgufLayout, ScalarKind, Value, size_label
from gemcut.types import Json

logger = logging.getLogger(__name__)

QUANTIZATION_VERSION = 2  # of ggml's block formats
PROJECTOR = "clip"  # architecture of an mmproj file

# general.sampling.X → type, and the keys of generation_config.json that say it
_SAMPLING: Mapping[str, tuple[ScalarKind, tuple[str, ...]]] = {
    "sequence": ("str", ("sequence",)),
    "top_k": ("i32", ("top_k",)),
    "top_p": ("f32", ("top_p",)),
    "min_p": ("f32", ("min_p",)),
    "xtc_probability": ("f32", ("xtc_probability",)),
    "xtc_threshold": ("f32", ("xtc_threshold",)),
    "temp": ("f32", ("temperature",)),
    "penalty_last_n": ("i32", ("penalty_last_n",)),
    "penalty_repeat": ("f32", ("penalty_repeat", "repetition_penalty")),
    "mirostat": ("i32", ("mirostat",)),
    "mirostat_tau": ("f32", ("mirostat_tau",)),
    "mirostat_eta": ("f32", ("mirostat_eta",)),
}
# general.X → keys of the model card that say it, the first that is there wins
_CARD: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}
_SOURCES = {
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "dataset": ("datasets", "dataset", "dataset_sources"),
}
_SOURCE_KEYS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")
_HUB = re.compile(r"https?://huggingface\.co/([^/]+/[^/]+)")
_MAX_CARD_BYTES = 4 << 20


def file_metadata(
    folder: Path, config: Mapping[str, Json], layout: GgufLayout, *, name: str, file_type: int
) -> dict[str, Value]:
    """Every key of the file but the exporter's own provenance.

    Args:
        folder: the checkpoint: README.md, generation_config.json and the tokenizer are read from it.
        name: what the model is called where neither card nor config says: the hub id or the folder's name.
        file_type: number of the file's type, `general.file_type`.
    Raises:
        CheckpointError: see `tokenizer_metadata`.
    """
    projector = layout.architecture == PROJECTOR
    out = {
        "general.architecture": Value("str", layout.architecture),
        "general.type": Value("str", "mmproj" if projector else "model"),
        **_sampling(folder),
        **_authorship(_model_card(folder), config, name, layout),
        **layout.metadata,
        "general.file_type": Value("u32", file_type),
        "general.quantization_version": Value("u32", QUANTIZATION_VERSION),
    }
    if not projector:
        rows = next(tensor.shape[0] for tensor in layout.tensors if tensor.role == "token_embd")
        out |= tokenizer_metadata(folder, rows=rows)
    return out


def parameter_label(layout: GgufLayout) -> tuple[int, str]:
    """Parameters of all tensors, and how the file says so; see `size_label`."""
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    return sum(prod(shape) for shape in shapes.values()), size_label(shapes)


def _sampling(folder: Path) -> dict[str, Value]:
    try:
        said = read_object(folder, "generation_config.json")
    except CheckpointError as error:
        logger.warning("generation_config.json is left out: %s", error.what)
        return {}
    out = {}
    for key, (kind, names) in _SAMPLING.items():
        value = next((said[n] for n in names if said.get(n) is not None), None)
        if kind == "str" and isinstance(value, str) and value:
            out[f"general.sampling.{key}"] = Value(kind, value)
        elif kind != "str" and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 31:
            out[f"general.sampling.{key}"] = Value(kind, int(value) if kind == "i32" else float(value))
    return out


def _model_card(folder: Path) -> dict[str, Json]:
    """The YAML block at the top of README.md; empty where there is none, or none that can be read."""
    raw = read_bytes(folder, "README.md")
    if raw is None or len(raw) > _MAX_CARD_BYTES:
        return {}
    lines = raw.decode("utf-8", "replace").splitlines()
    if lines[:1] != ["---"]:
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    block = "".join(f"{line}\n" for line in lines[1:end]).replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        card = yaml.safe_load(block)
    except (yaml.YAMLError, RecursionError, ValueError):
        logger.warning("the front matter of README.md is no YAML: names, licence and tags are left out")
        return {}
    return card if isinstance(card, dict) else {}


def _authorship(
    card: Mapping[str, Json], config: Mapping[str, Json], name: str, layout: GgufLayout
) -> dict[str, Value]:
    parameters, label = parameter_label(layout)
    said: dict[str, Json] = {}
    for key, names in _CARD.items():
        said[key] = next((card[n] for n in names if card.get(n) is not None), None)
    path = config.get("_name_or_path")
    ids = ([path] if isinstance(path, str) and path and not _is_path(path) else []) + [name.rstrip("/")]
    for parts in (name_parts(model_id, parameters) for model_id in ids if model_id):
        for key, guess in _guesses(parts).items():
            if said[key] is None:
                said[key] = guess
    if said["size_label"] is None:
        said["size_label"] = label
    out = {}
    for key, value in said.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        if text:
            out[f"general.{key}"] = Value("str", text)
    for kind, keys in _SOURCES.items():
        out |= _sources(kind, next((card[k] for k in keys if card.get(k) is not None), None), parameters)
    for kind, list_keys in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        found = tuple(str(item) for key in list_keys for item in _as_list(card.get(key)))
        if found:
            out[f"general.{kind}"] = Value("str", found)
    return out


def _guesses(parts: NameParts) -> dict[str, str | None]:
    return {
        "name": None if parts.name is None else title(parts.name),
        "organization": None if parts.organization is None else title(parts.organization),
        "basename": parts.basename,
        "finetune": parts.finetune,
        "version": parts.version,
        "size_label": parts.size_label,
    }


def _is_path(text: str) -> bool:
    """A place on somebody's disk, not a model's name."""
    return text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1 or text[1:2] == ":"


def _as_list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _sources(kind: str, said: Json, parameters: int) -> dict[str, Value]:
    """`general.base_model.*` or `general.dataset.*`: how many, and what is known of each."""
    if said is None:
        return {}
    entries = [_source(entry, parameters) for entry in _as_list(said)]
    out = {f"general.{kind}.count": Value("u32", len(entries))}
    for i, entry in enumerate(entries):
        for key in _SOURCE_KEYS:
            if entry.get(key):
                out[f"general.{kind}.{i}.{key}"] = Value("str", entry[key])
    return out


def _source(entry: Json, parameters: int) -> dict[str, str]:
    if isinstance(entry, dict):
        return {key: str(value) for key, value in entry.items() if value is not None}
    if not isinstance(entry, str):
        return {}
    out = {}
    model_id = entry
    if entry.startswith(("http://", "https://", "ssh://")):
        out["repo_url"] = entry
        match = _HUB.fullmatch(entry)
        if match is None:
            return out
        model_id = match[1]
    elif _is_path(entry):
        return {"name": title(re.split(r"[/\\]", entry.rstrip("/\\"))[-1])}
    parts = name_parts(model_id, parameters)
    guesses = _guesses(parts)
    out |= {key: value for key in ("name", "organization", "version") if (value := guesses[key]) is not None}
    if parts.organization is not None and parts.name is not None:
        out.setdefault("repo_url", f"https://huggingface.co/{parts.organization}/{parts.name}")
    return out
