"""Everything that one decoder layer is asked while the corpus passes through it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gemcut.observe.batches import Batch, Layout, strided
from gemcut.observe.cache import CachePeaks
from gemcut.observe.columns import ColumnSums, make_scratch
from gemcut.observe.gram import GramSum
from gemcut.observe.near import NearSums
from gemcut.observe.routed import RoutedSums
from gemcut.observe.settings import ObserveSettings, gram_splits
from gemcut.stream.experts import attach
from gemcut.stream.faults import refuse

# Where a decoder layer keeps what is asked (see the family's file).
ROUTER = "router"
ROUTER_LOGITS = "router.proj"
EXPERTS = "experts"
ATTENTION = "self_attn"
ATTENTION_OUT = "self_attn.o_proj"


class LayerObserver:
    """Hooks on one materialised layer, and the sums they fill. Use as a context; then `tensors()`."""

    def __init__(
        self, index: int, module: nn.Module, layout: Layout, settings: ObserveSettings, eps: float, device: torch.device
    ) -> None:
        self.index, self.module, self.layout, self.device = index, module, layout, device
        self.aliases: dict[str, str] = {}
        self._batch: Batch | None = None
        self._live: torch.Tensor | None = None
        self._handles: list[Any] = []
        self._columns: dict[str, ColumnSums] = {}
        self._scratch = make_scratch(device)
        self._cache = CachePeaks()
        self._last: tuple[str, Callable[[], object]] | None = None
        parts = dict(module.named_modules())
        self._linears = {
            name: part for name, part in parts.items() if isinstance(part, nn.Linear) and not name.startswith(ROUTER)
        }
        width = self._linears[ATTENTION_OUT].in_features
        take = settings.gram_take(width, layout.tokens)
        self._gram = GramSum(width, gram_splits(width), eps, device)
        self._gram_chosen = strided(layout.tokens, take)
        self._routed: RoutedSums | None = None
        self._near: NearSums | None = None
        if EXPERTS in parts:
            self._make_expert_sums(parts[EXPERTS], parts[ROUTER], settings)

    def _make_expert_sums(self, experts: Any, router: Any, settings: ObserveSettings) -> None:
        count = int(experts.num_experts)
        widths = (count, int(experts.hidden_dim), int(experts.intermediate_dim))
        self._routed = RoutedSums(self.layout, widths, self.device, self._scratch, self._refuse_expert)
        tokens = self.layout.tokens
        chosen = np.zeros(tokens, np.bool_)
        rng = np.random.default_rng(settings.seed)
        chosen[rng.choice(tokens, size=min(tokens, settings.near_sample), replace=False)] = True
        self._near = NearSums(count, int(router.config.top_k_experts), chosen)

    # ------------------------------------------------------------ hooks

    def __enter__(self) -> LayerObserver:
        for name, part in self._linears.items():
            self._handles.append(part.register_forward_pre_hook(self._linear_hook(name)))
        self._handles.append(self._linears[ATTENTION_OUT].register_forward_hook(self._gram_hook))
        attention = self.module.get_submodule(ATTENTION)
        self._handles.append(attention.register_forward_pre_hook(self._cache_hook, with_kwargs=True))
        if self._routed is not None:
            router = self.module.get_submodule(ROUTER)
            self._handles.append(router.register_forward_pre_hook(self._residual_hook))
            self._handles.append(router.register_forward_hook(self._near_hook))
            self._handles.append(self.module.get_submodule(ROUTER_LOGITS).register_forward_hook(self._logits_hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._routed is not None:
            attach(self.module.get_submodule(EXPERTS), None)

    def start(self, batch: Batch) -> None:
        """The next forward call runs this batch."""
        self._batch = batch
        self._live = None if batch.live is None else batch.live.to(self.device)
        self._last = None
        self._cache.start(self._live)
        if self._routed is not None:
            self._routed.start(batch)
            attach(self.module.get_submodule(EXPERTS), self._routed, self._live)

    def finish(self, output: torch.Tensor) -> None:
        """The call's output [B, S, H]: every real token must still be a number."""
        assert self._batch is not None
        if not bool(torch.isfinite(output.sum())):  # cheap, and never finite by accident; then row by row
            size = torch.linalg.vector_norm(output.reshape(-1, output.shape[-1]).float(), dim=-1)
            bad = ~torch.isfinite(size)
            if self._live is not None:
                bad &= self._live
            if bool(bad.any()):
                self._refuse("a layer's output", int(self._batch.token[int(torch.argmax(bad.to(torch.int8)))]))
        self._batch = None

    def _real(self, x: torch.Tensor) -> torch.Tensor:
        """[T, F] without padding."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self._live is None else flat[self._live]

    def _linear_hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            assert self._batch is not None
            x = args[0]
            if self._last is not None and self._last[1]() is x:  # q, k and v share an input, and so do gate and up
                self.aliases[name] = self._last[0]
                return
            self._last = (name, weakref.ref(x))
            if name not in self._columns:
                self._columns[name] = ColumnSums(x.shape[-1], device=self.device, scratch=self._scratch)
            self._columns[name].add(self._real(x), self._batch.split)

        return hook

    def _gram_hook(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        del module
        assert self._batch is not None
        token = self._batch.token
        rows = np.flatnonzero((token >= 0) & self._gram_chosen[token])
        if len(rows):
            at = torch.from_numpy(rows).to(self.device)
            x, y = args[0], output
            self._gram.add(x.reshape(-1, x.shape[-1])[at], y.reshape(-1, y.shape[-1])[at], self._batch.split)

    def _cache_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return args, {**kwargs, "past_key_values": self._cache}

    def _residual_hook(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        assert self._routed is not None
        self._routed.residual(args[0])

    def _logits_hook(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        del module, args
        self._logits = output

    def _near_hook(self, module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        del module, args
        assert self._near is not None
        assert self._batch is not None
        self._near.add(self._batch, self._logits.reshape(-1, self._logits.shape[-1]), output[2])
        del self._logits

    # ------------------------------------------------------------ refusals

    def _refuse(self, what: str, token: int, prefix: str = "", unit: int | None = None) -> NoReturn:
        where = f"layer {self.index}"
        if unit is not None:
            where += f", expert {unit}"
        refuse(self.module, self.index, what, f"{where}, {self.layout.name_token(token)}", prefix, unit)

    def _refuse_expert(self, what: str, token: int, expert: int | None) -> NoReturn:
        self._refuse(what, token, f"{EXPERTS}.", expert)

    def check(self) -> None:
        """Refuse sums that are no numbers although every output was."""
        columns = dict(self._columns)
        if self._routed is not None:
            columns |= {f"{EXPERTS}.gate_up_proj": self._routed.gate_up, f"{EXPERTS}.down_proj": self._routed.down}
        for name, sums in columns.items():
            if not sums.finite():
                refuse(self.module, self.index, f"the fourth moment of {name}'s input", f"layer {self.index}", name)
        if not self._gram.finite():
            refuse(self.module, self.index, "the Gram matrix", f"layer {self.index}, {ATTENTION_OUT}", ATTENTION_OUT)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All sums of the layer under their names on disk; see `observe.run`. Ends the sums; `check()` before."""
        out: dict[str, torch.Tensor] = {}
        if self._routed is not None and self._near is not None:
            out |= self._routed.tensors() | self._near.tensors()
        for name, sums in self._columns.items():
            out |= sums.tensors(name)
        return out | self._cache.tensors() | self._gram.tensors(ATTENTION_OUT)

    @property
    def counts(self) -> NDArray[np.float64] | None:
        """Routed tokens per expert, float64 [E]; None for a dense layer."""
        return None if self._routed is None else self._routed.by_class["n"].sum(0)
