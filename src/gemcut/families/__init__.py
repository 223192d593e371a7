"""One architecture = one file of facts + one line in this map."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from gemcut.errors import UsageError
from gemcut.families.base import Family
from gemcut.families.gguf import GgufLayout, Value
from gemcut.families.gguf_cut import GgufCuts
from gemcut.types import Json

__all__ = [
    "ARCHITECTURES",
    "DRAFTERS",
    "Family",
    "family_names",
    "family_of",
    "gguf_cuts",
    "gguf_layout",
    "gguf_vision_layout",
    "is_drafter",
]

# `architectures[0]` of config.json → module of this package that has the FAMILY
ARCHITECTURES: Mapping[str, str] = {
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4ForCausalLM": "gemma4",
}

# the same for drafters, which nothing cuts: module of this package with `drafter(config, shapes)`
DRAFTERS: Mapping[str, str] = {"Gemma4AssistantForCausalLM": "gemma4_assistant_gguf"}

# `general.architecture` of a GGUF file that can be cut → module of this package with `cuts(metadata, shapes)`
GGUF_ARCHITECTURES: Mapping[str, str] = {"gemma4": "gemma4_gguf_cut"}


def family_names() -> tuple[str, ...]:
    """Names of the families that exist."""
    return tuple(sorted(set(ARCHITECTURES.values())))


def _architecture(config: Mapping[str, Json]) -> Json:
    architectures = config.get("architectures")
    return architectures[0] if isinstance(architectures, list) and architectures else None


def is_drafter(config: Mapping[str, Json]) -> bool:
    """Whether this is the config of a drafter."""
    return str(_architecture(config)) in DRAFTERS


def family_of(config: Mapping[str, Json]) -> Family:
    """The family of a parsed config.json.

    Raises:
        UsageError: no family knows this architecture; the message says which exist.
    """
    found = _architecture(config)
    module = ARCHITECTURES.get(found) if isinstance(found, str) else None
    if module is None:
        raise UsageError(
            "no family knows this architecture",
            where="config.json: architectures",
            got=str(found)[:80],
            wanted=" or ".join(ARCHITECTURES),
            hint=f"families that exist: {', '.join(family_names())}",
        )
    family = importlib.import_module(f"gemcut.families.{module}").FAMILY
    assert isinstance(family, Family)
    return family


def gguf_layout(config: Mapping[str, Json], shapes: Mapping[str, tuple[int, ...]]) -> GgufLayout:
    """What the GGUF file of a trunk or of a drafter holds; `shapes` of all tensors in the order of the file.

    Raises:
        UsageError: nobody knows this architecture, or it has a part that cannot be written.
        CheckpointError: config and shapes disagree.
    """
    if not is_drafter(config):
        return family_of(config).gguf(config, shapes)
    module = DRAFTERS[str(_architecture(config))]
    layout = importlib.import_module(f"gemcut.families.{module}").drafter(config, shapes)
    assert isinstance(layout, GgufLayout)
    return layout


def gguf_vision_layout(
    config: Mapping[str, Json], shapes: Mapping[str, tuple[int, ...]], preprocessor: Mapping[str, Json]
) -> GgufLayout:
    """What the mmproj file of a checkpoint holds. Raises as `gguf_layout` does, and where there is no vision tower."""
    return family_of(config).gguf_vision(config, shapes, preprocessor)


def gguf_cuts(metadata: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]]) -> GgufCuts:
    """What of an existing GGUF file can be cut; `shapes` of its tensors, rows first.

    Raises:
        UsageError: nobody knows how to cut this architecture.
        CheckpointError: metadata and shapes disagree.
    """
    found = metadata.get("general.architecture")
    module = GGUF_ARCHITECTURES.get(str(found.value)) if found is not None else None
    if module is None:
        raise UsageError(
            "no family knows how to cut this GGUF file",
            where="general.architecture",
            got="nothing" if found is None else repr(found.value)[:80],
            wanted=" or ".join(GGUF_ARCHITECTURES),
        )
    cuts = importlib.import_module(f"gemcut.families.{module}").cuts(metadata, shapes)
    assert isinstance(cuts, GgufCuts)
    return cuts
