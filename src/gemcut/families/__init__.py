"""One architecture = one file of facts + one line in this map."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from gemcut.errors import UsageError
from gemcut.families.base import Family
from gemcut.types import Json

__all__ = ["ARCHITECTURES", "Family", "family_names", "family_of"]

# `architectures[0]` of config.json → module of this package that has the FAMILY
ARCHITECTURES: Mapping[str, str] = {
    "Gemma4ForConditionalGeneration": "gemma4",
    "Gemma4ForCausalLM": "gemma4",
}


def family_names() -> tuple[str, ...]:
    """Names of the families that exist."""
    return tuple(sorted(set(ARCHITECTURES.values())))


def family_of(config: Mapping[str, Json]) -> Family:
    """The family of a parsed config.json.

    Raises:
        UsageError: no family knows this architecture; the message says which exist.
    """
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
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
