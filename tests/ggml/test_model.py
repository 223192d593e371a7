"""Models that llama.cpp runs: the numbers of transformers, states that the head explains, files that it refuses."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemcut import exporting
from gemcut.checkpoint import open_checkpoint
from gemcut.errors import CheckpointError, ToolError, UsageError
from gemcut.ggml.model import Model
from gemcut.ggml.quantise import dequantise
from gemcut.gguf_file.header import open_gguf

DEMO = Path(__file__).parents[2] / "demo"
IDS = [2, *(int(i) for i in np.random.default_rng(0).integers(10, 300, 70))]


def exported(folder: Path, out: Path, *types: str, max_shard_bytes: int | None = None) -> Path:
    words = exporting.GgufWords(types, max_shard_bytes=max_shard_bytes)
    exporting.write_export(exporting.plan_export(open_checkpoint(folder), words), out, threads=1)
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    folder = make_tiny(path / "tiny", "dense", initializer_range=0.1, dtype="float32")
    exported(folder, path, "F32", "Q8_0")
    return path


@pytest.fixture(scope="module")
def plain(root: Path) -> Model:
    return Model(root / "tiny-F32.gguf", threads=1, context=300)


def test_logits_are_those_of_transformers(root: Path, plain: Model) -> None:
    stock = AutoModelForCausalLM.from_pretrained(root / "tiny", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = stock(input_ids=torch.tensor([IDS])).logits[0].numpy()
    got = plain.logits(IDS)
    assert got.shape == wanted.shape == (len(IDS), plain.vocabulary)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(got, wanted, atol=0.03)  # keys and values are kept in 16 bits
    assert (got.argmax(-1) == wanted.argmax(-1)).mean() > 0.97


def test_hidden_states_are_what_the_head_multiplies(root: Path, plain: Model) -> None:
    states = plain.hidden(IDS)
    assert states.shape == (len(IDS), plain.hidden_size)
    file = open_gguf(root / "tiny-F32.gguf")
    ref = file.ref("token_embd.weight")
    embedding = dequantise(file.read("token_embd.weight"), ref.kind, ref.shape)
    cap = json.loads((root / "tiny" / "config.json").read_text())
    cap = cap.get("text_config", cap)["final_logit_softcapping"]
    np.testing.assert_allclose(cap * np.tanh(states @ embedding.T / cap), plain.logits(IDS), atol=1e-3)


def test_a_sequence_does_not_remember_the_one_before(plain: Model) -> None:
    alone = plain.logits(IDS)
    plain.logits(IDS[::-1])
    plain.hidden(IDS[:9])
    plain.generate(IDS[5:20], 3)
    assert np.array_equal(plain.logits(IDS), alone)


def test_batches_change_only_the_last_bits(root: Path, plain: Model) -> None:
    with Model(root / "tiny-F32.gguf", threads=1, context=128, batch=7) as small:
        np.testing.assert_allclose(small.logits(IDS), plain.logits(IDS), atol=0.03)  # sums in another order, in 16 bits
        starts = [(start, len(part)) for start, part in small.stream(IDS)]
    assert starts == [(i, min(7, len(IDS) - i)) for i in range(0, len(IDS), 7)]


def test_greedy_text_is_the_most_likely_token_every_time(plain: Model) -> None:
    answer = plain.generate(IDS[:10], 8, stop=False)
    assert len(answer) == 8
    sequence = IDS[:10] + answer
    assert answer == [int(row.argmax()) for row in plain.logits(sequence)[9:-1]]
    assert plain.generate(IDS[:10], 0) == []


def test_demo_answers_and_ends_its_turn(tmp_path: Path) -> None:
    out = exported(DEMO / "moe", tmp_path, "Q8_0")
    with Model(next(out.glob("*.gguf")), threads=1, context=256) as model:
        assert model.bos == 2
        text = "<bos><|turn>user\nHello!<turn|>\n<|turn>model\n"
        ids = model.tokenise(text)
        tokenizer = AutoTokenizer.from_pretrained(DEMO / "moe")
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.text(ids) == text
        assert len(model.tokenise(text, special=False)) > len(ids)
        answer = model.generate(ids, 80)
        assert model.text(answer).endswith("<turn|>")
        assert len(answer) < 80
        assert model.metadata["general.architecture"] == "gemma4"


def test_a_split_file_is_loaded_by_any_of_its_parts(root: Path, plain: Model, tmp_path: Path) -> None:
    exported(root / "tiny", tmp_path, "F32", max_shard_bytes=200_000)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    with Model(parts[-1], threads=1, context=300) as model:
        assert np.array_equal(model.logits(IDS), plain.logits(IDS))


# ---------------------------------------------------------------- what is refused


def test_sequences_that_do_not_fit(plain: Model) -> None:
    with pytest.raises(UsageError, match="at least one token"):
        plain.logits([])
    with pytest.raises(UsageError, match=r"no such token(?s:.*)320(?s:.*)0 to 319"):
        plain.logits([2, 320])
    with pytest.raises(UsageError, match="no such token"):
        plain.hidden([-1])
    assert plain.context == 512  # a multiple of 256 that holds 300
    with pytest.raises(UsageError, match=r"longer than the context(?s:.*)513(?s:.*)512"):
        plain.logits([2] * 513)
    with pytest.raises(UsageError, match="longer than the context"):
        plain.generate([2] * 500, 13)


def test_settings_that_make_no_sense(root: Path) -> None:
    for wrong in ({"threads": -1}, {"batch": 0}, {"batch": 513}, {"context": -5}):
        with pytest.raises(UsageError, match="at least 1"):
            Model(root / "tiny-F32.gguf", **wrong)


def test_closing_twice_is_closing_once(root: Path) -> None:
    model = Model(root / "tiny-Q8_0.gguf", threads=1, context=1)
    model.close()
    model.close()


def test_a_closed_model_says_so(root: Path) -> None:
    model = Model(root / "tiny-Q8_0.gguf", threads=1, context=64, batch=4)
    stream = model.stream(IDS[:12])
    next(stream)
    model.close()
    calls = (
        lambda: next(stream), lambda: model.logits([2]), lambda: model.hidden([2]), lambda: model.generate([2], 1),
        lambda: model.tokenise("a"), lambda: model.text([2]), lambda: model.bos,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="the model is closed"):
            call()


def test_files_that_are_no_model(root: Path, tmp_path: Path) -> None:
    whole = (root / "tiny-Q8_0.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"short\.gguf"):
        Model(tmp_path / "short.gguf", threads=1)
    with pytest.raises(UsageError, match="no such GGUF"):
        Model(tmp_path / "absent.gguf", threads=1)
    shutil.copy(root / "tiny-Q8_0.gguf", tmp_path / "other.gguf")
    edit(tmp_path / "other.gguf", b"general.architecture", b"gemma4", b"gemma9")
    with pytest.raises(CheckpointError, match=r"does not load(?s:.*)unknown model architecture: 'gemma9'"):
        Model(tmp_path / "other.gguf", threads=1)


def test_weights_that_are_not_finite_are_refused(root: Path, tmp_path: Path) -> None:
    file = open_gguf(root / "tiny-F32.gguf")
    raw = bytearray((root / "tiny-F32.gguf").read_bytes())
    start = file.ref("blk.0.ffn_up.weight").start
    raw[start : start + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "nan.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"does not load(?s:.*)nan\.gguf"):
        Model(tmp_path / "nan.gguf", threads=1)


@pytest.mark.parametrize(
    ("key", "value"), [("gemma4.block_count", 100_000), ("gemma4.rope.dimension_count", 3)], ids=["load", "compute"]
)
def test_a_header_that_llama_cpp_dies_of_ends_another_process(root: Path, tmp_path: Path, key: str, value: int) -> None:
    raw = bytearray((root / "tiny-Q8_0.gguf").read_bytes())
    at = raw.index(key.encode()) + len(key) + 4  # behind the type
    raw[at : at + 4] = struct.pack("<I", value)
    (tmp_path / "dies.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"llama\.cpp stops on this file(?s:.*)ASSERT"):
        Model(tmp_path / "dies.gguf", threads=1)


def test_a_trial_that_did_not_happen_is_no_pass(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(root / "tiny-Q8_0.gguf", tmp_path / "m.gguf")
    (tmp_path / "ctypes.py").write_text("raise ImportError('another ctypes')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"did not start(?s:.*)another ctypes"):
        Model(tmp_path / "m.gguf", threads=1)


def test_a_trial_imports_nothing_from_the_current_folder(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(root / "tiny-Q8_0.gguf", tmp_path / "m.gguf")
    (tmp_path / "gemcut").mkdir()
    mark = tmp_path / "was imported"
    for hostile in ("gemcut/__init__.py", "ctypes.py", "numpy.py", "blake3.py"):
        (tmp_path / hostile).write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.chdir(tmp_path)
    Model(Path("m.gguf"), threads=1, context=64).close()
    assert not mark.exists()


def edit(path: Path, key: bytes, old: bytes, new: bytes) -> None:
    raw = path.read_bytes()
    at = raw.index(old, raw.index(key) + len(key))
    path.write_bytes(raw[:at] + new + raw[at + len(old) :])
