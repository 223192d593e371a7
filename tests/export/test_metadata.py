"""All keys of a file: equal to the converter's on the demo checkpoints, names from cards and folders, never a path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcut.checkpoint import open_checkpoint
from gemcut.export.layout import layout_of, preprocessor, vision_layout_of
from gemcut.export.metadata import file_metadata, parameter_label
from gemcut.families.gguf import GgufLayout, GgufTensor
from gguf_facts import golden_keys, golden_tensor, values_of
from tiny import add_vision, make_tiny

ROOT = Path(__file__).parents[2]
BF16_FILE = 32


@pytest.mark.parametrize("demo", ["dense", "moe", "dense-drafter", "moe-drafter"])
def test_keys_and_tensors_are_the_converters(demo: str) -> None:
    """The goldens are what bench/compare_converter.py read in the converter's files."""
    golden = json.loads((ROOT / "tests" / "golden" / f"converter_{demo}_model.json").read_text())
    checkpoint = open_checkpoint(ROOT / "demo" / demo, any_architecture=demo.endswith("drafter"))
    layout = layout_of(checkpoint)
    found = file_metadata(checkpoint.path, checkpoint.config, layout, name=checkpoint.name, file_type=BF16_FILE)
    assert list(found) == list(golden["keys"])
    assert json.loads(json.dumps(golden_keys(found))) == golden["keys"]
    ours = {t.name: golden_tensor(t.shape, t.keep_f32, values_of(checkpoint, t)) for t in layout.tensors}
    assert list(ours) == list(golden["tensors"])
    assert ours == golden["tensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_vision(make_tiny(tmp_path_factory.mktemp("model") / "tiny", "moe"))


def metadata(folder: Path, name: str = "tiny") -> dict[str, object]:
    checkpoint = open_checkpoint(folder)
    found = file_metadata(folder, checkpoint.config, layout_of(checkpoint), name=name, file_type=0)
    return {key: value.value for key, value in found.items()}


def test_an_mmproj_file_has_no_tokenizer_and_the_processors_numbers(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    found = file_metadata(folder, checkpoint.config, vision_layout_of(checkpoint), name="tiny", file_type=1)
    assert found["general.type"].value == "mmproj"
    assert found["clip.vision.image_mean"].value == (0.0, 0.1, 0.0)
    assert not [key for key in found if key.startswith(("tokenizer.", "gemma4."))]
    assert found["general.file_type"].value == 1
    assert preprocessor(checkpoint)["patch_size"] == 4


def test_hub_ids_are_taken_apart(folder: Path) -> None:
    found = metadata(folder, "google/gemma-4-26B-A4B-it")
    assert {key: found[f"general.{key}"] for key in ("name", "organization", "basename", "finetune")} == {
        "name": "Gemma 4 26B A4B It", "organization": "Google", "basename": "gemma-4", "finetune": "26b-it",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/home/somebody/secret", "../secret/x", "C:\\secret", "~/secret", "a/b/secret"])
def test_a_local_path_is_never_written(folder: Path, tmp_path: Path, path: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).hardlink_to(file)
    (copy / "config.json").unlink()
    config = {**json.loads((folder / "config.json").read_text()), "_name_or_path": path}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "README.md").write_text(f"---\nbase_model: {json.dumps(path)}\n---\n")
    values = [str(value) for value in metadata(copy).values()]
    assert not [v for v in values if "somebody" in v or "/secret" in v or "\\secret" in v or str(tmp_path) in v]


@pytest.mark.parametrize("card", ["---\n: [\n---\n", "---\n- a\n---\n", "no front matter", "", "---\nlicense:\n---\n"])
def test_odd_cards_say_nothing(folder: Path, tmp_path: Path, card: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).hardlink_to(file)
    (copy / "README.md").write_text(card)
    found = metadata(copy)
    assert found["general.name"] == "Tiny"
    assert "general.license" not in found


@pytest.mark.parametrize(
    ("shapes", "label"),
    [
        ({"a": (30, 1000, 1000)}, "30M"),
        ({"a": (999, 1000)}, "999K"),
        ({"a": (8_300_000,)}, "8.3M"),
        ({"a": (7_650_000_000,)}, "7.7B"),
        (
            {"a": (1_500_000,), "blk.0.ffn_down_exps.weight": (8, 1000, 1000), "blk.0.ffn_down_exps.scale": (8,)},
            "8x2.5M",
        ),
    ],
)
def test_parameters_are_said_with_two_digits(shapes: dict[str, tuple[int, ...]], label: str) -> None:
    tensors = tuple(GgufTensor(name, shape, None) for name, shape in shapes.items())
    assert parameter_label(GgufLayout("gemma4", {}, tensors, 1, 0, 1, True))[1] == label
