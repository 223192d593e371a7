"""Every file type of llama-quantize, byte for byte, against digests of the reference tools' own files.

The digests come from `bench/compare_gguf.py --golden`, which holds both sides against each other tensor by tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcut.checkpoint import open_checkpoint
from gemcut.export.layout import layout_of
from golden_gguf import TYPES, digests, made_imatrix, possible, write_types

ROOT = Path(__file__).parents[2]
GOLDENS: dict[str, dict[str, dict[str, str]]] = json.loads((ROOT / "tests/golden/gguf_payloads.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "imatrix"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_every_type_has_the_bytes_of_the_reference_tools(tmp_path: Path, name: str, how: str) -> None:
    checkpoint = open_checkpoint(ROOT / "demo" / name)
    layout = layout_of(checkpoint)
    goldens = GOLDENS[name][how]
    assert list(goldens) == sorted(possible(layout, imatrix=how == "imatrix"))
    assert len(goldens) >= (24 if how == "plain" else len(TYPES) - 1)
    imatrix = made_imatrix(layout, tmp_path / "imatrix.gguf") if how == "imatrix" else None
    files = write_types(checkpoint, list(goldens), imatrix, tmp_path / "out", threads=2)
    wrong = {kind for kind, digest in digests(files).items() if digest != goldens[kind]}
    assert not wrong
