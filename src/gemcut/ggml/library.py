"""llama.cpp's shared library: found, checked, and its functions declared. Nothing is compiled and no package imported.

The pinned wheel is one extension module that exports all C functions of llama.cpp and ggml. Two of its structures are
passed by value and have no stable layout; they are handled as blobs of defaults in which a few known offsets are set.
So a library is refused unless every default that stands at a known place is what that place should hold.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gemcut.errors import MissingError, ToolError
from gemcut.ggml.types import BLOCKS

log = logging.getLogger(__name__)

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
VARIABLE = "GEMCUT_LIBLLAMA"

ABORTED = ToolError.exit_code  # of this process, when ggml asserts

_BLOB_BYTES = 512  # more than either structure has: a callee reads and writes only its own part
_TENSOR_OVERHEAD = 32 + 336  # the object's header and sizeof(struct ggml_tensor)
_LAST_LINES = 40


class Blob(ctypes.Structure):
    """A structure of llama.cpp that goes by value, as bytes."""

    _fields_ = (("raw", ctypes.c_uint8 * _BLOB_BYTES),)

    def put(self, offset: int, format: str, value: int | float) -> None:
        struct.pack_into("=" + format, self.raw, offset, value)

    def get(self, offset: int, format: str) -> tuple[Any, ...]:
        return struct.unpack_from("=" + format, self.raw, offset)


# Offsets into llama_context_params and llama_model_params that are set here.
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX, N_THREADS, N_THREADS_BATCH, FLASH_ATTENTION = 0, 4, 8, 12, 28, 32, 52
TYPE_K = 104
VOCAB_ONLY, CHECK_TENSORS, USE_EXTRA_BUFTS = 72, 73, 74

# offset, format, values: what the defaults are, so that a moved field is noticed
_CONTEXT_DEFAULTS: tuple[tuple[int, str, tuple[int | float, ...]], ...] = (
    (N_CTX, "4I", (512, 2048, 512, 1)),
    (N_THREADS, "2i", (4, 4)),
    (FLASH_ATTENTION, "i", (-1,)),
    (56, "2f4fIf", (0.0, 0.0, -1.0, -1.0, -1.0, -1.0, 0, -1.0)),
    (88, "2Q", (0, 0)),
    (TYPE_K, "2i", (1, 1)),
    (112, "2Q", (0, 0)),
)
_CONTEXT_FLAGS = bytes((0, 1, 1, 1, 1, 0))  # embeddings … kv_unified
_CONTEXT_FLAGS_AT = (136, 128)  # the pinned wheel, and libraries before one more pointer was added
_MODEL_DEFAULTS: tuple[tuple[int, str, tuple[int | float, ...]], ...] = (
    (0, "2Q", (0, 0)),
    (16, "5i", (-1, 1, -1, 1, 0)),
    (40, "4Q", (0, 0, 0, 0)),
    (VOCAB_ONLY, "6B", (0, 0, 1, 0, 0, 0)),
)


class Batch(ctypes.Structure):
    """struct llama_batch: one token per row, its position, sequence, and whether its output is wanted."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Traits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
AbortCallback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

