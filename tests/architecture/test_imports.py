"""Imports point down only, and heavy packages stay in the rooms that may have them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "gemcut"
MODULES = sorted(p for p in SOURCE.rglob("*.py"))

ROOMS = {"observe", "score", "plan", "surgery", "ablate", "canary", "export", "serve", "evaluate", "report", "publish"}
GROUND = {"errors", "types", "store", "records", "checkpoint", "families", "nvfp4", "ggml", "gguf_file", "machine"}
ABOVE = {
    "recipe", "runs", "models", "stages", "head_stages", "pipeline", "head_pipeline", "shipped", "reporting",
    "preflight", "comparing", "loading", "exporting", "imatrices", "importances", "jobs", "mixing", "gguf_cutting",
    "vocabulary", "gguf_stages", "gguf_pipeline", "gguf_preflight", "nvfp4_stages", "nvfp4_pipeline",
    "nvfp4_preflight", "inspection", "plan_stages",
}  # fmt: skip
LICENSED = {("evaluate", "serve")}

# package → modules (path prefixes below src/gemcut) that may import it at all
HEAVY = {
    "torch": ("stream/", "observe/", "ablate/", "canary/generate", "surgery/heal", "evaluate/kld", "export/nvfp4"),
    "transformers": ("stream/", "observe/", "canary/generate", "loading"),
    "compressed_tensors": ("stream/whole",),
    "matplotlib": ("report/figures", "report/canvas", "report/pareto"),
    "huggingface_hub": ("checkpoint/hub",),
    "rich": ("cli/console",),
    "tqdm": ("cli/console",),
    "click": ("cli/",),
    "jinja2": ("report/", "stream/rendering"),
}


def room_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", node.lineno
            if node.module == "gemcut":
                for alias in node.names:
                    yield f"gemcut.{alias.name}", node.lineno


def allowed(source: str, target: str) -> bool:
    if source == target or target in ("__init__", "__version__"):
        return True
    if source == "cli":
        return True
    if source in ABOVE:
        return target != "cli"
    if source in ROOMS:
        return target in GROUND | {"stream"} or (source, target) in LICENSED
    if source == "stream":
        return target in GROUND
    if source in GROUND:
        return target in GROUND
    return source == "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    source = room_of(path)
    assert source in ROOMS | GROUND | ABOVE | {"cli", "stream", "__init__"}, f"{source}: a room nobody knows"
    for name, line in imports(path):
        if name.startswith("gemcut."):
            target = name.split(".")[1]
            assert allowed(source, target), f"{path.name}:{line}: {source} may not import {target}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_heavy_packages_stay_in_their_rooms(path: Path) -> None:
    relative = path.relative_to(SOURCE).as_posix()
    for name, line in imports(path):
        top = name.split(".")[0]
        if top in HEAVY:
            assert relative.startswith(HEAVY[top]), f"{relative}:{line} imports {top}"


def test_no_drawer_modules() -> None:
    drawers = {"utils", "helpers", "common", "misc", "util", "helper"}
    assert not [p for p in MODULES if p.stem in drawers]


def test_modules_stay_small() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 420}
    assert not long, f"a second noun inside? {long}"


def test_only_the_console_prints() -> None:
    for path in MODULES:
        if path.relative_to(SOURCE).as_posix() in ("cli/console.py", "cli/main.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{path}:{node.lineno}"


def test_nothing_reads_pickles() -> None:
    for path in MODULES:
        for name, line in imports(path):
            assert name.split(".")[0] not in {"pickle", "dill", "joblib", "cloudpickle"}, f"{path}:{line}"
        text = path.read_text()
        assert "torch.load(" not in text
        assert "torch.save(" not in text


@pytest.mark.parametrize(
    ("what", "banned"),
    [
        ("--help", ("torch", "transformers", "pydantic", "rich", "numpy", "yaml", "tqdm")),
        ("inspect --help", ("torch", "transformers", "matplotlib")),
        ("cut --help", ("torch", "transformers", "matplotlib")),
        ("verify --help", ("torch", "transformers", "matplotlib")),
        ("diff --help", ("torch", "transformers", "matplotlib")),
        ("gguf --help", ("torch", "transformers", "matplotlib", "numpy")),
        ("nvfp4 --help", ("torch", "transformers", "matplotlib", "numpy")),
        ("canary --help", ("torch", "transformers", "numpy")),
    ],
)
def test_verbs_import_little(what: str, banned: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom gemcut.cli.main import main\n"
        f"try:\n    main({what.split()!r})\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        f"found = sorted(set({list(banned)!r}) & set(sys.modules))\nassert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
