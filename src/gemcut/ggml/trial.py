"""A file is tried in a process of its own first: what llama.cpp asserts about a header ends the process it runs in.

The child loads the file, computes two tokens, and says nothing. It imports gemcut from where this process has it, and
nothing from the current folder, which may hold anybody's files.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gemcut.errors import CheckpointError, GemcutError, ToolError
from gemcut.ggml.library import ABORTED, VARIABLE, Library

_LEAST_SECONDS = 60
_BYTES_A_SECOND = 20 << 20  # a slow disk: weights are read while the tokens are computed

_ROOT = Path(__file__).parents[2]  # what has to be on the path for gemcut to be found
_CHILD = f"import sys; sys.path.append(sys.argv[2]); from {__name__} import run; run(sys.argv[1])"

_passed: set[tuple[str, int, int, int]] = set()


def try_out(path: Path, size_bytes: int, library: Library) -> None:
    """Nothing where llama.cpp can load and run the file, or refuses it in words; once per file and process.

    Raises:
        CheckpointError: llama.cpp would end this process, or never come back.
        ToolError: nothing was tried.
    """
    found = path.stat()
    key = (str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns)
    if key in _passed:
        return
    seconds = _LEAST_SECONDS + size_bytes // _BYTES_A_SECOND
    environment = {**os.environ, VARIABLE: str(library.path) if library.named else ""}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CHILD, str(path), str(_ROOT)],
            capture_output=True, text=True, errors="replace", check=False, timeout=seconds, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            "llama.cpp does not come back from this file", where=path.name, got=f"{seconds} s"
        ) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"signal {-done.returncode}"]
        got = re.sub(r"\S*/", "", last[0].removeprefix("error: "))
        if done.returncode == ABORTED or done.returncode < 0:
            raise CheckpointError("llama.cpp stops on this file", where=path.name, got=got)
        raise ToolError("the process that tries a file did not start", where=path.name, got=got)
    _passed.add(key)


def run(path: str) -> None:
    """In the child."""
    from gemcut.ggml.model import Model

    try:
        with Model(Path(path), context=1, threads=1, batch=2, check=False, trial=False) as model:
            model.logits([0, min(1, model.vocabulary - 1)])
    except GemcutError:
        return  # the caller meets it again, with the words
