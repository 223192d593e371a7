"""The library is refused unless it is the one whose structures are known."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gemcut.errors import MissingError, ToolError
from gemcut.ggml import library


def test_the_pinned_wheel_loads_and_says_what_it_is() -> None:
    loaded = library.load()
    assert loaded is library.load()
    assert loaded.identity.startswith(f"{library.PACKAGE} {library.VERSION}")
    assert str(loaded.path.parent) not in loaded.identity


def test_loading_does_not_import_the_package() -> None:
    code = "import sys; from gemcut.ggml.library import load; load(); assert 'xllamacpp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_named_library_goes_through_the_same_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel = library.load().path
    monkeypatch.setenv(library.VARIABLE, str(wheel))
    monkeypatch.setattr(library, "_loaded", {})
    assert "named by the user" in library.load().identity

    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "libllama.so"))
    with pytest.raises(MissingError, match="does not exist"):
        library.load()
    (tmp_path / "libllama.so").write_bytes(b"no library")
    with pytest.raises(ToolError, match="does not load"):
        library.load()


def test_a_library_of_something_else_is_refused() -> None:
    other = importlib.util.find_spec("_ctypes")
    assert other is not None
    assert other.origin is not None
    with pytest.raises(ToolError, match="lacks a function"):
        library.load(Path(other.origin))


@pytest.mark.parametrize("found", [None, "2026.9.1"])
def test_an_absent_wheel_or_another_version(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.delenv(library.VARIABLE, raising=False)

    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(library, "_loaded", {})
    with pytest.raises(MissingError, match="wheel") as caught:
        library.load()
    assert library.VERSION in str(caught.value)


@pytest.mark.parametrize("table", ["_CONTEXT_DEFAULTS", "_MODEL_DEFAULTS"])
def test_every_sentinel_is_looked_at(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """Asking for any other default than the library has must refuse it: no row of the table is decoration."""
    dll = library.load().dll
    library._check_structures(dll, "lib")
    rows = getattr(library, table)
    for i, (offset, form, values) in enumerate(rows):
        wrong = (*rows[:i], (offset, form, (*values[:-1], values[-1] + 7)), *rows[i + 1 :])
        monkeypatch.setattr(library, table, wrong)
        with pytest.raises(ToolError, match="another llama"):
            library._check_structures(dll, "lib")


def test_other_flags_and_another_tensor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dll = library.load().dll
    monkeypatch.setattr(library, "_CONTEXT_FLAGS", bytes((1, 1, 1, 1, 1, 0)))
    with pytest.raises(ToolError, match="another llama"):
        library._check_structures(dll, "lib")
    monkeypatch.undo()
    monkeypatch.setattr(library, "_TENSOR_OVERHEAD", 368 + 8)
    with pytest.raises(ToolError, match="another llama"):
        library._check_structures(dll, "lib")


def test_blocks_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dll = library.load().dll
    for kind, block in library.BLOCKS.items():
        wrong = {**library.BLOCKS, kind: type(block)(block.values, block.size_bytes + 2)}
        monkeypatch.setattr(library, "BLOCKS", wrong)
        with pytest.raises(ToolError, match="another llama"):
            library._check_blocks(dll, "lib")


def test_an_abort_leaves_with_the_exit_code_of_a_tool_error() -> None:
    """A refusal inside ggml would otherwise be a core dump: SIGABRT and no word of gemcut's."""
    code = (
        "import numpy as np; from gemcut.ggml.library import load; d = load().dll; z = np.zeros(256, np.float32);"
        "d.ggml_quantize_chunk(16, z.ctypes.data, z.ctypes.data, 0, 1, 256, None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == ToolError.exit_code
    assert "llama.cpp stopped the process" in done.stderr


def test_log_lines_are_kept_for_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    loaded = library.load()
    loaded.forget_lines()
    assert loaded.last_lines() == ""
    params = loaded.dll.llama_model_default_params()
    assert not loaded.dll.llama_model_load_from_file(b"no-such-file.gguf", params)
    assert "no-such-file.gguf" in loaded.last_lines()
    assert capfd.readouterr() == ("", "")
    assert isinstance(loaded.dll, ctypes.CDLL)
