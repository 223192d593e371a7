"""A vision tower as GGUF, in the pinned library: pictures embed as in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.mtmd import picture_embeddings
from tests.contract.stock import load
from tests.contract.test_gguf import written

from gemcut.checkpoint import open_checkpoint
from tiny import VISION, add_vision, make_tiny

# At least 70 tokens, so that llama.cpp does not enlarge it, and sides that are multiples of patch · pooling.
WIDTH, HEIGHT = 144, 144


@pytest.mark.parametrize("config", [{}, {"use_clipped_linears": False, "standardize": False, "pooling_kernel_size": 2}])
def test_pictures_embed_as_in_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    """float32 on both sides. llama.cpp's other GELU, which it takes without clip.use_gelu, is 0.4 % away."""
    folder = add_vision(make_tiny(tmp_path / "moe", "moe", dtype="float32"), **config)
    (folder / "processor_config.json").unlink()  # mean 0 and deviation 1
    base = open_checkpoint(folder)
    picture = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ours = picture_embeddings(written(base, tmp_path), written(base, tmp_path, projector="F32"), picture)

    side = VISION["patch_size"]
    rows, columns = HEIGHT // side, WIDTH // side
    patches = (picture.astype(np.float32) / 255).reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4)
    y, x = np.mgrid[0:rows, 0:columns]
    places = torch.from_numpy(np.stack([x.ravel(), y.ravel()], -1))[None]
    with torch.no_grad():
        found = load(base).get_image_features(torch.from_numpy(patches.reshape(1, rows * columns, -1)), places)
    theirs = torch.cat(list(found.pooler_output)).numpy()
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= 2e-4 * np.linalg.norm(theirs)
