"""NVFP4 folders as GGUF files: nothing is rounded on the way, in either layout, whatever 64 does not divide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.checkpoint.values import decode
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.nvfp4.convert import convert, plan_conversion
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.export.repacked import repack, to_blocks
from gemcut.exporting import GgufWords, plan_export, write_export
from gemcut.ggml.model import Model
from gemcut.nvfp4.decode import dequantise
from gemcut.nvfp4.plain import Packed, divisor, plain_tensors
from observed import EVEN, statistics
from tiny import add_vision, make_tiny

DEMO = Path(__file__).parents[2] / "demo"
SCHEMES = ("a16", "w4a4", "a16-modelopt", "w4a4-modelopt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """A small mixture with a tower: all of its matrices in NVFP4, by scheme and layout."""
    at = tmp_path_factory.mktemp("folders")
    base = open_checkpoint(add_vision(make_tiny(at / "base")))
    seen = statistics(at / "seen", base, EVEN)
    out = {"base": base}
    for name, settings in (
        ("a16", Settings("NVFP4A16", "all")),
        ("w4a4", Settings("NVFP4", "all", kv="bound")),
    ):
        write_nvfp4(prepare(base, settings, seen), at / name)
        out[name] = open_checkpoint(at / name, any_architecture=True)
        convert(plan_conversion(out[name], "modelopt"), at / f"{name}-modelopt")
        out[f"{name}-modelopt"] = open_checkpoint(at / f"{name}-modelopt", any_architecture=True)
    return out


def export(folder: Checkpoint, out: Path, **words: object) -> Path:
    """The model file."""
    planned = plan_export(folder, GgufWords(("NVFP4",), **words))  # type: ignore[arg-type]
    write_export(planned, out, threads=2)
    return out / planned[0].planned[0].target.name


def stored(tensor: gguf.ReaderTensor) -> np.ndarray:
    """float32 of a tensor, rows first, as the gguf package reads it."""
    if tensor.tensor_type is GGMLQuantizationType.F32:
        return np.array(tensor.data)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_every_code_and_every_scale_keep_their_place() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (127, 64), np.uint8)
    scales = np.arange(127, dtype=np.uint8)[:, None].repeat(8, 1)  # every positive e4m3 number there is
    scales[:, 1::2] = scales[::-1, 1::2]
    blocks = to_blocks(codes, scales).reshape(127, -1)
    assert blocks.shape == (127, 2 * 36)
    read = gguf.quants.dequantize(blocks, GGMLQuantizationType.NVFP4)
    assert np.array_equal(read, dequantise(codes, scales, 1.0))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_tensor_reads_back(folders: dict[str, Checkpoint], tmp_path: Path, scheme: str) -> None:
    folder = folders[scheme]
    file = {tensor.name: tensor for tensor in GGUFReader(export(folder, tmp_path)).tensors}
    plain = plain_tensors(folder)
    factors = {
        layer: decode("BF16", folder.read(f"model.language_model.layers.{layer}.router.per_expert_scale"))
        for layer in range(6)
    }
    held = set()
    for name, matrices in plain.packed.items():
        layer = name.partition("layers.")[2].partition(".")[0]
        for one in matrices:
            expert, tail = _place(one, layer)
            held |= {f"{tail}.weight", f"{tail}.scale"}
            values, scales = stored(file[f"{tail}.weight"]), np.array(file[f"{tail}.scale"].data)
            values = values if expert is None else values[expert]
            scale = scales[expert or 0]
            codes, blocks = folder.read(one.codes.name), folder.read(one.scales.name)
            rows = (one.matrix.rows, -1)
            assert np.array_equal(values, dequantise(codes.reshape(rows), blocks.reshape(rows), 1.0)), tail
            inverse = np.float32(1 / divisor(folder, one.scale, plain.told.layout))
            given = factors[int(layer)]
            factor = np.float32(given[expert]) if tail.endswith("down_exps") and given is not None else np.float32(1)
            assert scale == inverse * factor, tail
            meant = dequantise(codes.reshape(rows), blocks.reshape(rows), float(1 / np.float64(inverse))) * factor
            np.testing.assert_allclose(values * scale, meant, rtol=2**-21, atol=0)
            if one.inputs is not None:
                inputs = np.array(file[f"{tail}.input_scale"].data)
                assert inputs[expert or 0] == np.float32(1 / divisor(folder, one.inputs, plain.told.layout))
                held.add(f"{tail}.input_scale")
    base = {t.name: t for t in GGUFReader(_bf16(folders["base"], tmp_path)).tensors}
    for name in file.keys() - held:
        assert np.array_equal(stored(file[name]), stored(base[name])), name
    gone = {name for name in base if name.removesuffix(".weight").endswith(("gate_up_exps",))}
    assert base.keys() - file.keys() == gone


def _place(one: Packed, layer: str) -> tuple[int | None, str]:
    """Which expert a matrix is, None for a plain one, and what its tensor is called in the file."""
    _, _, inside = one.matrix.module.partition(f"layers.{layer}.")
    if inside.startswith("experts."):
        _, expert, projection = inside.split(".")
        return int(expert), f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps"
    first, projection = inside.removesuffix("_proj").split(".")
    if first == "mlp":
        return None, f"blk.{layer}.ffn_{projection}"
    return None, f"blk.{layer}.attn_{'output' if projection == 'o' else projection}"


def _bf16(base: Checkpoint, out: Path) -> Path:
    planned = plan_export(base, GgufWords(("BF16",)))
    write_export(planned, out, threads=1)
    return out / planned[0].planned[0].target.name


def test_types_and_what_is_said(
    folders: dict[str, Checkpoint], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = GGUFReader(export(folders["a16"], tmp_path, overrides=("token_embd=q8_0",)))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_gate_exps.weight"] == "NVFP4"
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.ffn_down_exps.weight"] == "BF16"  # 96 and 32 columns
    assert kinds["token_embd.weight"] == "Q8_0"
    assert "BF16" in caplog.text
    assert "96 columns" in caplog.text
    assert reader.fields["general.file_type"].contents() == 39
    names = reader.fields["general.tensor_extra.name"].contents()
    assert set(names) == {name for name, kind in kinds.items() if kind == "NVFP4"}
    assert not any(reader.fields["general.tensor_extra.prec_a4"].contents())  # activations stay as they are
    other = GGUFReader(export(folders["w4a4"], tmp_path / "w4a4"))
    assert "general.tensor_extra.name" not in other.fields


def test_an_fp8_cache_has_no_place_in_the_file(folders: dict[str, Checkpoint]) -> None:
    for scheme in ("w4a4", "w4a4-modelopt"):
        _, layout = repack(folders[scheme])
        cache = [name for name, why in layout.left_out.items() if "FP8 cache" in why]
        assert len(cache) == 12
        assert all(name.endswith(("k_scale", "v_scale")) for name in cache)


def test_both_layouts_and_any_threads_give_the_same_payload(folders: dict[str, Checkpoint], tmp_path: Path) -> None:
    payloads = []
    for number, scheme in enumerate(("a16", "a16-modelopt")):
        planned = plan_export(folders[scheme], GgufWords(("NVFP4",)))
        write_export(planned, tmp_path / scheme, threads=number + 1)
        file = GGUFReader(tmp_path / scheme / planned[0].planned[0].target.name)
        payloads.append({tensor.name: bytes(tensor.data) for tensor in file.tensors})
    assert payloads[0] == payloads[1]


def test_a_broken_off_run_goes_on(folders: dict[str, Checkpoint], tmp_path: Path) -> None:
    planned = plan_export(folders["w4a4"], GgufWords(("NVFP4",)))

    def stop(done: int, total: int, label: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(planned, tmp_path / "a", threads=1, progress=stop)
    assert not list((tmp_path / "a").glob("*.gguf"))
    report = write_export(planned, tmp_path / "a", threads=1)[0].files[0]
    assert report.resumed > 20
    assert write_export(planned, tmp_path / "a", threads=1)[0].files[0].found
    write_export(planned, tmp_path / "b", threads=1)
    assert (tmp_path / "a" / report.name).read_bytes() == (tmp_path / "b" / report.name).read_bytes()


def test_the_tower_is_the_base_s(folders: dict[str, Checkpoint], tmp_path: Path) -> None:
    files = []
    for name in ("base", "a16-modelopt"):
        planned = plan_export(folders[name], GgufWords((), projectors=("F16",)))
        write_export(planned, tmp_path / name, threads=1)
        reader = GGUFReader(tmp_path / name / planned[0].planned[0].target.name)
        files.append({tensor.name: bytes(tensor.data) for tensor in reader.tensors})
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (GgufWords(("Q4_K_M",)), "stored as it is"),
        (GgufWords(("NVFP4", "Q8_0")), "stored as it is"),
        (GgufWords(("NVFP4",), pad_experts=True), "stored as it is"),
        (GgufWords(("NVFP4",), imatrix=Path("any.gguf")), "stored as it is"),
        (GgufWords(("NVFP4",), overrides=("ffn_down=q8_0",)), "binds nothing"),
    ],
)
def test_nothing_is_quantised_twice(folders: dict[str, Checkpoint], words: GgufWords, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        plan_export(folders["a16"], words)


def test_sixteen_bits_hold_the_same(folders: dict[str, Checkpoint], tmp_path: Path) -> None:
    planned = plan_export(folders["w4a4"], GgufWords(("NVFP4", "BF16", "nvfp4")))
    write_export(planned, tmp_path, threads=1)
    narrow, wide = (
        {tensor.name: tensor for tensor in GGUFReader(tmp_path / f"w4a4-{kind}.gguf").tensors}
        for kind in ("NVFP4", "BF16")
    )
    assert narrow.keys() == wide.keys()
    assert {tensor.tensor_type.name for tensor in wide.values()} == {"BF16", "F32"}
    for name, tensor in narrow.items():
        assert np.array_equal(stored(tensor), stored(wide[name])), name


def test_a_plain_checkpoint_is_sent_through_nvfp4_first(folders: dict[str, Checkpoint]) -> None:
    with pytest.raises(UsageError) as caught:
        plan_export(folders["base"], GgufWords(("NVFP4",)))
    assert "gemcut nvfp4 MODEL" in str(caught.value.hint)


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x80, 0xB8])
def test_a_block_s_scale_is_a_positive_number(folders: dict[str, Checkpoint], tmp_path: Path, byte: int) -> None:
    shutil.copytree(folders["a16"].path, tmp_path / "folder")
    ref = folders["a16"].ref("model.language_model.layers.3.experts.5.up_proj.weight_scale")
    with open(tmp_path / "folder" / ref.shard, "r+b") as f:
        f.seek(ref.start + 7)
        f.write(bytes([byte]))
    found = open_checkpoint(tmp_path / "folder", any_architecture=True)
    with pytest.raises(CheckpointError, match="NaN or negative") as caught:
        export(found, tmp_path / "out")
    assert "layers.3.experts.5.up_proj" in str(caught.value.where)
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_ranges_need_not_begin_with_a_row(folders: dict[str, Checkpoint]) -> None:
    view, layout = repack(folders["a16"])
    for tensor in layout.tensors:
        if tensor.source in view.matrices:
            whole = view.read(tensor.source)
            assert np.array_equal(view.read_range(tensor.source, 37, len(whole) - 5), whole[37:-5])
    with pytest.raises(CheckpointError, match="outside the tensor"):
        view.read_range(next(iter(view.matrices)), 0, 1 << 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_library_loads_it_and_says_what_the_matrices_say(tmp_path: Path, name: str) -> None:
    base = open_checkpoint(DEMO / name)
    write_nvfp4(prepare(base, Settings("NVFP4A16", "all")), tmp_path / "folder")
    file = export(open_checkpoint(tmp_path / "folder", any_architecture=True), tmp_path)
    tokens: list[int] = []
    logits, said = [], []
    for path in (_bf16(base, tmp_path), file):
        with Model(path, threads=1, context=512) as model:
            tokens = tokens or [model.bos, *model.tokenise(prompt())][:160]  # type: ignore[list-item]
            logits.append(model.logits(tokens).astype(np.float64))
            said.append(model.generate(tokens, 16))
    assert len(set(said[1])) > 1
    assert np.mean(logits[0].argmax(1) == logits[1].argmax(1)) > 0.9
    p, q = (one - np.log(np.exp(one).sum(1, keepdims=True)) for one in logits)
    assert float((np.exp(p) * (p - q)).sum(1).mean()) < 0.03


def prompt() -> str:
    with open(DEMO / "corpus" / "heldout.jsonl", encoding="utf-8") as f:
        return str(json.loads(f.readline())["text"])
