"""The picture side of llama.cpp, as far as a test needs it: embeddings of one picture, from an mmproj file."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemcut.ggml.library import Blob, LogCallback, load
from gemcut.ggml.model import Model
from gemcut.types import F32

_P, _Z, _I = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32
_PICTURE = 1  # type of a chunk
_USE_GPU, _N_THREADS = 0, 20  # offsets in mtmd_context_params


class _Text(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char_p), ("size", _Z), ("add_special", ctypes.c_bool), ("special", ctypes.c_bool))


_quiet = LogCallback(lambda *_: None)


def picture_embeddings(trunk: Path, projector: Path, picture: NDArray[np.uint8]) -> F32:
    """float32 [tokens, H] of a picture [height, width, 3]."""
    dll: Any = load().dll

    def call(name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        function = getattr(dll, name)
        function.restype, function.argtypes = result, [kind for kind, _ in arguments]
        return function(*(value for _, value in arguments))

    call("mtmd_log_set", None, (LogCallback, _quiet), (_P, None))
    height, width, _ = picture.shape
    with Model(trunk, threads=1) as model:
        params = call("mtmd_context_params_default", Blob)
        params.put(_USE_GPU, "?", 0)
        params.put(_N_THREADS, "i", 1)
        context = call(
            "mtmd_init_from_file", _P, (ctypes.c_char_p, str(projector).encode()), (_P, model._model), (Blob, params)
        )
        assert context, "llama.cpp does not load the mmproj file"
        bitmap = call(
            "mtmd_bitmap_init", _P, (ctypes.c_uint32, width), (ctypes.c_uint32, height), (_P, picture.ctypes.data)
        )
        chunks = call("mtmd_input_chunks_init", _P)
        marker = call("mtmd_default_marker", ctypes.c_char_p)
        text = _Text(marker, len(marker), False, True)
        code = call("mtmd_tokenize", _I, (_P, context), (_P, chunks), (_P, ctypes.addressof(text)),
                    (_P, ctypes.addressof((_P * 1)(bitmap))), (_Z, 1))  # fmt: skip
        assert code == 0
        for i in range(call("mtmd_input_chunks_size", _Z, (_P, chunks))):
            chunk = call("mtmd_input_chunks_get", _P, (_P, chunks), (_Z, i))
            if call("mtmd_input_chunk_get_type", _I, (_P, chunk)) == _PICTURE:
                tokens = call("mtmd_input_chunk_get_n_tokens", _Z, (_P, chunk))
                assert call("mtmd_encode_chunk", _I, (_P, context), (_P, chunk)) == 0
                found = call("mtmd_get_output_embd", ctypes.POINTER(ctypes.c_float), (_P, context))
                out: F32 = np.ctypeslib.as_array(found, shape=(tokens, model.hidden_size)).copy()
        call("mtmd_bitmap_free", None, (_P, bitmap))
        call("mtmd_input_chunks_free", None, (_P, chunks))
        call("mtmd_free", None, (_P, context))
    return out
