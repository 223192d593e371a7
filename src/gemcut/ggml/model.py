"""A GGUF file run by llama.cpp: logits, hidden states and greedy text from token ids that the caller gives.

No token is added here, not even BOS, and every sequence starts with an empty memory. Weights are mapped, never
repacked for this machine, so that the figures do not depend on which kernels it happens to have for one type.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from gemcut.errors import CheckpointError, ToolError, UsageError
from gemcut.ggml import library as lib
from gemcut.ggml.library import Batch, Blob, Library
from gemcut.ggml.trial import try_out
from gemcut.gguf_file.header import GgufFile, open_gguf
from gemcut.machine import free_cores
from gemcut.types import F32

CONTEXT = 4096
_CONTEXT_STEP = 256  # llama.cpp rounds a context up to this
_MAX_BATCH = 512
_LOGIT_BYTES = 256 << 20  # of one batch; a vocabulary of 262,144 gives 256 tokens
_MAX_PIECE_BYTES = 1 << 16
_SPARE_TOKENS = 64


def batch_of(vocabulary: int) -> int:
    """Tokens that are computed together."""
    return max(1, min(_MAX_BATCH, _LOGIT_BYTES // max(1, 4 * vocabulary)))


def run_bytes(vocabulary: int) -> int:
    """Memory of a running model beside its mapped weights: logits of a batch, once computed and once kept."""
    return 2 * 4 * vocabulary * batch_of(vocabulary)


class Model:
    """One GGUF file in memory, with one sequence at a time. Not safe for use from two threads."""

    def __init__(
        self,
        path: Path,
        *,
        context: int | None = None,
        threads: int | None = None,
        batch: int | None = None,
        check: bool = True,
        trial: bool = True,
        library: Library | None = None,
    ) -> None:
        """Map the file and make room for one sequence.

        Args:
            context: tokens of the longest sequence; None: what the model was trained for, at most 4096.
            threads: None: the cores that are free now. llama.cpp's threads spin: more than the free cores is far
                slower than one.
            batch: tokens that are computed together, 1 … 512; None: as many as 256 MiB of logits allow.
            check: look for NaN and infinities in all weights while they are read.
            trial: let another process load the file and compute two tokens first, once: see `trial`.
        Raises:
            CheckpointError: no readable GGUF, or llama.cpp refuses it: its last lines are in the error.
            ToolError: no context of this size, most likely for lack of memory.
        """
        self._library = library or lib.load()
        self._dll = self._library.dll
        self.file: GgufFile = open_gguf(path)  # bounds first: llama.cpp aborts on some of what this refuses
        self.name = path.name
        self.threads = threads or free_cores()
        if self.threads < 1 or (batch is not None and not 1 <= batch <= _MAX_BATCH) or (context or 1) < 1:
            raise UsageError("threads, batch and context are at least 1, and a batch at most 512", where=self.name)
        self._dll.llama_backend_init()
        if self._dll.ggml_backend_reg_count() == 0:  # a library whose back ends are files of their own
            self._dll.ggml_backend_load_all()
        first = path.with_name(self.file.parts[0])  # of a split file, whichever part was named
        if trial:
            try_out(first, self.file.size_bytes, self._library)
        self._model: int = self._load(first, check=check)
        self._closer = weakref.finalize(self, self._dll.llama_model_free, self._model)
        self._vocab: int = self._dll.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._dll.llama_vocab_n_tokens(self._vocab)
        self.hidden_size: int = self._dll.llama_model_n_embd_out(self._model)
        self.batch = batch or batch_of(self.vocabulary)
        self._context_handle: int = self._open_context(context)
        self.context: int = self._dll.llama_n_ctx(self._context_handle)
        self._used = 0

    def _load(self, path: Path, *, check: bool) -> int:
        params: Blob = self._dll.llama_model_default_params()
        params.put(lib.CHECK_TENSORS, "?", check)
        params.put(lib.USE_EXTRA_BUFTS, "?", False)
        self._library.forget_lines()
        model: int | None = self._dll.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise CheckpointError("llama.cpp does not load the file", where=self.name, got=self._library.last_lines())
        return model

    def _open_context(self, context: int | None) -> int:
        if context is None:
            context = min(CONTEXT, max(1, self._dll.llama_model_n_ctx_train(self._model)))
        params: Blob = self._dll.llama_context_default_params()
        for offset, value in (
            (lib.N_CTX, -(-context // _CONTEXT_STEP) * _CONTEXT_STEP),
            (lib.N_BATCH, self.batch),
            (lib.N_UBATCH, self.batch),
            (lib.N_SEQ_MAX, 1),
            (lib.N_THREADS, self.threads),
            (lib.N_THREADS_BATCH, self.threads),
        ):
            params.put(offset, "i", value)
        self._library.forget_lines()
        handle: int | None = self._dll.llama_init_from_model(self._model, params)
        if not handle:
            self._closer()
            raise ToolError(
                f"llama.cpp makes no context of {context} tokens", where=self.name, got=self._library.last_lines(),
                hint="a shorter context needs less memory",
            )  # fmt: skip
        free_model = self._closer.detach()
        assert free_model is not None
        self._closer = weakref.finalize(self, _free, self._library, handle, self._model)
        return handle

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        self._closer()

    def _must_be_open(self) -> None:
        """llama.cpp follows a pointer to freed memory without a word."""
        if not self._closer.alive:
            raise UsageError("the model is closed", where=self.name)

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ numbers

    def logits(self, tokens: Sequence[int]) -> F32:
        """float32 [T, V]: what comes after each token, soft cap included. BOS is the caller's."""
        out = np.empty((len(tokens), self.vocabulary), np.float32)
        for start, part in self.stream(tokens):
            out[start : start + len(part)] = part
        return out

    def stream(self, tokens: Sequence[int]) -> Iterator[tuple[int, F32]]:
        """(position of its first row, logits float32 [≤ batch, V]) in order. A part is overwritten by the next one."""
        ids = self._checked(tokens)
        self.clear()
        for start in range(0, len(ids), self.batch):
            yield start, self._decode(ids[start : start + self.batch], self._dll.llama_get_logits_ith, self.vocabulary)

    def hidden(self, tokens: Sequence[int]) -> F32:
        """float32 [T, H]: states after the final norm, that the head multiplies."""
        ids = self._checked(tokens)
        self.clear()
        out, read = np.empty((len(ids), self.hidden_size), np.float32), self._dll.llama_get_embeddings_ith
        self._dll.llama_set_embeddings(self._context_handle, True)
        try:
            for start in range(0, len(ids), self.batch):
                part = ids[start : start + self.batch]
                out[start : start + len(part)] = self._decode(part, read, self.hidden_size)
        finally:
            self._dll.llama_set_embeddings(self._context_handle, False)
        return out

    def generate(self, tokens: Sequence[int], count: int, *, stop: bool = True) -> list[int]:
        """Up to `count` most likely next tokens, one after the other; ties go to the lowest id.

        Args:
            stop: end after a token that ends a turn or a text (the answer then ends with it).
        """
        ids = self._checked(tokens, room=count)
        self.clear()
        answer: list[int] = []
        for start in range(0, len(ids), self.batch):
            part = ids[start : start + self.batch]
            rows = self._decode(part, self._dll.llama_get_logits_ith, self.vocabulary)
        while len(answer) < count:
            token = int(rows[-1].argmax())
            answer.append(token)
            if len(answer) == count or (stop and self._dll.llama_vocab_is_eog(self._vocab, token)):
                break
            rows = self._decode(np.array([token], np.int32), self._dll.llama_get_logits_ith, self.vocabulary)
        return answer

    def clear(self) -> None:
        """Forget the sequence: the next token is at position 0."""
        self._must_be_open()
        self._dll.llama_memory_clear(self._dll.llama_get_memory(self._context_handle), True)
        self._used = 0

    def _checked(self, tokens: Sequence[int], room: int = 0) -> NDArray[np.int32]:
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or not len(ids):
            raise UsageError("a sequence has at least one token", where=self.name)
        if len(ids) + room > self.context:
            wanted = f"at most {self.context}"
            raise UsageError(
                "the sequence is longer than the context", where=self.name, got=len(ids) + room, wanted=wanted
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
            bad = int(ids[(ids < 0) | (ids >= self.vocabulary)][0])
            raise UsageError("no such token", where=self.name, got=bad, wanted=f"0 to {self.vocabulary - 1}")
        return ids.astype(np.int32)

    def _decode(self, ids: NDArray[np.int32], read: ctypes._NamedFuncPointer, width: int) -> F32:
        """Append tokens to the sequence; a view of their outputs [t, width], which the next call overwrites."""
        self._must_be_open()  # a stream may have been left open longer than its model
        n = len(ids)
        positions = np.arange(self._used, self._used + n, dtype=np.int32)
        ones, zero, wanted = np.ones(n, np.int32), ctypes.c_int32(0), np.ones(n, np.int8)
        sequences = (ctypes.POINTER(ctypes.c_int32) * n)(*[ctypes.pointer(zero)] * n)
        batch = Batch(
            n_tokens=n,
            token=ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            pos=positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=ones.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=sequences,
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._library.forget_lines()
        code = self._dll.llama_decode(self._context_handle, batch)
        first = read(self._context_handle, 0) if code == 0 else None
        if not first:
            got = f"code {code}: {self._library.last_lines()}"
            raise ToolError("llama.cpp did not compute the tokens", where=self.name, got=got)
        self._used += n
        return np.ctypeslib.as_array(ctypes.cast(first, ctypes.POINTER(ctypes.c_float)), shape=(n, width))

    # ------------------------------------------------------------ words

    @cached_property
    def bos(self) -> int | None:
        """The token that begins a text, as the file says it."""
        self._must_be_open()
        token = int(self._dll.llama_vocab_bos(self._vocab))
        return token if token >= 0 else None

    def tokenise(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text, with no token added. special: markers such as <|turn> become their one token."""
        self._must_be_open()
        raw = text.encode()
        room = len(raw) + _SPARE_TOKENS
        out = np.empty(room, np.int32)
        n = self._dll.llama_tokenize(self._vocab, raw, len(raw), out.ctypes.data, room, False, special)
        if n < 0:
            raise ToolError("llama.cpp does not tokenise the text", where=self.name, got=f"{len(raw)} bytes")
        return [int(token) for token in out[:n]]

    def text(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """The text of ids; markers are written out where `special`, and left out otherwise."""
        pieces = b"".join(self._piece(int(token), special=special) for token in self._checked_ids(tokens))
        return pieces.decode(errors="replace")

    def _checked_ids(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        return self._checked(tokens) if len(tokens) else np.empty(0, np.int32)

    def _piece(self, token: int, *, special: bool) -> bytes:
        self._must_be_open()
        buffer = ctypes.create_string_buffer(256)
        n = self._dll.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(min(-n, _MAX_PIECE_BYTES))
            n = self._dll.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[: max(n, 0)]

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the header says, as plain values; arrays are tuples."""
        return {key: value.value for key, value in self.file.metadata.items()}


def _free(library: Library, context: int, model: int) -> None:
    library.dll.llama_free(context)
    library.dll.llama_model_free(model)
