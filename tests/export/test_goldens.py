"""Every file type of llama-quantize, byte for byte, against digests of the reference tools' own files.

The digests come from `bench/compare_gguf.py --golden`, which holds both sides against each other tensor by tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from gemcut.checkpoint import open_checkpoint
from gemcut.export.layout import layout_of
from gemcut.ggml.model import Model
from gemcut.gguf_file import GgufFile, read_gguf
from golden_gguf import TYPES, digests, made_imatrix, possible, write_types

ROOT = Path(__file__).parents[2]
THEIR_TYPES = {int(kind) for kind in GGMLQuantizationType}
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
    for path in files.values():
        ours = read_gguf(path)
        if {int(ref.kind) for ref in ours.tensors.values()} <= THEIR_TYPES:
            assert_read_by_others(path, ours)
        else:  # the package is older than the library
            assert path.stem.endswith("Q2_0")
        with Model(path, threads=1, context=64) as model:
            tokens = model.tokenise("def add(a, b):")
            assert np.isfinite(model.logits(tokens)).all(), path.name
            assert len(model.generate(tokens, 4, stop=False)) == 4, path.name


def assert_read_by_others(path: Path, ours: GgufFile) -> None:
    """The gguf package finds the same tensors at the same places, with the same bytes."""
    theirs = GGUFReader(path).tensors
    found = [(t.name, t.tensor_type.name, tuple(t.shape)[::-1], t.data_offset) for t in theirs]
    assert found == [(ref.name, ref.kind.name, ref.shape, ref.start) for ref in ours.tensors.values()], path.name
    for tensor in theirs:
        assert tensor.data.tobytes() == ours.read(tensor.name).tobytes(), (path.name, tensor.name)