_P, _I, _L, _Z, _S, _B = (
    ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_bool,
)  # fmt: skip
# name → (result, arguments) of every function that gemcut calls
FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_blck_size": (_L, (_I,)),
    "ggml_type_size": (_Z, (_I,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_get_type_traits": (ctypes.POINTER(Traits), (_I,)),
    "ggml_quantize_init": (None, (_I,)),
    "ggml_quantize_requires_imatrix": (_B, (_I,)),
    "ggml_quantize_chunk": (_Z, (_I, _P, _P, _L, _L, _L, _P)),
    "ggml_validate_row_data": (_B, (_I, _P, _Z)),
    "ggml_set_abort_callback": (_P, (AbortCallback,)),
    "ggml_backend_reg_count": (_Z, ()),
    "ggml_backend_load_all": (None, ()),
    "llama_version": (_S, ()),
    "llama_log_set": (None, (LogCallback, _P)),
    "llama_backend_init": (None, ()),
    "llama_context_default_params": (Blob, ()),
    "llama_model_default_params": (Blob, ()),
    "llama_model_load_from_file": (_P, (_S, Blob)),
    "llama_model_free": (None, (_P,)),
    "llama_model_get_vocab": (_P, (_P,)),
    "llama_model_n_ctx_train": (_I, (_P,)),
    "llama_model_n_embd": (_I, (_P,)),
    "llama_model_n_embd_out": (_I, (_P,)),
    "llama_model_n_layer": (_I, (_P,)),
    "llama_model_n_params": (ctypes.c_uint64, (_P,)),
    "llama_model_size": (ctypes.c_uint64, (_P,)),
    "llama_model_meta_count": (_I, (_P,)),
    "llama_model_meta_key_by_index": (_I, (_P, _I, _P, _Z)),
    "llama_model_meta_val_str_by_index": (_I, (_P, _I, _P, _Z)),
    "llama_init_from_model": (_P, (_P, Blob)),
    "llama_free": (None, (_P,)),
    "llama_n_ctx": (ctypes.c_uint32, (_P,)),
    "llama_n_batch": (ctypes.c_uint32, (_P,)),
    "llama_get_memory": (_P, (_P,)),
    "llama_memory_clear": (None, (_P, _B)),
    "llama_set_embeddings": (None, (_P, _B)),
    "llama_decode": (_I, (_P, Batch)),
    "llama_get_logits_ith": (_P, (_P, _I)),
    "llama_get_embeddings_ith": (_P, (_P, _I)),
    "llama_vocab_n_tokens": (_I, (_P,)),
    "llama_vocab_bos": (_I, (_P,)),
    "llama_vocab_is_eog": (_B, (_P, _I)),
    "llama_tokenize": (_I, (_P, _S, _I, _P, _I, _B, _B)),
    "llama_token_to_piece": (_I, (_P, _I, _P, _I, _I, _B)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """A checked library.

    dll: has the functions of `FUNCTIONS`, declared.   identity: may be published.   named: by the user, no wheel.
    """

    dll: ctypes.CDLL
    path: Path
    identity: str
    named: bool

    def last_lines(self, count: int = 2) -> str:
        """What llama.cpp logged last: the reason of a failure, since its functions return only null."""
        return " | ".join(list(_lines)[-count:])

    def forget_lines(self) -> None:
        _lines.clear()


_lines: deque[str] = deque(maxlen=_LAST_LINES)
_loaded: dict[Path | None, Library] = {}
_lock = threading.Lock()


def load(path: Path | None = None) -> Library:
    """The library of the pinned wheel, or the one named by `path` or the variable GEMCUT_LIBLLAMA. Loaded once.

    Raises:
        MissingError: the wheel is not installed or is another version; the named file does not exist.
        ToolError: the file is no llama.cpp, lacks a function, or has other structures or block sizes.
    """
    named = path if path is not None else _from_environment()
    with _lock:
        if named not in _loaded:  # a quantiser asks for every tensor
            found = _wheel() if named is None else named.resolve()
            if not found.is_file():
                raise MissingError(
                    "the named llama.cpp library does not exist", got=found.name, hint=f"check {VARIABLE}"
                )
            _loaded[named] = _open(found, from_wheel=named is None)
        return _loaded[named]


def _from_environment() -> Path | None:
    value = os.environ.get(VARIABLE, "")
    return Path(value) if value else None


def _wheel() -> Path:
    """The extension module in the wheel. `find_spec` of a top-level package does not import it."""
    hint = f"pip install {PACKAGE}=={VERSION}, or name a library in {VARIABLE}"
    try:
        version = metadata.version(PACKAGE)
        spec = importlib.util.find_spec(PACKAGE)
    except (metadata.PackageNotFoundError, ValueError):
        version, spec = "", None
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("the llama.cpp wheel is not installed", wanted=f"{PACKAGE} {VERSION}", hint=hint)
    if version != VERSION:
        raise MissingError("another version of the llama.cpp wheel", got=version, wanted=VERSION, hint=hint)
    files = [p for folder in spec.submodule_search_locations for p in sorted(Path(folder).glob(f"{PACKAGE}*"))]
    for file in files:
        if file.suffix in (".so", ".pyd", ".dylib"):
            return file
    raise MissingError("the llama.cpp wheel holds no library", wanted=f"{PACKAGE} {VERSION}", hint=hint)


def _open(path: Path, *, from_wheel: bool) -> Library:
    try:
        dll = ctypes.CDLL(str(path))
    except OSError as e:
        hint = "install what it links with, such as libgomp1"
        raise ToolError("the llama.cpp library does not load", where=path.name, got=e, hint=hint) from e
    for name, (result, arguments) in FUNCTIONS.items():
        try:
            function = getattr(dll, name)
        except AttributeError:
            raise ToolError("the library lacks a function of llama.cpp", where=path.name, wanted=name) from None
        function.restype, function.argtypes = result, arguments
    dll.llama_log_set(_on_log, None)
    dll.ggml_set_abort_callback(_on_abort)
    _check_blocks(dll, path.name)
    _check_structures(dll, path.name)
    said = dll.llama_version()
    version = said.decode(errors="replace") if said else "?"
    identity = f"{PACKAGE} {VERSION} (llama.cpp {version})" if from_wheel else f"llama.cpp {version}, named by the user"
    return Library(dll, path, identity, named=not from_wheel)


# ---------------------------------------------------------------- sentinels


def _check_structures(dll: ctypes.CDLL, name: str) -> None:
    if (size := dll.ggml_tensor_overhead()) != _TENSOR_OVERHEAD:
        raise _refusal(name, f"ggml_tensor_overhead() {size}", str(_TENSOR_OVERHEAD))
    context, model = dll.llama_context_default_params(), dll.llama_model_default_params()
    for what, blob, table in (("context", context, _CONTEXT_DEFAULTS), ("model", model, _MODEL_DEFAULTS)):
        for offset, format, values in table:
            if (got := blob.get(offset, format)) != values:
                raise _refusal(name, f"{what} parameters at byte {offset}: {got}", str(values))
    raw = bytes(context.raw)
    if not any(raw[at : at + len(_CONTEXT_FLAGS)] == _CONTEXT_FLAGS for at in _CONTEXT_FLAGS_AT):
        raise _refusal(name, f"context flags {raw[128:144].hex()}", _CONTEXT_FLAGS.hex())


def _check_blocks(dll: ctypes.CDLL, name: str) -> None:
    for kind, block in BLOCKS.items():
        traits = dll.ggml_get_type_traits(kind).contents
        said = traits.type_name.decode(errors="replace") if traits.type_name else ""
        got = (said.upper(), dll.ggml_blck_size(kind), dll.ggml_type_size(kind), traits.blck_size, traits.type_size)
        wanted = (kind.name, *block, *block)
        if got != wanted:
            raise _refusal(name, f"type {int(kind)}: {got}", str(wanted))


def _refusal(name: str, got: str, wanted: str) -> ToolError:
    hint = f"use {PACKAGE} {VERSION}, or a library of about its age"
    return ToolError(
        "the library is another llama.cpp than gemcut knows", where=name, got=got, wanted=wanted, hint=hint
    )


# ---------------------------------------------------------------- what the library calls

_ERROR, _CONTINUED = 4, 5


def _log_line(level: int, text: bytes | None, _: object) -> None:
    line = (text or b"").decode(errors="replace").rstrip("\n")
    if not line.strip(". "):
        return
    if level == _CONTINUED and _lines:
        _lines[-1] += line
        return
    _lines.append(line)
    log.log(logging.INFO if level == _ERROR else logging.DEBUG, "%s", line)


def _abort_line(text: bytes | None) -> None:
    """Last words: the library aborts the process when this returns, so leave with the exit code of a ToolError."""
    os.write(2, b"error: llama.cpp stopped the process: " + (text or b"").strip() + b"\n")
    os._exit(ABORTED)


_Callback = Callable[..., None]
_on_log: _Callback = LogCallback(_log_line)
_on_abort: _Callback = AbortCallback(_abort_line)
