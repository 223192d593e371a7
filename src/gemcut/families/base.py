"""What a family must say about its architecture, and nothing else: facts, no disk, no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gemcut.families.gguf import GgufLayout
from gemcut.families.linears import Linears
from gemcut.types import Json, Plan, Site

# Components that `inspect` and the size picture count, in the order shown.
COMPONENTS = ("embedding", "attention", "dense mlp", "experts", "router", "norms", "vision", "other")


@dataclass(frozen=True, slots=True)
class Norms:
    """Tensor names of the RMSNorms after each branch: scaling a whole branch before one of them changes nothing."""

    attention: str
    experts: str | None
    dense: str | None


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention: query head h reads KV group h // (heads // kv_heads).

    Shapes on disk: q [heads·D, H], k and v [kv_heads·D, H], o [H, heads·D].
    """

    heads: int
    kv_heads: int
    head_dim: int  # D
    full: bool  # every token sees all before it; False: a sliding window
    q: str  # tensor names
    k: str
    v: str | None  # None: K serves as V
    o: str
    shares_kv: bool = False  # reads the keys and values of an earlier layer

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Serving:
    """What every server needs to know, said once."""

    bos: bool  # exactly one BOS must open every sequence
    text_model: str  # the architecture of the decoder alone, as config.json calls it
    reasoning_parser: str
    tool_parser: str
    attention: str  # transformers' attn_implementation
    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True, slots=True)
class ExpertModule:
    """transformers' module of fused experts, and the keys of the decoder's config that it is built from.

    It is called with hidden states [T, H], indices [T, k] and weights [T, k]; experts are gated, without bias, and are
    called `experts.E.{gate,up,down}_proj` where they are stored apart.
    """

    module: str  # where the class is
    name: str
    experts: str
    hidden: str  # H
    inner: str  # the width inside an expert
    activation: str


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    sites(text_config, names): every place that can be cut, from the config and the tensor names on disk.
    shrink(config, plan): a new config.json for the cut checkpoint; refuses what the format cannot say. Experts and
        heads; the same config for a plan that only masks.
    module_of(site): dotted path of the transformers module (below the decoder layer) that runs the site.
    layer_prefix(names, layer): how this checkpoint's tensor names of a layer begin on disk.
    component(name): which of COMPONENTS a tensor belongs to.
    attention(text_config, names, layer): head counts and tensor names of one layer's attention.
    norms(prefix): the branch norms of the layer with this prefix.
    text_config(config): the part of config.json with the decoder's numbers.
    renormalises: the router's top-k weights are renormalised, so that dropping equals masking, to the bit.
    gguf(config, shapes): what the GGUF file of the decoder holds; shapes of all tensors in the order of the file.
    gguf_vision(config, shapes, preprocessor): what its mmproj file holds.
    linears(): what quantised checkpoints call its matrices.
    experts: its module of fused experts, None for a family that has none.
    """

    name: str
    architectures: tuple[str, ...]
    sites: Callable[[Mapping[str, Json], Collection[str]], tuple[Site, ...]]
    shrink: Callable[[Mapping[str, Json], Plan], dict[str, Json]]
    module_of: Callable[[Site], str]
    layer_prefix: Callable[[Collection[str], int], str]
    component: Callable[[str], str]
    attention: Callable[[Mapping[str, Json], Collection[str], int], Attention]
    norms: Callable[[str, bool], Norms]
    text_config: Callable[[Mapping[str, Json]], Mapping[str, Json]]
    top_k: Callable[[Mapping[str, Json]], int]
    renormalises: bool
    serving: Serving
    gguf: Callable[[Mapping[str, Json], Mapping[str, tuple[int, ...]]], GgufLayout]
    gguf_vision: Callable[[Mapping[str, Json], Mapping[str, tuple[int, ...]], Mapping[str, Json]], GgufLayout]
    linears: Callable[[], Linears]
    experts: ExpertModule | None
