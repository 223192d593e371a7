"""References to models: folders, the local cache, and a Hub that answers on the loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemcut.checkpoint import resolve
from gemcut.errors import UsageError

COMMIT = "a" * 39 + "1"
CONFIG = b'{"architectures": ["Gemma4ForCausalLM"]}'


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "google" / "gemma").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = resolve("google/gemma")
    assert (found.source, found.name, found.revision) == ("folder", "gemma", None)
    assert found.path.samefile(tmp_path / "google" / "gemma")


@pytest.mark.parametrize(
    "ref", ["./nope", "/nope/nope", "~/nope-nope", "a b/c", "one/two/three", "", "hf://", "hf://x/y@"]
)
def test_not_a_reference(ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if ref:
        with pytest.raises(UsageError, match="no such model folder"):
            resolve(ref)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UsageError, match="is a folder, not a file"):
        resolve(str(tmp_path / "model.safetensors"))


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a small download needs."""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "/gated" in path:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif "/absent" in path:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no"})
        elif "nope" in path:
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no"})
        elif "/broken" in path:
            self.answer(500, b"{}", {})
        elif path.startswith("/api/models/org/model/tree/"):
            entry = {"type": "file", "path": "config.json", "size": len(CONFIG), "oid": "b" * 40}
            self.answer(200, json.dumps([entry, {**entry, "path": "pytorch_model.bin"}]).encode(), {})
        elif path.startswith("/api/models/org/model"):
            files = [{"rfilename": "config.json"}, {"rfilename": "pytorch_model.bin"}]
            body = {"_id": "1", "id": "org/model", "sha": COMMIT, "siblings": files, "tags": [], "private": False}
            self.answer(200, json.dumps(body).encode(), {})
        elif path == f"/org/model/resolve/{COMMIT}/config.json":
            etag = hashlib.sha1(CONFIG, usedforsecurity=False).hexdigest()
            self.answer(200, CONFIG, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(ref: str, home: Path, **env: str) -> str:
    """Resolve in a fresh process: the Hub client reads its environment once."""
    code = (
        "import sys; from gemcut.checkpoint import resolve; from gemcut.errors import GemcutError\n"
        "try:\n r = resolve(sys.argv[1])\n"
        " print(r.source, r.name, r.revision, sorted(p.name for p in r.path.iterdir()))\n"
        "except GemcutError as e: print(type(e).__name__, e)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    run = subprocess.run(
        [sys.executable, "-c", code, ref],
        env={**clean, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **env},
        capture_output=True, text=True, timeout=120, cwd=home,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.slow
def test_download_is_pinned_to_a_commit_and_cached(hub: str, tmp_path: Path) -> None:
    wanted = f"hub org/model {COMMIT} ['config.json']"  # pickles are not even downloaded
    assert ask("org/model", tmp_path, HF_ENDPOINT=hub) == wanted
    assert ask("hf://org/model@main", tmp_path, HF_ENDPOINT=hub) == wanted
    assert ask("org/model", tmp_path, HF_HUB_OFFLINE="1") == wanted
    assert ask(f"org/model@{COMMIT}", tmp_path, HF_HUB_OFFLINE="1") == wanted
    assert ask("org/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == wanted


@pytest.mark.parametrize(
    ("ref", "kind", "words"),
    [("org/gated", "MissingError", "gated"), ("org/absent", "UsageError", "no such model"),
     ("org/model@nope", "UsageError", "no such revision"), ("org/broken", "MissingError", "Hub")],
)  # fmt: skip
def test_what_the_hub_refuses(hub: str, tmp_path: Path, ref: str, kind: str, words: str) -> None:
    answer = ask(ref, tmp_path, HF_ENDPOINT=hub)
    assert answer.startswith(kind)
    assert words in answer
    assert str(tmp_path) not in answer


def test_offline_and_not_cached(tmp_path: Path) -> None:
    answer = ask("org/model", tmp_path, HF_HUB_OFFLINE="1")
    assert answer.startswith("MissingError")
    assert "HF_HUB_OFFLINE" in answer
