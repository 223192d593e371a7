"""NVFP4 checkpoints, streamed, against compressed-tensors: equal to the bit, weights and activations alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.stream.test_model import streamed_logits

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.nvfp4.convert import convert, plan_conversion
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.stream.model import StreamedModel
from gemcut.stream.rounding import round_to_nvfp4
from gemcut.stream.whole import load_whole
from observed import EVEN, statistics
from tiny import make_tiny

IDS = torch.from_numpy(np.random.default_rng(0).integers(10, 300, (2, 24)))


def theirs(x: torch.Tensor, scale: float) -> torch.Tensor:
    """compressed-tensors' own rounding of a linear's input."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args, shared = NVFP4["input_activations"], torch.tensor([scale], dtype=torch.float32)
    scales, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=shared)
    return fake_quantize(x, scales, zero, args, global_scale=shared)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    st.floats(2**-8, 2**16, width=32),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
)
@settings(max_examples=200, deadline=None)
def test_inputs_are_rounded_as_compressed_tensors_rounds(values: list[float], scale: float, dtype: torch.dtype) -> None:
    x = torch.tensor(values).to(dtype).reshape(2, 16)
    assert torch.equal(round_to_nvfp4(x, scale), theirs(x, scale))


def test_ties_empty_blocks_and_outliers() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2)
    quiet, loud = torch.full((16,), 1e-6), torch.full((16,), 3e4)
    x = torch.stack([ties, -ties, torch.zeros(16), quiet, loud])
    found = round_to_nvfp4(x, 448.0)  # the largest value of the first block is 6: its scale is 448 / 448
    assert found[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert torch.equal(found, theirs(x, 448.0))
    assert not found[2:4].any()
    assert found[4].unique().tolist() == [6.0]  # beyond what the calibration saw


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 48)
    whole = round_to_nvfp4(x, 100.0)
    monkeypatch.setattr("gemcut.stream.rounding._PIECE_ELEMENTS", 64)
    assert torch.equal(round_to_nvfp4(x, 100.0), whole)


@pytest.fixture(scope="module", params=["dense", "moe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return open_checkpoint(make_tiny(folder, request.param, initializer_range=0.3))


@pytest.fixture(scope="module")
def stats(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return statistics(tmp_path_factory.mktemp("observed") / "s", base, EVEN)


def exported(base: Checkpoint, stats: Path, out: Path, scheme: str, targets: str, **words: str) -> Checkpoint:
    write_nvfp4(prepare(base, Settings(scheme, targets, **words), stats), out)  # type: ignore[arg-type]
    return open_checkpoint(out)


def logits(checkpoint: Checkpoint, dtype: str) -> torch.Tensor:
    return streamed_logits(checkpoint.path, IDS, dtype=dtype, experts="recording", packed=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("scheme", "targets", "kv"),
    [
        ("NVFP4A16", "all", "none"),
        ("NVFP4A16", "mlp", "one"),
        ("NVFP4", "mlp+experts", "none"),
        ("NVFP4", "all", "bound"),
    ],
)
def test_streamed_logits_are_those_of_the_model_in_memory(
    base: Checkpoint, stats: Path, tmp_path: Path, scheme: str, targets: str, kv: str, dtype: str
) -> None:
    found = exported(base, stats, tmp_path / "out", scheme, targets, kv=kv)
    whole = load_whole(found, dtype=getattr(torch, dtype), attention="sdpa", experts="eager")
    with torch.no_grad():
        want = whole(input_ids=IDS, use_cache=False).logits
    streamed = logits(found, dtype)
    assert torch.equal(streamed, want)
    assert not torch.equal(streamed, logits(base, dtype))


def test_both_layouts_run_to_the_same_bits(base: Checkpoint, stats: Path, tmp_path: Path) -> None:
    one = exported(base, stats, tmp_path / "one", "NVFP4", "all", kv="one")
    convert(plan_conversion(one, "modelopt"), tmp_path / "other")
    assert torch.equal(logits(one, "bfloat16"), logits(open_checkpoint(tmp_path / "other"), "bfloat16"))


def test_activations_are_rounded_where_the_checkpoint_says_so(base: Checkpoint, stats: Path, tmp_path: Path) -> None:
    """The same weights with and without scales of inputs differ by the rounding alone; a layer leaves no hook."""
    rounded = exported(base, stats, tmp_path / "w4a4", "NVFP4", "all", scales="sweep")
    plain = exported(base, stats, tmp_path / "a16", "NVFP4A16", "all", scales="sweep")
    assert not torch.equal(logits(rounded, "float32"), logits(plain, "float32"))
    with StreamedModel.open(rounded, experts="recording", packed=True) as model:
        with model.layer(0) as layer:
            assert len(layer.mlp.gate_proj._forward_pre_hooks) == 1
        assert not layer.mlp.gate_proj._forward_pre_hooks
        assert all(parameter.is_meta for parameter in layer.parameters())


def test_only_what_asks_for_packed_weights_gets_them(base: Checkpoint, stats: Path, tmp_path: Path) -> None:
    found = exported(base, stats, tmp_path / "out", "NVFP4", "mlp+experts")
    with pytest.raises(UsageError, match="can be measured"):
        StreamedModel.open(found)
    if base.name == "moe":
        with pytest.raises(UsageError, match="another implementation"):
            StreamedModel.open(found, packed=True)


def test_experts_whose_inputs_have_two_scales_are_refused(tmp_path: Path) -> None:
    base = open_checkpoint(make_tiny(tmp_path / "moe", shards=1))
    stats = statistics(tmp_path / "s", base, EVEN)
    out = exported(base, stats, tmp_path / "out", "NVFP4", "mlp+experts")
    tensors = load_file(out.path / "model.safetensors")
    name = "model.language_model.layers.2.experts.5.up_proj.input_global_scale"
    tensors[name] *= 2
    save_file(tensors, out.path / "model.safetensors")
    with StreamedModel.open(open_checkpoint(out.path), experts="recording", packed=True) as model:
        with model.layer(1):
            pass
        with pytest.raises(CheckpointError, match="different scales of its inputs"), model.layer(2):
            pass
