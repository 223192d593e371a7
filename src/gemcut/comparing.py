"""What `gemcut kld` compares: folders and GGUF files by reference, the corpus for them, and the floor of noise."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from gemcut import exporting, machine, models, shipped, store
from gemcut.checkpoint import Checkpoint, open_checkpoint
from gemcut.errors import UsageError
from gemcut.ggml.types import GgmlType
from gemcut.gguf_file.header import GgufFile, open_gguf
from gemcut.recipe import Measure
from gemcut.stages import keep_kld
from gemcut.types import KldResult

if TYPE_CHECKING:
    from gemcut.stream.corpus import Corpus

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Compared: TypeAlias = Checkpoint | GgufFile

FLOOR = "noise floor: the base in BF16"
_FLOOR_FOLDER, _LOCK = "gemcut-floor-", "lock"
_PLAIN = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})


@dataclass(frozen=True, slots=True)
class Comparison:
    """A base and named candidates, opened; headers only.

    tokenizer: the folder whose tokenizer and template make the token ids.
    """

    base: Compared
    candidates: Mapping[str, Compared]
    tokenizer: Path

    @property
    def wants_floor(self) -> bool:
        """A folder against GGUF files, none of which shows what the other arithmetic does by itself."""
        files = [one for one in self.candidates.values() if isinstance(one, GgufFile)]
        return isinstance(self.base, Checkpoint) and bool(files) and not any(is_plain(one) for one in files)


def is_plain(file: GgufFile) -> bool:
    """Whether every tensor is stored in 16 or 32 bits: then the file differs from its base by arithmetic alone."""
    return all(ref.kind in _PLAIN for ref in file.tensors.values())


def open_comparison(base: str, candidates: tuple[str, ...], tokenizer: str | None = None) -> Comparison:
    """Open what is compared.

    Raises:
        UsageError: only GGUF files, and no folder for the token ids.
    """
    first = open_gguf(Path(base)) if models.is_gguf(base) else models.open_model(base)
    named: dict[str, Compared] = {}
    for name, path in models.candidate_names(candidates).items():
        named[name] = open_gguf(path) if models.is_gguf(path.name) else open_checkpoint(path, name)
    if tokenizer is not None:
        folder = shipped.model_path(tokenizer) or Path(tokenizer)
    else:
        folders = [one.path for one in (first, *named.values()) if isinstance(one, Checkpoint)]
        if not folders:
            raise UsageError(
                "nothing says how text becomes token ids",
                where="gemcut kld",
                hint="--tokenizer FOLDER: the checkpoint that the GGUF files were made of",
            )
        folder = folders[0]
    return Comparison(first, named, folder)


def corpus_for(comparison: Comparison, words: Measure, *, raw: bool = False) -> Corpus:
    """Token rows under the comparison's own tokenizer. raw: texts without the chat template."""
    from gemcut.stream.corpus import load_corpus

    return load_corpus(
        shipped.corpus_path(words.corpus),
        comparison.tokenizer,
        max_tokens_per_item=words.max_tokens_per_item,
        max_tokens=words.max_tokens,
        raw=raw,
    )


@contextlib.contextmanager
def with_floor(comparison: Comparison, scratch: Path, *, progress: Progress | None = None) -> Iterator[Comparison]:
    """The comparison with one candidate more: its base as a BF16 GGUF, which is deleted afterwards.

    What that file shows is the arithmetic of llama.cpp against that of transformers, and no loss of bits.

    Raises:
        UsageError: the base is a GGUF file; it runs on the same arithmetic as the candidates, and its floor is 0.
        MissingError: no room on the disk for the file.
    """
    if not isinstance(comparison.base, Checkpoint):
        raise UsageError("a floor of noise needs a base that is a folder", where=comparison.base.path.name)
    with store.disk_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        delete_leftovers(scratch)
        place = tempfile.TemporaryDirectory(prefix=_FLOOR_FOLDER, dir=scratch)
    with place as folder, open(Path(folder) / _LOCK, "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        exports = exporting.plan_export(comparison.base, exporting.GgufWords(("BF16",)))
        threads = machine.free_cores()
        store.need_disk(scratch, exporting.estimate(exports, Path(folder), threads).write_bytes)
        exporting.write_export(exports, Path(folder), threads=threads, progress=progress)
        (file,) = Path(folder).glob("*.gguf")
        candidates = {FLOOR: open_gguf(file), **comparison.candidates}
        yield Comparison(comparison.base, candidates, comparison.tokenizer)


def delete_leftovers(scratch: Path) -> None:
    """Floors of killed runs in this folder: those of running ones are locked."""
    for old in scratch.glob(f"{_FLOOR_FOLDER}*"):
        with contextlib.suppress(OSError), open(old / _LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old)
            log.info("deleted what a killed run left: %s", old.name)


def measure(
    comparison: Comparison,
    corpus: Corpus,
    words: Measure,
    folder: Path | None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, KldResult]:
    """All candidates against the base; kept as one JSON per candidate where a folder is given."""
    from gemcut.evaluate.kld import KldSettings, kld
    from gemcut.stream.devices import use_free_cores

    use_free_cores()
    settings = KldSettings(
        device=words.device, dtype=words.dtype, seed=words.seed, threads=threads, tokenizer=comparison.tokenizer
    )
    results = kld(comparison.base, list(comparison.candidates.values()), corpus, settings, progress=progress)
    return keep_kld(dict(zip(comparison.candidates, results, strict=True)), folder)
