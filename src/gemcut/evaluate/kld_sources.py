"""Who gives logits: a checkpoint's stored hidden states and its head, or a GGUF file that llama.cpp runs beside it.

A source is asked for logits at scored positions, in order and once each. Nothing of vocabulary size is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.families.gemma4_assistant_gguf import ARCHITECTURE as DRAFTER
from gemcut.ggml.model import Model
from gemcut.gguf_file.header import GgufFile
from gemcut.gguf_file.identity import gguf_fingerprint
from gemcut.nvfp4.layout import is_nvfp4
from gemcut.nvfp4.plain import plain_tensors
from gemcut.store import read_json
from gemcut.stream.corpus import Corpus, Row, check_tokenizer
from gemcut.stream.hidden import BATCH_TOKENS, Progress, Slabs, final_hidden
from gemcut.stream.model import StreamedModel
from gemcut.types import F32, Json

Compared: TypeAlias = Checkpoint | GgufFile

# One implementation for all, so that models differ by nothing else: the one that can round the inputs of experts.
_EXPERTS = "recording"
TOKENS, BOS = "tokenizer.ggml.tokens", "tokenizer.ggml.bos_token_id"


class Source(Protocol):
    """One model's logits, in the order of the scored positions."""

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """float32 [stop − start, V]. The next call begins where this one ended."""


def name_of(model: Compared) -> str:
    """What people call it; never a path."""
    return model.name if isinstance(model, Checkpoint) else model.path.name


def fingerprint_of(model: Compared) -> str:
    """Identity of what was measured."""
    return model.fingerprint if isinstance(model, Checkpoint) else gguf_fingerprint(model)


def vocabulary_of(model: Compared) -> int:
    """Rows of the head.

    Raises:
        CheckpointError: the model does not say.
    """
    if isinstance(model, GgufFile):
        return len(_tokens(model))
    size = model.text_config.get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError("config.json has no vocab_size", where=model.name)
    return size


# ---------------------------------------------------------------- checkpoints


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A checkpoint that has been streamed: states before the final norm [T, H], and the model that ends it."""

    states: torch.Tensor
    model: StreamedModel

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """Final norm, head and soft cap in float32."""
        return self.model.head(self.states[start:stop].to(self.model.device, torch.float32))


def stream_states(
    checkpoints: Sequence[tuple[str, Checkpoint]],
    corpus: Corpus,
    slabs: Slabs,
    *,
    device: str,
    dtype: str | None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> tuple[list[torch.Tensor], str | None]:
    """Last hidden states of every (role, checkpoint), and the dtype they were computed in: the first one's for all."""
    states = []
    for role, checkpoint in checkpoints:
        with StreamedModel.open(checkpoint, device=device, dtype=dtype, experts=_EXPERTS, packed=True) as streamed:
            dtype = streamed.dtype_name
            label = f"{role}: {checkpoint.name}"
            states.append(
                final_hidden(streamed, corpus.items, slabs, batch_tokens=batch_tokens, progress=progress, label=label)
            )
    return states, dtype


class Heads:
    """Heads of several checkpoints in float32; equal ones are in memory once."""

    def __init__(self, stack: contextlib.ExitStack, device: str) -> None:
        self._stack = stack
        self._device = device
        self._shared: dict[str, StreamedModel] = {}

    def open(self, checkpoint: Checkpoint, states: torch.Tensor) -> Head:
        key = _head_identity(checkpoint)
        if key not in self._shared:
            opened = StreamedModel.open(checkpoint, device=self._device, dtype="float32", experts=_EXPERTS, packed=True)
            self._shared[key] = self._stack.enter_context(opened)
        return Head(states, self._shared[key])


def _head_identity(model: Checkpoint) -> str:
    """Equal strings: the same function from the last hidden state to logits."""
    text = model.text_config
    parts = [str(text.get(key)) for key in ("hidden_size", "rms_norm_eps", "final_logit_softcapping", "model_type")]
    for name in sorted(model.tensors):
        outside = ".layers." not in name and "vision" not in name and "audio" not in name
        if outside and name.endswith(("embed_tokens.weight", "norm.weight", "lm_head.weight")):
            parts.append(f"{name} {model.ref(name).dtype} {model.content_hash(name)}")
    return "\n".join(parts)


