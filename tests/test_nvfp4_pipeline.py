"""Recipes that write an NVFP4 checkpoint: without a cut, behind one, beside GGUF files; gates; card 004 in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemcut import pipeline, preflight, recipe, stages
from gemcut.checkpoint import open_checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.nvfp4.layout import read_config
from gemcut.nvfp4_stages import packed_bytes, served_here
from gemcut.records import load_kld
from tiny import make_tiny, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvfp4")
    make_tiny(folder / "dense", "dense")
    make_tiny(folder / "moe", "moe")
    write_corpus(folder / "calibration.jsonl", 1)
    write_corpus(folder / "heldout.jsonl", 2)
    return folder


def words(place: Path, model: str = "dense", *sets: str, **more: object) -> recipe.Recipe:
    plain = recipe.build(
        {
            "name": "tiny",
            "model": str(place / model),
            "observe": {"corpus": str(place / "calibration.jsonl"), "dtype": "float32"},
            "nvfp4": {"max_borrowed": 0.9},
            **more,  # type: ignore[dict-item]
        }
    )
    return recipe.parse(recipe.resolved(plain), "tiny", sets) if sets else plain


def names(run: pipeline.Run, *, reused: bool = False) -> list[str]:
    return [stage.folder.name.rsplit("-", 1)[0] for stage in run.done if stage.reused is reused]


def test_without_a_cut_and_again_for_free(place: Path, tmp_path: Path) -> None:
    asked = words(
        place,
        nvfp4={"scheme": "NVFP4", "targets": "mlp", "kv": "calibrated", "drafter": "google/a-drafter"},
        kld={"corpus": str(place / "heldout.jsonl"), "dtype": "float32"},
    )
    run = pipeline.run(asked, tmp_path)
    assert names(run) == ["observe", "nvfp4", "verify-nvfp4", "kld-nvfp4"]
    assert run.packed is not None
    told = read_config(open_checkpoint(run.packed.folder, any_architecture=True).config, "written")
    assert (told.scheme, told.cache) == ("NVFP4", True)
    record = json.loads((run.packed.folder / "nvfp4.json").read_text())
    assert (record["scales"], record["targets"], record["kv"]) == ("weighted", "mlp", "calibrated")
    result = run.packed.measured
    assert result is not None
    assert next(row for row in result.rows if row.cls == "all").mean.value > 0
    page, card = (run.folder / "report" / name for name in ("index.html", "README.md"))
    for text in (page.read_text(), card.read_text()):
        assert "dense-NVFP4" in text
        assert "vllm serve dense-NVFP4" in text
        assert "--kv-cache-dtype fp8" in text
        assert str(tmp_path) not in text
        assert str(place) not in text
    shown = card.read_text()
    assert "- nvfp4\n" in shown
    assert "| mlp | 18 |" in shown
    assert "gemcut.load(folder)" in shown
    assert "gemcut verify MODEL --base" in shown
    assert "Scales were told by" in shown
    assert str(run.packed.folder) in served_here(run.packed).line
    assert names(pipeline.run(asked, tmp_path)) == []


def test_weights_alone_by_sweep_need_no_text(place: Path, tmp_path: Path) -> None:
    run = pipeline.run(words(place, "moe", nvfp4={"scales": "sweep"}), tmp_path)
    assert names(run) == ["nvfp4", "verify-nvfp4"]
    card = (tmp_path / "tiny" / "report" / "README.md").read_text()
    assert "What it cost has not been measured" in card
    assert "The damage of the NVFP4 checkpoint has not been measured on held-out text." in card
    assert "| experts | 144 |" in card


def test_behind_a_cut_the_cut_model_is_observed_and_packed(place: Path, tmp_path: Path) -> None:
    asked = words(
        place,
        "moe",
        score="reap",
        plan={"keep": 6, "guards": {"bootstrap": 0}},
        kld={"corpus": str(place / "heldout.jsonl"), "dtype": "float32"},
    )
    run = pipeline.run(asked, tmp_path)
    assert names(run) == [
        "observe", "plan-reap", "cut-reap", "verify-reap", "observe-cut", "nvfp4", "verify-nvfp4", "kld-nvfp4", "kld",
    ]  # fmt: skip
    assert run.packed is not None
    assert run.packed.parent.text_config["num_experts"] == 6
    assert run.packed.name == "moe-6e-NVFP4A16"
    card = (tmp_path / "tiny" / "report" / "README.md").read_text()
    assert "# moe-6e\n" in card, "the report is about the cut"
    assert "## NVFP4" in card
    assert "NVFP4: they read back" in card
    assert "against moe, uncut" in card
    assert packed_bytes(run.packed.parent, recipe.nvfp4_words({}))[0] <= run.packed.open().size_bytes


def test_beside_gguf_files_and_only_up_to_it(place: Path, tmp_path: Path) -> None:
    asked = words(place, gguf={"tiers": ["Q8_0"], "imatrix": {"gate": False}})
    run = pipeline.run(asked, tmp_path, until="nvfp4")
    assert names(run) == ["observe", "imatrix", "gguf", "nvfp4", "verify-nvfp4"]
    assert not (run.folder / "report").exists()
    run = pipeline.run(asked, tmp_path)
    card = (run.folder / "report" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert "## NVFP4" in card
    assert "vllm serve" in card
    assert names(pipeline.run(asked, tmp_path / "other", until="observe")) == ["observe"]


def test_the_kld_gate_keeps_the_folder(place: Path, tmp_path: Path) -> None:
    asked = words(
        place,
        nvfp4={"scales": "minmax"},
        kld={"corpus": str(place / "heldout.jsonl"), "dtype": "float32", "max_mean_nats": 1e-12},
    )
    with pytest.raises(QualityError, match="KLD gate"):
        pipeline.run(asked, tmp_path)
    assert list(tmp_path.glob("tiny/nvfp4-*/model/config.json"))
    assert (tmp_path / "tiny" / "report" / "index.html").is_file()


def test_a_layout_is_another_stage_and_threads_are_none(place: Path, tmp_path: Path) -> None:
    first = pipeline.run(words(place, nvfp4={"scales": "sweep", "threads": 1}), tmp_path, until="nvfp4")
    again = pipeline.run(words(place, nvfp4={"scales": "sweep", "threads": 2}), tmp_path, until="nvfp4")
    assert names(again) == []
    other = pipeline.run(words(place, nvfp4={"scales": "sweep", "layout": "modelopt"}), tmp_path)
    assert names(other) == ["nvfp4", "verify-nvfp4"]
    assert first.packed is not None
    assert other.packed is not None
    assert first.packed.folder != other.packed.folder
    assert "gemcut.load" not in (tmp_path / "tiny" / "report" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"canary": {}, "gguf": {"tiers": ["Q8_0"]}, "nvfp4": None}, "canary belongs to a plan or to nvfp4"),
        ({"nvfp4": None}, "nothing to do"),
        ({"nvfp4": {"scheme": "int4"}}, "nvfp4.scheme"),
        ({"nvfp4": {"max_borrowed": 2.0}}, "nvfp4.max_borrowed"),
        ({"compare": ["reap"]}, "compare belongs to a plan"),
    ],
)
def test_words_that_do_not_go_together(place: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        words(place, **more)


def test_a_dry_run_says_the_size(place: Path, tmp_path: Path) -> None:
    asked = words(place, "moe", nvfp4={"targets": "all", "scales": "sweep"})
    found = {one.name: one for one in preflight.estimate(asked, tmp_path / "dry").stages}
    assert "observe" not in found
    run = pipeline.run(asked, tmp_path)
    assert run.packed is not None
    written = run.packed.open().size_bytes
    assert abs(found["nvfp4"].write_bytes - preflight.SMALL_WRITE_BYTES - written) < 64, "but for headers, to the byte"
    with pytest.raises(UsageError, match="matches nothing"):
        preflight.estimate(words(place, "moe", nvfp4={"ignore": ["nowhere"]}), tmp_path / "dry")


@pytest.mark.slow
def test_card_004_in_small(tmp_path: Path) -> None:
    """The shipped demo: attention as it was, 36 linears of the MLP, an FP8 cache, little damage."""
    run = pipeline.run(recipe.load("demo-nvfp4"), tmp_path)
    assert names(run) == ["observe", "nvfp4", "verify-nvfp4", "kld-nvfp4"]
    assert run.packed is not None
    record = json.loads((run.packed.folder / "nvfp4.json").read_text())
    assert len(record["modules"]) == 36
    assert all(".mlp." in name for name in record["modules"])
    found = [load_kld(path) for path in run.folder.glob("kld-nvfp4-*/kld-*.json")]
    mean = next(row.mean for row in found[0].rows if row.cls == "all")
    assert 0.0005 < mean.value < 0.02
    checks = stages.load_checks(next(run.folder.glob("verify-nvfp4-*")))
    assert any(one.name == "FP8 cache" for one in checks)
    assert "--speculative-config" in (run.folder / "report" / "README.md").read_text()
