"""What ships with the project: names like `demo:moe` and `demo:calibration` that recipes and verbs may say."""

from __future__ import annotations

import os
from pathlib import Path

from gemcut.errors import MissingError, UsageError

MODELS = {
    "demo:moe": "moe",
    "demo:dense": "dense",
    "demo:moe-drafter": "moe-drafter",
    "demo:dense-drafter": "dense-drafter",
}
CORPORA = {"demo:calibration": "corpus/calibration.jsonl", "demo:heldout": "corpus/heldout.jsonl"}


def demo_folder() -> Path:
    """The folder `demo/` of the source tree, or $GEMCUT_DEMO.

    Raises:
        MissingError: gemcut was installed without its source tree.
    """
    said = os.environ.get("GEMCUT_DEMO")
    folder = Path(said) if said else Path(__file__).parents[2] / "demo"
    if not (folder / "moe" / "config.json").is_file():
        raise MissingError(
            "the demo checkpoints are not here",
            where=str(folder),
            hint="they lie in demo/ of the source tree: clone it, or set GEMCUT_DEMO to that folder",
        )
    return folder


def _known(ref: str, names: dict[str, str], what: str) -> Path | None:
    if not ref.startswith("demo:"):
        return None
    if ref not in names:
        raise UsageError(f"there is no such demo {what}", got=ref, wanted=" or ".join(names))
    return demo_folder() / names[ref]


def model_path(ref: str) -> Path | None:
    """The folder of a shipped model, None where the reference is not one."""
    return _known(ref, MODELS, "model")


def corpus_path(ref: str) -> Path:
    """The file of a corpus: a shipped name, or a path."""
    return _known(ref, CORPORA, "corpus") or Path(ref)