# ---------------------------------------------------------------- GGUF


class Lockstep:
    """A GGUF file that runs while it is asked: each item from an empty memory, its last token never."""

    def __init__(self, model: Model, rows: Sequence[Row]) -> None:
        self._model = model
        self._parts = self._run(rows)
        self._part: F32 = np.empty((0, model.vocabulary), np.float32)

    def _run(self, rows: Sequence[Row]) -> Iterator[F32]:
        for row in rows:
            for _, part in self._model.stream(row.ids[:-1].tolist()):
                yield part

    def logits(self, start: int, stop: int) -> torch.Tensor:
        out = np.empty((stop - start, self._model.vocabulary), np.float32)
        done = 0
        while done < len(out):
            if not len(self._part):
                self._part = next(self._parts)
            n = min(len(self._part), len(out) - done)
            out[done : done + n] = self._part[:n]
            self._part = self._part[n:]
            done += n
        return torch.from_numpy(out)


# ---------------------------------------------------------------- the same ids everywhere


def check_ids(model: Compared, base: Compared, corpus: Corpus, folder: Path | None) -> None:
    """The model must read the corpus's token ids as the corpus meant them.

    Args:
        folder: a checkpoint folder whose tokenizer made the ids; None where only GGUF files are compared.
    Raises:
        UsageError: it is a drafter's file.
        CheckpointError: another tokenizer, vocabulary or BOS; an NVFP4 folder whose tensors do not fit together.
    """
    if vocabulary_of(model) != vocabulary_of(base):
        got, wanted = f"{vocabulary_of(model)} tokens", f"{vocabulary_of(base)} ({name_of(base)})"
        raise CheckpointError("the models have different vocabularies", where=name_of(model), got=got, wanted=wanted)
    if isinstance(model, Checkpoint):
        check_tokenizer(model.path, model.name, corpus)
        if is_nvfp4(model.config):
            plain_tensors(model)  # refused now, and not after the base has run
        return
    if model.value("general.architecture") == DRAFTER:
        raise UsageError("a drafter has no logits without its trunk", where=name_of(model), wanted="a model file")
    if isinstance(base, GgufFile) and _tokens(model) != _tokens(base):
        raise CheckpointError(
            "the files have different tokens", where=name_of(model), wanted=f"those of {name_of(base)}"
        )
    if folder is not None:
        _check_tokens(model, folder)
    _check_bos(model, corpus)


def _tokens(file: GgufFile) -> tuple[object, ...]:
    tokens = file.value(TOKENS)
    if not isinstance(tokens, tuple) or not tokens:
        raise CheckpointError("the GGUF file has no vocabulary", where=name_of(file), wanted=TOKENS)
    return tokens


def _check_tokens(file: GgufFile, folder: Path) -> None:
    """Every id stands for the same piece in the file and in the folder's tokenizer.json."""
    value = read_json(folder / "tokenizer.json", "tokenizer.json")
    inner, added = value.get("model"), value.get("added_tokens")
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    pieces: dict[object, Json] = {}
    if isinstance(vocabulary, dict):
        pieces = {i: piece for piece, i in vocabulary.items() if isinstance(i, int)}
    for one in added if isinstance(added, list) else ():
        if isinstance(one, dict) and isinstance(one.get("id"), int):
            pieces[one["id"]] = one.get("content")
    for i, token in enumerate(_tokens(file)):
        if i in pieces and pieces[i] != token:
            raise CheckpointError(
                "the GGUF file has other tokens than the corpus",
                where=f"{name_of(file)}, token {i}",
                got=repr(token),
                wanted=repr(pieces[i]),
                hint="KL divergence needs the same token ids in both models",
            )


def _check_bos(file: GgufFile, corpus: Corpus) -> None:
    """Exactly one BOS, the file's own, in front of every item: llama.cpp's habit of adding one is not used here."""
    bos = file.value(BOS)
    if not isinstance(bos, int):
        return
    for row in corpus.items:
        if int(row.ids[0]) != bos or int((row.ids == bos).sum()) != 1:
            got = f"{int((row.ids == bos).sum())} BOS, first token {int(row.ids[0])}"
            raise CheckpointError(
                "an item needs exactly one BOS, in front", where=f"item {row.id!r}", got=got, wanted=bos
            )
