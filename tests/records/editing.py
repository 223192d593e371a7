"""One value of a JSON file, changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edited(path: Path, keys: tuple[Any, ...], value: object) -> Path:
    """The same file with another value at a path of keys and indices."""
    whole = json.loads(path.read_text())
    inner = whole
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(whole))
    return path
