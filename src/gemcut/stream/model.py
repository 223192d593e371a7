"""A checkpoint's own transformers modules, run layer by layer, one decoder layer in memory.

Nothing of the forward is written again here. The model's own forward runs on a skeleton whose decoder layers are
replaced by taps: that gives the embedding, each layer's call arguments (masks, rotary embeddings of both kinds,
positions) and, from the last tap on, the final norm, the head and its soft cap.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict, UserDict
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, UsageError
from gemcut.nvfp4.layout import HEADS_KEY, is_nvfp4
from gemcut.nvfp4.plain import Plain, plain_tensors
from gemcut.stream.experts import RECORDING, register
from gemcut.stream.rounding import LayerRounding
from gemcut.stream.taps import Call, NoEmbedding, Tap, call_bytes
from gemcut.stream.weights import DTYPE_NAMES, TORCH_DTYPES, WeightReader, named_dtype, release_freed_memory

log = logging.getLogger(__name__)

# Call arguments (masks, position embeddings) of the shapes used last: tracing one anew costs milliseconds per layer,
# which a small model feels, and the masks of long batches are large, which a small machine feels.
_KEPT_CALL_BYTES = 128 << 20


class StreamedModel:
    """One checkpoint, layer by layer. Not safe for use from two threads.

    Typical use, with `batches` of token ids `[B, S]` (right padding is allowed: attention is causal, so that nothing a
    real token computes can see it; what comes out at padded positions means nothing):

        hidden = [model.embed(ids) for ids in batches]
        for i in range(model.n_layers):
            with model.layer(i) as layer:
                model.prefetch(i + 1)
                hidden = [model.run_layer(layer, h) for h in hidden]
        logits = [model.head(h) for h in hidden]

    The embedding is in memory only between `embed` and the first `layer`, and from `head` until the next `layer`.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device, plain: Plain | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.config = model.config.get_text_config()
        self._model = model
        self._text = model.get_decoder()
        self._reader = WeightReader(checkpoint, dtype, device, plain)
        self._rounding = None if plain is None else LayerRounding(checkpoint, plain)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._layers: list[nn.Module] = list(self._text.layers)
        self._taps = [Tap(layer) for layer in self._layers]
        self._embedding: nn.Module = self._text.embed_tokens
        self._stub = NoEmbedding(self.hidden_size, dtype, device)
        self._calls: OrderedDict[tuple[int, int], list[Call]] = OrderedDict()
        self._ahead: dict[int, Future[None]] = {}
        self._weights: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self._materialise_buffers()
        self._text.layers = nn.ModuleList(self._taps)
        self._text.embed_tokens = self._stub
        self._load(self._text.norm)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        experts: str | None = None,
        packed: bool = False,
    ) -> StreamedModel:
        """Build the skeleton from config.json; reads no layer.

        Args:
            dtype: "bfloat16", "float16" or "float32"; None computes in the dtype of the stored embedding.
            experts: "recording" (see `stream.experts`), a name of transformers' registry ("eager", "grouped_mm",
                "batched_mm"), or None for what transformers takes by default.
            packed: run an NVFP4 checkpoint too: its weights are read back as they are loaded, inputs of linears with
                quantised activations are rounded (of experts, under "recording" alone), and so are keys and values of
                an FP8 cache. Such a model is for measuring: what it says of activations is not the base's.
        Raises:
            UsageError: an unknown name; a model with per-layer embeddings or shared KV, which cannot be streamed; an
                NVFP4 checkpoint where `packed` does not allow it, or W4A4 experts without "recording".
            CheckpointError: config.json is not what its architecture needs.
        """
        where = torch.device(device)
        plain = _plain(checkpoint, packed, experts)
        compute = named_dtype(dtype) if dtype is not None else stored_dtype(checkpoint)
        register()
        try:
            config = _config(checkpoint)
            chosen = {} if experts is None else {"experts_implementation": _implementation(experts)}
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=compute, trust_remote_code=False, **chosen)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(
                "transformers cannot build this model from its config.json",
                where=checkpoint.name,
                got=f"{type(error).__name__}: {error}"[:200],
            ) from error
        _refuse_unstreamable(config.get_text_config())
        return cls(checkpoint, model.eval().requires_grad_(False), compute, where, plain)

    # ------------------------------------------------------------ facts

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.dtype]

    def tensor_names(self, i: int) -> tuple[str, ...]:
        """Names on disk of layer `i`'s tensors."""
        layer = self._layers[i]
        return tuple(f"{self._names[id(layer)]}.{name}" for name in layer.state_dict())

    # ------------------------------------------------------------ running

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, H] that enter the first layer, from token ids [B, S]."""
        self._load(self._embedding)
        self._text.embed_tokens = self._embedding
        try:
            self._trace(input_ids.to(self.device))
        finally:
            self._text.embed_tokens = self._stub
        out: torch.Tensor = self._taps[0].__dict__["seen"]
        self._forget()
        return out

    @contextlib.contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """Decoder layer `i` with its weights; they are freed when the block ends."""
        self._release_ends()
        if (ahead := self._ahead.pop(i, None)) is not None:
            ahead.result()
        layer = self._layers[i]
        self._load(layer)
        rounding = self._rounding.on(layer, self._names[id(layer)]) if self._rounding else contextlib.nullcontext()
        try:
            with rounding:
                yield layer
        finally:
            self._unload(layer)
            release_freed_memory()

    def prefetch(self, i: int) -> None:
        """Start reading layer `i` into the page cache. Past the last layer: nothing."""
        if 0 <= i < self.n_layers and i not in self._ahead:
            self._ahead[i] = self._reader.warm(self.tensor_names(i))

    @torch.no_grad()
    def run_layer(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, S, H] through a layer that `layer(i)` gave, with the arguments the model itself passes."""
        return self._run(layer, hidden)

    @torch.enable_grad()
    def run_layer_with_grad(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`run_layer`, recorded for autograd. Weights are constants; ask for the gradient before `layer(i)` ends."""
        return self._run(layer, hidden)

    def _run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        index = next(i for i, known in enumerate(self._layers) if known is layer)
        with torch.no_grad():  # the arguments are kept for other calls and belong to no graph
            call = self._call_of(hidden.shape[0], hidden.shape[1])[index]
        # a fresh place for shared KV, so that no batch keeps another's keys and values alive
        kwargs = {key: UserDict() if isinstance(value, UserDict) else value for key, value in call.kwargs.items()}
        out = layer(hidden, *call.args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] from the last layer's output [..., H]: final norm, head and soft cap of the model itself."""
        return self._head(hidden)

    @torch.enable_grad()
    def head_with_grad(self, hidden: torch.Tensor) -> torch.Tensor:
        """`head`, recorded for autograd. Weights are constants; ask for the gradient before the next `layer`."""
        return self._head(hidden)

    @torch.enable_grad()
    def head_parts(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`head_with_grad`, what enters the output layer [T, H], and what leaves it before the soft cap [T, V]."""
        seen: list[torch.Tensor] = []
        hook = self._model.lm_head.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
        try:
            logits = self._head(hidden)
        finally:
            hook.remove()
        return logits, seen[0], seen[1]

    def end_names(self) -> tuple[str, str]:
        """Names on disk of the embedding and of the output layer: one name where they are tied."""
        embedding, head = (self._stored(module)[0][2] for module in (self._embedding, self._model.lm_head))
        return embedding, head

    @property
    def embedding_scale(self) -> float:
        """What the embedding's rows are multiplied by before they enter the first layer."""
        return float(getattr(self._embedding, "embed_scale", 1.0))

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        self._load(self._model.lm_head)
        flat = hidden.reshape(-1, 1, hidden.shape[-1])  # T sequences of one token: no mask to build
        self._taps[-1].__dict__["give"] = flat
        try:
            ids = torch.zeros(flat.shape[:2], dtype=torch.int64, device=self.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._forget()
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def close(self) -> None:
        """Free what is loaded and stop the read-ahead thread."""
        self._release_ends()
        self._reader.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------ inside

    def _call_of(self, batch: int, length: int) -> list[Call]:
        calls = self._calls.get((batch, length))
        if calls is None:
            self._trace(torch.zeros((batch, length), dtype=torch.int64, device=self.device))
            calls = [tap.__dict__["call"] for tap in self._taps]
            self._forget()
            self._calls[batch, length] = calls
            while len(self._calls) > 1 and sum(map(call_bytes, self._calls.values())) > _KEPT_CALL_BYTES:
                self._calls.popitem(last=False)
        else:
            self._calls.move_to_end((batch, length))
        return calls

    def _trace(self, input_ids: torch.Tensor) -> None:
        self._model.model(input_ids=input_ids, use_cache=False)

    def _forget(self) -> None:
        for tap in self._taps:
            tap.__dict__["seen"] = tap.__dict__["call"] = tap.__dict__["give"] = None

    def _materialise_buffers(self) -> None:
        """Give buffers that no checkpoint stores (rotary frequencies, embedding scale) their values, in the dtype that
        from_pretrained leaves them in: float32 frequencies, whatever the model's dtype."""
        for module in self._text.modules():
            stored = set(module.state_dict(keep_vars=True))
            computed = [n for n, b in module.named_buffers(recurse=False) if b is not None and n not in stored]
            if not computed:
                continue
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            self._model._init_weights(module)

    def _load(self, module: nn.Module) -> None:
        """Weights and stored buffers of a module from disk; what is loaded already stays."""
        for owner, leaf, name, value in self._stored(module):
            if not value.is_meta:
                continue
            if leaf in owner._buffers:
                owner._buffers[leaf] = self._reader.read(name, tuple(value.shape))
                continue
            weight = self._weights.get(name)  # a tied head is the embedding: never twice in memory
            if weight is None:
                weight = nn.Parameter(self._reader.read(name, tuple(value.shape)), requires_grad=False)
                self._weights[name] = weight
            owner._parameters[leaf] = weight

    def _unload(self, module: nn.Module) -> None:
        for owner, leaf, _, value in self._stored(module):
            if leaf in owner._buffers:
                owner._buffers[leaf] = value.to("meta")
            else:
                owner._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)

    def _stored(self, module: nn.Module) -> list[tuple[nn.Module, str, str, torch.Tensor]]:
        """(owning module, attribute, name on disk, value) of everything in a module that a checkpoint stores."""
        out = []
        root = self._names[id(module)]
        for key, value in module.state_dict(keep_vars=True).items():
            path, _, leaf = key.rpartition(".")
            name = f"{root}.{key}"
            if name == "lm_head.weight" and name not in self.checkpoint.tensors:
                name = f"{self._names[id(self._embedding)]}.weight"  # tied
            out.append((module.get_submodule(path), leaf, name, value))
        return out

    def _ends(self) -> set[str]:
        ends = (self._embedding, self._model.lm_head)
        return {name for module in ends for _, _, name, _ in self._stored(module)}

    def _release_ends(self) -> None:
        for module in (self._embedding, self._model.lm_head):
            self._unload(module)


def _implementation(experts: str) -> str:
    if experts == "recording":
        return RECORDING
    known = ("eager", "grouped_mm", "batched_mm", RECORDING)
    if experts not in known:
        raise UsageError(
            "there is no such experts implementation", got=experts, wanted=f"recording or {', '.join(known)}"
        )
    return experts


def _config(checkpoint: Checkpoint) -> Any:
    """transformers' config. HEADS_KEY is for other loaders: here it would only make transformers warn of itself."""
    said = transformers_logging.get_verbosity()
    if HEADS_KEY in checkpoint.text_config:
        transformers_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    finally:
        transformers_logging.set_verbosity(said)
    setattr(config.get_text_config(), HEADS_KEY, False)
    return config


def refuse_packed(checkpoint: Checkpoint) -> None:
    """What learns from weights or activations wants the original ones.

    Raises:
        UsageError: it is an NVFP4 checkpoint.
    """
    if is_nvfp4(checkpoint.config):
        raise UsageError(
            "an NVFP4 checkpoint can be measured, and nothing be learned from it",
            where=checkpoint.name,
            hint="start from the checkpoint that it was made from; kld takes both",
        )


def _plain(checkpoint: Checkpoint, allowed: bool, experts: str | None) -> Plain | None:
    """The checkpoint's plain tensors, where it is NVFP4."""
    if not is_nvfp4(checkpoint.config):
        return None
    if not allowed:
        refuse_packed(checkpoint)
    plain = plain_tensors(checkpoint)
    fused = any(not name.endswith(".weight") for name in plain.packed)
    if fused and plain.told.scheme == "NVFP4" and experts != "recording":
        raise UsageError(
            "quantised activations of experts need another implementation", got=experts, wanted="recording"
        )
    return plain


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the stored embedding: what the checkpoint was saved in."""
    for name, ref in checkpoint.tensors.items():
        if name.endswith("embed_tokens.weight") and ref.dtype in TORCH_DTYPES:
            return TORCH_DTYPES[ref.dtype]
    raise CheckpointError("the checkpoint has no unquantised embed_tokens.weight", where=checkpoint.name)


def _refuse_unstreamable(config: Any) -> None:
    for key, why in (
        ("hidden_size_per_layer_input", "per-layer embeddings"),
        ("num_kv_shared_layers", "keys and values shared between layers"),
    ):
        if getattr(config, key, 0):
            raise UsageError(
                f"a model with {why} cannot be run layer by layer",
                where=f"config.json: {key}",
                got=getattr(config, key),
                wanted=0,
            )
