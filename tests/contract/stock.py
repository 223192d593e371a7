"""What the contracts of experts and of heads share: stock transformers, equal folders, and a flipped byte."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gemcut.checkpoint import open_checkpoint
from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError
from gemcut.surgery import verify_cut
from gemcut.types import Plan, TensorRef


def load(checkpoint: Checkpoint) -> Any:
    """The stock model; every tensor has found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """[3, 40, V] of fixed token ids, BOS first."""
    ids = torch.randint(10, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out


def speaks(model: Any) -> None:
    """It generates."""
    generated = model.generate(torch.tensor([[2, 20, 30]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 3


def same_bytes(a: Path, b: Path) -> None:
    """Every file of the first folder stands in the second, byte by byte."""
    for path in a.iterdir():
        one, other = (hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, b / path.name))
        assert one == other, path.name


def a_flipped_byte_is_caught(
    out: Checkpoint, base: Checkpoint, plan: Plan, refs: Sequence[TensorRef], seed: int
) -> None:
    """One bit of one of these tensors of the cut; `verify_cut` names it. The cut is whole again afterwards."""
    ref = random.Random(seed).choice(refs)
    path = out.path / ref.shard
    at = random.Random(seed).randrange(ref.start, ref.stop)
    clean = path.read_bytes()
    raw = bytearray(clean)
    raw[at] ^= 1
    path.unlink()  # a new file: the old inode may be linked to the base
    path.write_bytes(raw)
    try:
        with pytest.raises(CheckpointError) as caught:
            verify_cut(open_checkpoint(out.path), base, plan)
        assert ref.name in str(caught.value)
    finally:
        path.write_bytes(clean)
    verify_cut(open_checkpoint(out.path), base, plan)
