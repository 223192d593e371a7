"""Recipes that write GGUF files: with and without a cut, what a change redoes, gates, and card 003 in small."""

from __future__ import annotations

import fcntl
import hashlib
import json
from pathlib import Path

import pytest

from gemcut import gguf_stages, pipeline, preflight, recipe
from gemcut.errors import QualityError, UsageError
from gemcut.gguf_file import open_gguf
from gemcut.records import load_kld
from tiny import make_drafter, make_tiny, write_corpus


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    make_tiny(folder / "dense", "dense-text", hidden_size=256)
    make_tiny(folder / "moe", "moe")
    make_tiny(folder / "moe-wide", "moe-text", hidden_size=256)
    make_drafter(folder / "drafter", backbone=256)
    write_corpus(folder / "calibration.jsonl", 1)
    write_corpus(folder / "heldout.jsonl", 2)
    return folder


def words(place: Path, model: str = "dense", *sets: str, **more: object) -> recipe.Recipe:
    plain = recipe.build(
        {
            "name": "tiny",
            "model": str(place / model),
            "observe": {"corpus": str(place / "calibration.jsonl"), "dtype": "float32"},
            "gguf": {"tiers": ["Q8_0", "Q4_K_M"], "imatrix": {"gate": False}},
            "kld": {"corpus": str(place / "heldout.jsonl"), "dtype": "float32"},
            **more,  # type: ignore[dict-item]
        }
    )
    return recipe.parse(recipe.resolved(plain), "tiny", sets) if sets else plain


def names(run: pipeline.Run, *, reused: bool) -> list[str]:
    return [stage.folder.name.rsplit("-", 1)[0] for stage in run.done if stage.reused is reused]


def test_without_a_cut_and_again_for_free(place: Path, tmp_path: Path) -> None:
    run = pipeline.run(words(place), tmp_path)
    assert names(run, reused=False) == ["observe", "imatrix", "gguf", "kld-gguf"]
    assert run.model is None
    assert [path.name for path in run.files] == ["dense-Q8_0.gguf", "dense-Q4_K_M.gguf"]
    assert run.quantised is not None
    assert set(run.quantised) == {"dense-Q8_0", "dense-Q4_K_M"}
    folder = run.files[0].parent
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    facts = {one.asked: one for one in gguf_stages.load_facts(folder.parent)}
    for one in facts.values():
        assert one.size_bytes == (folder / one.name).stat().st_size
    assert facts["Q8_0"].imatrix == "", "nothing in a Q8_0 file depends on importances"
    assert facts["Q4_K_M"].imatrix == "plain"
    assert run.report is not None
    page, card = run.report.read_text(), run.report.with_name("README.md").read_text()
    assert "What each file weighs and costs" in page
    assert "library_name: gguf" in card
    assert facts["Q4_K_M"].sha256["dense-Q4_K_M.gguf"] in card
    for text in (page, card, (folder.parent / "files.json").read_text()):
        assert str(tmp_path) not in text
        assert str(place) not in text
    assert names(pipeline.run(words(place), tmp_path), reused=False) == []


@pytest.mark.parametrize(
    ("model", "sets", "bound"),
    [
        ("dense", ("gguf.tiers=[Q8_0, Q4_K_M, CD-Q3_K_M]",), "exact"),
        ("moe-wide", ("gguf.pad_experts=true", "gguf.max_shard_size=1MiB", "gguf.imatrix.roundings=2"), "exact"),
        ("moe", ("plan.keep=5", "plan.guards.bootstrap=0", "score=reap"), "about"),
    ],
)
def test_a_dry_run_says_sizes_and_how_sure_they_are(
    place: Path, tmp_path: Path, model: str, sets: tuple[str, ...], bound: str
) -> None:
    asked = words(place, model, *sets)
    found = preflight.estimate(asked, tmp_path / "dry").files
    run = pipeline.run(asked, tmp_path, until="gguf")
    written = [(one.name, len(one.parts), one.size_bytes) for one in gguf_stages.load_facts(run.files[0].parents[1])]
    assert {one.bound for one in found} == {bound}
    if bound == "exact":
        assert [(one.name, one.parts, one.size_bytes) for one in found] == written
    else:
        for one, (_, _, size) in zip(found, written, strict=True):
            assert abs(one.size_bytes - size) < 2000, "names and provenance alone differ"


