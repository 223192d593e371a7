"""The `vllm serve` command of a folder, word for word, for each kind of folder; flags are those of a real vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.export.nvfp4.run import Settings, prepare, write_nvfp4
from gemcut.serve import ServeWords, serving
from observed import EVEN, statistics
from tiny import add_vision, make_tiny

# every long option of `vllm serve` in vLLM 0.33.0, from its argument classes
FLAGS = set((Path(__file__).parent / "vllm_flags.txt").read_text().split())


def export(place: Path, model: Path, settings: Settings, stats: Path | None = None) -> Checkpoint:
    write_nvfp4(prepare(open_checkpoint(model), settings, stats), place)
    return open_checkpoint(place, any_architecture=True)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A mixture with its tower: four-bit activations, an FP8 cache."""
    place = tmp_path_factory.mktemp("seen")
    model = add_vision(make_tiny(place / "moe"))
    stats = statistics(place / "stats", open_checkpoint(model), EVEN)
    return export(place / "gemma-nvfp4", model, Settings("NVFP4", kv="one"), stats)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A dense wrapper without a tower, weights alone."""
    place = tmp_path_factory.mktemp("plain")
    return export(place / "dense-a16", make_tiny(place / "dense", kind="dense"), Settings("NVFP4A16"))


def test_a_mixture_with_its_tower_and_an_fp8_cache(seen: Checkpoint) -> None:
    found = serving(seen, ServeWords(drafter="google/gemma-4-26B-A4B-it-assistant"))
    assert found.line == (
        "vllm serve gemma-nvfp4 \\\n"
        "    --served-model-name gemma-nvfp4 \\\n"
        "    --max-model-len 512 \\\n"
        "    --kv-cache-dtype fp8 \\\n"
        "    --limit-mm-per-prompt '{\"image\":2}' \\\n"
        "    --reasoning-parser gemma4 \\\n"
        "    --tool-call-parser gemma4 \\\n"
        "    --enable-auto-tool-choice \\\n"
        '    --speculative-config \'{"method":"mtp","model":"google/gemma-4-26B-A4B-it-assistant",'
        '"num_speculative_tokens":2}\''
    )
    assert (found.scheme, found.vllm) == ("NVFP4", "0.28.0")
    told = " ".join(found.needs)
    for words in ("Blackwell alone", "weight-only Marlin", "8.9 or newer", "--enable-expert-parallel", "mtp"):
        assert words in told


def test_a_dense_wrapper_without_a_tower(plain: Checkpoint) -> None:
    found = serving(plain)
    assert found.line == (
        "vllm serve dense-a16 \\\n"
        "    --served-model-name dense-a16 \\\n"
        "    --max-model-len 512 \\\n"
        '    --hf-overrides \'{"architectures":["Gemma4ForCausalLM"]}\' \\\n'
        "    --reasoning-parser gemma4 \\\n"
        "    --tool-call-parser gemma4 \\\n"
        "    --enable-auto-tool-choice"
    )
    assert "Marlin" in " ".join(found.needs)
    assert "Blackwell alone" not in " ".join(found.needs)


def test_a_text_model_in_the_other_layout(tmp_path: Path) -> None:
    text = make_tiny(tmp_path / "text", kind="moe-text")
    found = serving(export(tmp_path / "out", text, Settings("NVFP4A16", layout="modelopt", kv="bound")))
    assert found.layout == "modelopt"
    assert found.command == (
        "vllm", "serve", "out", "--served-model-name", "out", "--max-model-len", "512", "--kv-cache-dtype", "fp8",
        "--reasoning-parser", "gemma4", "--tool-call-parser", "gemma4", "--enable-auto-tool-choice",
    )  # fmt: skip


def test_images_can_be_left_out(seen: Checkpoint) -> None:
    command = serving(seen, ServeWords(images=0)).command
    assert "--language-model-only" in command
    assert "--limit-mm-per-prompt" not in command
    assert '{"image":5}' in serving(seen, ServeWords(images=5)).command


def test_experts_stay_whole_where_kernels_want_tiles(seen: Checkpoint, plain: Checkpoint) -> None:
    """32 columns over two cards are no tile of 64; a model without four-bit experts has no such limit."""
    command = serving(seen, ServeWords(cards=2)).command
    at = command.index("--tensor-parallel-size")
    assert command[at + 1 : at + 3] == ("2", "--enable-expert-parallel")
    assert "--enable-expert-parallel" not in serving(plain, ServeWords(cards=2)).command


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (ServeWords(cards=3), "attention heads do not split"),
        (ServeWords(cards=4), "whole blocks of 16"),  # 96 columns
        (ServeWords(cards=0), "too few cards"),
        (ServeWords(images=-1), "too few images"),
        (ServeWords(drafter="d", draft_tokens=0), "too few draft tokens"),
        (ServeWords(context=513), "no context of that length"),
    ],
)
def test_what_no_server_could_do_is_refused(plain: Checkpoint, words: ServeWords, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        serving(plain, words)


def test_key_heads_that_neither_split_nor_repeat(tmp_path: Path) -> None:
    wide = make_tiny(tmp_path / "d", kind="dense", num_attention_heads=6, num_key_value_heads=3, intermediate_size=192)
    folder = export(tmp_path / "out", wide, Settings("NVFP4A16"))
    assert "--tensor-parallel-size" in serving(folder, ServeWords(cards=6)).command
    with pytest.raises(UsageError, match="num_key_value_heads"):
        serving(folder, ServeWords(cards=2))


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not speak of NVFP4"):
        serving(open_checkpoint(make_tiny(tmp_path / "plain")))


def test_odd_names_survive_a_shell(plain: Checkpoint) -> None:
    name, drafter = "it's $HOME; rm -rf *", 'a "b" \\ c\'d'
    found = serving(plain, ServeWords(model="/models/my model", name=name, drafter=drafter))
    shell = ["sh", "-c", f"set -- {found.line}\nprintf '%s\\0' \"$@\""]
    said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert tuple(said.split("\0")[:-1]) == found.command
    assert found.command[2] == "/models/my model"
    assert name in found.command
    assert json.loads(found.command[-1])["model"] == drafter


def test_every_flag_is_one_of_vllm(seen: Checkpoint, plain: Checkpoint) -> None:
    asked = ServeWords(drafter="d", cards=2)
    for one in (serving(seen, asked), serving(plain, asked), serving(seen, ServeWords(images=0))):
        flags = {word for word in one.command if word.startswith("--")}
        assert flags <= FLAGS, flags - FLAGS