def test_the_floor_of_a_killed_run_goes_whatever_is_asked_next(place: Path, tmp_path: Path) -> None:
    """It is as large as the base in BF16."""
    killed, running = (tmp_path / "tiny" / f"kld-gguf-{key}" / "gemcut-floor-a" for key in ("0" * 12, "1" * 12))
    for folder in (killed, running):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
        (folder / "dense-BF16.gguf.partial").touch()
    with open(running / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pipeline.run(words(place, "dense", "gguf.tiers=[Q8_0]", "gguf.imatrix=null"), tmp_path, until="gguf")
    assert [killed.exists(), running.exists()] == [False, True]


def test_another_tier_keeps_the_files_that_are_there(place: Path, tmp_path: Path) -> None:
    """The first files are linked, not written again; KLD is of all files."""
    first = pipeline.run(words(place), tmp_path, until="gguf")
    assert first.quantised is None
    more = pipeline.run(words(place, "dense", "gguf.tiers=[Q8_0, Q4_K_M, Q6_K]"), tmp_path, until="gguf")
    assert names(more, reused=False) == ["gguf"]
    before = {path.name: path.stat().st_ino for path in first.files}
    after = {path.name: path.stat().st_ino for path in more.files}
    assert before.items() <= after.items()
    assert len(after) == 3
    other = pipeline.run(words(place, "dense", "gguf.imatrix.variant=rms4"), tmp_path, until="gguf")
    assert names(other, reused=False) == ["imatrix", "gguf"]
    changed = {path.name: path.stat().st_ino for path in other.files}
    assert changed["dense-Q8_0.gguf"] != 0
    assert changed["dense-Q4_K_M.gguf"] != before["dense-Q4_K_M.gguf"], "other importances, other bytes"
    assert names(pipeline.run(words(place, "dense", "gguf.threads=1"), tmp_path, until="gguf"), reused=False) == []


def test_a_cut_is_observed_itself_and_measured_from_the_uncut_base(place: Path, tmp_path: Path) -> None:
    cut = {"score": "reap", "plan": {"keep": 5, "guards": {"bootstrap": 0}}}
    asked = words(place, "moe", **cut)
    run = pipeline.run(asked, tmp_path)
    assert names(run, reused=False) == [
        "observe", "plan-reap", "cut-reap", "verify-reap", "observe-cut", "imatrix", "gguf", "kld-gguf", "kld",
    ]  # fmt: skip
    assert [path.name for path in run.files] == ["moe-5e-Q8_0.gguf", "moe-5e-Q4_K_M.gguf"]
    for path in run.files:
        assert open_gguf(path).value("gemma4.expert_count") == 5
    assert run.measured is not None
    assert run.quantised is not None
    plain, quantised = (next(iter(one.values())) for one in (run.measured, run.quantised))
    assert plain.base_fingerprint == quantised.base_fingerprint
    card = (tmp_path / "tiny" / "report" / "README.md").read_text()
    assert "## GGUF files" in card
    assert "moe, uncut" in card
    assert "### Against" in card or "## Against the base" in card


def test_a_drafter_and_no_importances(place: Path, tmp_path: Path) -> None:
    sets = ("gguf.imatrix=null", "gguf.tiers=[Q4_0]", f"gguf.drafter.model={place / 'drafter'}")
    run = pipeline.run(words(place, "dense", *sets), tmp_path)
    assert names(run, reused=False) == ["gguf", "kld-gguf"]
    assert [path.name for path in run.files] == ["dense-Q4_0.gguf", "drafter-Q8_0.gguf"]
    assert run.quantised is not None
    assert set(run.quantised) == {"dense-Q4_0"}, "a drafter answers nothing by itself"
    assert "--model-draft drafter-Q8_0.gguf" in (tmp_path / "tiny" / "report" / "README.md").read_text()


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (("gguf.imatrix=null", "gguf.tiers=[IQ2_M]"), "needs an importance matrix"),
        (("gguf.tiers=[Q4_K_XXL]",), "no such file type"),
        (("gguf.overrides=[nothing=q8_0]",), "nothing"),
        (("gguf.sizes=[10KiB]",), "no mix of these types is so small"),
        (("gguf.fit=[{memory: 1GiB, beside: [drafter]}]",), "none is named"),
        (("gguf.mmproj=[Q8_0]",), "vision"),
        (
            ("gguf.fit=[{memory: 1GiB, context: 512}, {memory: 1024MiB, context: 1024, kv: q8_0}]",),
            "context 512 in f16, and context 1024 in q8_0",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_minute(
    place: Path, tmp_path: Path, sets: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        preflight.estimate(words(place, "dense", *sets), tmp_path / "runs")
    assert said in str(caught.value) + str(caught.value.where) + str(caught.value.got)
    assert not (tmp_path / "runs").exists()


def test_a_size_said_in_two_ways_is_one_file(place: Path, tmp_path: Path) -> None:
    sets = ("gguf.sizes=[1MiB, 1024KiB]", "gguf.fit=[{memory: 1GiB}, {memory: 1024MiB, kv: f16}]", "gguf.tiers=[]")
    found = preflight.estimate(words(place, "dense", *sets), tmp_path / "runs")
    assert [(one.name, one.bound) for one in found.files] == [
        ("dense-1MiB.gguf", "at most"),
        ("dense-fit-1GiB.gguf", "at most"),
    ]


def test_the_coverage_gate_keeps_the_matrix(place: Path, tmp_path: Path) -> None:
    """Some words starve experts of a tiny router; the gate says so before any file is written."""
    make_tiny(tmp_path / "wide", "moe", num_experts=64)
    sets = ("gguf.imatrix.gate=true", "observe.max_tokens=60", f"model={tmp_path / 'wide'}")
    with pytest.raises(QualityError, match="starves experts"):
        pipeline.run(words(place, "moe", *sets), tmp_path)
    assert list(tmp_path.glob("tiny/imatrix-*/imatrix.gguf"))
    assert not list(tmp_path.glob("tiny/gguf-*"))


def test_the_kld_gate_of_files(place: Path, tmp_path: Path) -> None:
    sets = ("gguf.imatrix=null", "gguf.tiers=[Q4_0]", "kld.max_mean_nats=0.000000001")
    with pytest.raises(QualityError, match="KLD gate"):
        pipeline.run(words(place, "dense", *sets), tmp_path)
    assert (tmp_path / "tiny" / "report" / "index.html").is_file(), "the work is kept"


@pytest.mark.slow
def test_card_003_in_small(tmp_path: Path) -> None:
    """The shipped demo: damage falls with size, the solved file keeps its budget, and the report shows all of it."""
    run = pipeline.run(recipe.load("demo-gguf"), tmp_path)
    assert names(run, reused=False) == ["observe", "imatrix", "curvature", "gguf", "kld-gguf"]
    measured = {path.stem: load_kld(path) for path in run.folder.glob("kld-gguf-*/kld-*.json")}
    mean = {name.rpartition("demo-dense-")[2]: one.rows[-1].mean.value for name, one in measured.items()}
    assert mean["Q5_K_S"] < mean["IQ4_XS"] < mean["IQ3_M"] < mean["3.5MiB"] < mean["IQ2_M"]
    facts = {one.asked: one for one in gguf_stages.load_facts(run.files[0].parents[1])}
    budget = int(3.5 * 2**20)
    assert 0.99 * budget < facts["3.5MiB"].size_bytes <= budget
    assert {one.imatrix for one in facts.values() if one.role == "model"} == {"hybrid"}
    assert facts["Q8_0"].role == "drafter"
    figures = {path.stem for path in (run.folder / "report" / "figures").iterdir()}
    assert figures == {"quants-kld", "quants-top", "bits-3-5mib", "bits-cd-q3-k-m"}
    assert json.loads((run.files[0].parents[1] / "stage.json").read_text())["params"]["drafter"]
