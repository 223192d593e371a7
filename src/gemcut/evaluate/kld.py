"""KL divergence of candidates from a base, and perplexity: streamed, with no logits file.

Every checkpoint goes through its layers once, one layer in memory; its last hidden states are kept (10 KB a token for a
26B model, where logits would be 1 MB). The head then runs for the base and all candidates together, a few positions at
a time, so that several candidates share the base's pass and nothing of vocabulary size is ever stored.

Scored are all next-token positions of every item: an item of T tokens (BOS first) has T − 1. Every scored token counts
once; item weights belong to calibration and are not used here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.evaluate.chunks import KldChunks
from gemcut.evaluate.interval import RESAMPLES, Bootstrap
from gemcut.evaluate.kld_tile import compare, rows_per_tile
from gemcut.stream.corpus import Corpus
from gemcut.stream.hidden import BATCH_TOKENS, Progress, Slabs, final_hidden, scored_positions
from gemcut.stream.model import StreamedModel
from gemcut.stream.rendering import tokenizer_hash
from gemcut.types import F64, I64, Estimate, KldResult, KldRow

log = logging.getLogger(__name__)

ALL = "all"


@dataclass(frozen=True, slots=True)
class PplRow:
    """Mean next-token loss of one class in nats, and its perplexity exp(loss)."""

    cls: str
    tokens: int
    loss: Estimate
    ppl: float


@dataclass(frozen=True, slots=True)
class PplResult:
    """One model on one corpus."""

    fingerprint: str
    model: str
    corpus_hash: str
    template_hash: str
    dtype: str
    chunks: int
    seed: int
    rows: tuple[PplRow, ...]


@dataclass(frozen=True, slots=True)
class KldSettings:
    """How the models run, and what the intervals are drawn from.

    device: "cpu", "cuda", "cuda:1".
    dtype: of the layers: "float32", "bfloat16", …; None or "auto": as the base is stored. Heads compute in float32.
    seed, resamples: of the bootstrap.
    chunk_tokens: what is resampled is a whole item (None), or runs of at most this many scored tokens of one.
    batch_tokens: padded positions that go through a layer together.
    memory_bytes: hidden states beyond this lie in a nameless file in `scratch`; None: a quarter of what is free.
    """

    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    resamples: int = RESAMPLES
    chunk_tokens: int | None = None
    batch_tokens: int = BATCH_TOKENS
    memory_bytes: int | None = None
    scratch: Path | None = None


DEFAULTS = KldSettings()


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """Per scored token: chunk int64 [T] (0 … N−1); nll float64 [M, T], kl float64 [M−1, T], same bool [M−1, T]."""

    dtype: str
    chunk: I64
    nll: F64
    kl: F64
    same: np.ndarray[tuple[int, int], np.dtype[np.bool_]]


def kld(
    base: Checkpoint,
    candidates: Sequence[Checkpoint],
    corpus: Corpus,
    settings: KldSettings = DEFAULTS,
    *,
    progress: Progress | None = None,
) -> list[KldResult]:
    """KL(base ‖ candidate) in nats of each candidate, per class and over all, with chunk bootstrap intervals.

    Mean, median, p99 and same-top over scored tokens; ln PPL ratio = mean(nll_candidate − nll_base). Equal models give
    exactly 0 and same_top 1. See `kld_tile.compare` for the formulas; float64 from float32 logits.

    Args:
        progress: called with (done, total, label): layers of each model, then tokens of the head.
    Returns:
        One result per candidate, in order; rows are the classes (alphabetical), then "all".
    Raises:
        UsageError: no candidate.
        CheckpointError: another tokenizer or vocabulary than the base or the corpus.
        QualityError: a hidden state or a logit is not finite.
    """
    measured = _compared(base, candidates, corpus, settings, progress)
    rows = _rows_of(corpus, measured)
    draw = (settings.seed, settings.resamples)
    return [
        KldResult(
            base_fingerprint=base.fingerprint,
            candidate_fingerprint=candidate.fingerprint,
            candidate=candidate.name,
            corpus_hash=corpus.hash,
            template_hash=corpus.template_hash,
            dtype=measured.dtype,
            chunks=int(measured.chunk[-1]) + 1,
            seed=settings.seed,
            rows=tuple(_kld_row(name, take, strata, measured, i, draw) for name, take, strata in rows),
        )
        for i, candidate in enumerate(candidates)
    ]


def kld_chunks(
    base: Checkpoint,
    candidates: Sequence[Checkpoint],
    corpus: Corpus,
    settings: KldSettings = DEFAULTS,
    *,
    progress: Progress | None = None,
) -> KldChunks:
    """KL of every chunk and candidate, for paired comparisons. Positions, arguments, errors as in `kld`."""
    measured = _compared(base, candidates, corpus, settings, progress)
    _, _, strata = _rows_of(corpus, measured)[-1]
    tokens = np.bincount(measured.chunk).astype(np.int64)
    kl = np.stack([_sums(one, measured.chunk) for one in measured.kl])
    return KldChunks(strata, tokens, kl, settings.seed, settings.resamples)


def perplexity(
    model: Checkpoint, corpus: Corpus, settings: KldSettings = DEFAULTS, *, progress: Progress | None = None
) -> PplResult:
    """Perplexity per class and over all: exp(mean next-token loss). Positions, intervals, arguments as in `kld`."""
    measured = _measure([model], corpus, settings, progress)
    rows = []
    for name, take, strata in _rows_of(corpus, measured):
        chunk, tokens = _renumbered(measured.chunk[take])
        bootstrap = Bootstrap(strata, settings.seed, settings.resamples)
        loss = bootstrap.ratio(_sums(measured.nll[0, take], chunk), tokens)
        rows.append(PplRow(name, int(tokens.sum()), loss, float(np.exp(loss.value))))
    return PplResult(
        fingerprint=model.fingerprint,
        model=model.name,
        corpus_hash=corpus.hash,
        template_hash=corpus.template_hash,
        dtype=measured.dtype,
        chunks=int(measured.chunk[-1]) + 1,
        seed=settings.seed,
        rows=tuple(rows),
    )


# ---------------------------------------------------------------- running the models


def _compared(
    base: Checkpoint,
    candidates: Sequence[Checkpoint],
    corpus: Corpus,
    settings: KldSettings,
    progress: Progress | None,
) -> _Measured:
    if not candidates:
        raise UsageError("no candidate to compare with the base", where=base.name)
    return _measure([base, *candidates], corpus, settings, progress)


def _measure(
    models: Sequence[Checkpoint], corpus: Corpus, settings: KldSettings, progress: Progress | None
) -> _Measured:
    if ALL in corpus.classes:
        raise UsageError(f"a class may not be named {ALL!r}: that row pools the classes", where="corpus")
    if settings.chunk_tokens is not None and settings.chunk_tokens < 1:
        raise UsageError("chunk_tokens is too small", got=settings.chunk_tokens, wanted="at least 1")
    for model in models:
        _check_vocabulary(model, models[0], corpus)
    memory = settings.memory_bytes
    slabs = Slabs(int(psutil.virtual_memory().available) // 4 if memory is None else memory, settings.scratch)
    dtype = None if settings.dtype == "auto" else settings.dtype
    hidden: list[torch.Tensor] = []
    for i, checkpoint in enumerate(models):
        with StreamedModel.open(checkpoint, device=settings.device, dtype=dtype) as streamed:
            dtype = streamed.dtype_name  # the base decides for all
            role = "base" if i == 0 else f"candidate {i}/{len(models) - 1}"
            hidden.append(
                final_hidden(
                    streamed,
                    corpus.items,
                    slabs,
                    batch_tokens=settings.batch_tokens,
                    progress=progress,
                    label=f"{role}: {checkpoint.name}",
                )
            )
    nll, kl, same = _heads(models, hidden, corpus, settings.device, progress)
    return _Measured(dtype or "", _chunks(corpus, settings.chunk_tokens), nll, kl, same)


def _check_vocabulary(model: Checkpoint, base: Checkpoint, corpus: Corpus) -> None:
    found = tokenizer_hash(model.path)
    if found != corpus.tokenizer_hash:
        raise CheckpointError(
            "the corpus was tokenised by another tokenizer than the model's",
            where=model.name,
            got=found[:12],
            wanted=corpus.tokenizer_hash[:12],
            hint="KL divergence needs the same token ids in both models",
        )
    if _vocabulary(model) != _vocabulary(base):
        raise CheckpointError(
            "the models have different vocabularies",
            where=model.name,
            got=f"{_vocabulary(model)} tokens",
            wanted=f"{_vocabulary(base)} ({base.name})",
        )


def _vocabulary(model: Checkpoint) -> int:
    size = model.text_config.get("vocab_size")
    if not isinstance(size, int):
        raise CheckpointError("config.json has no vocab_size", where=model.name)
    return size


def _heads(
    models: Sequence[Checkpoint],
    hidden: Sequence[torch.Tensor],
    corpus: Corpus,
    device: str,
    progress: Progress | None,
) -> tuple[F64, F64, np.ndarray[tuple[int, int], np.dtype[np.bool_]]]:
    """Final norm, head and soft cap of every model in float32, a tile of positions at a time, all models together."""
    target = torch.from_numpy(np.concatenate([row.ids[1:] for row in corpus.items]))
    total, m = len(target), len(models)
    nll, kl = np.empty((m, total)), np.empty((m - 1, total))
    same = np.empty((m - 1, total), dtype=np.bool_)
    step = rows_per_tile(_vocabulary(models[0]))
    with contextlib.ExitStack() as stack:
        heads: list[StreamedModel] = []
        shared: dict[str, StreamedModel] = {}
        for model in models:
            key = _head_identity(model)
            if key not in shared:  # a candidate with the base's own head needs no second copy of it
                opened = StreamedModel.open(model, device=device, dtype="float32")
                shared[key] = stack.enter_context(opened)
            heads.append(shared[key])
        for start in range(0, total, step):
            stop = min(start + step, total)
            logits = []
            for model, head, states in zip(models, heads, hidden, strict=True):
                out = head.head(states[start:stop].to(head.device, torch.float32))
                if not bool(torch.isfinite(out).all()):
                    _refuse_infinite(model, corpus, start, out)
                logits.append(out)
            done = compare(logits, target[start:stop].to(logits[0].device))
            nll[:, start:stop] = done.nll.cpu().numpy()
            kl[:, start:stop] = done.kl.cpu().numpy()
            same[:, start:stop] = done.same.cpu().numpy()
            if progress is not None:
                progress(stop, total, "head, tokens")
    return nll, kl, same


def _head_identity(model: Checkpoint) -> str:
    """Equal strings: the same function from the last hidden state to logits."""
    text = model.text_config
    parts = [str(text.get(key)) for key in ("hidden_size", "rms_norm_eps", "final_logit_softcapping", "model_type")]
    for name in sorted(model.tensors):
        outside = ".layers." not in name and "vision" not in name and "audio" not in name
        if outside and name.endswith(("embed_tokens.weight", "norm.weight", "lm_head.weight")):
            parts.append(f"{name} {model.ref(name).dtype} {model.content_hash(name)}")
    return "\n".join(parts)


def _refuse_infinite(model: Checkpoint, corpus: Corpus, start: int, logits: torch.Tensor) -> None:
    at = start + int(torch.nonzero(~torch.isfinite(logits).all(-1))[0])
    begins = scored_positions(corpus.items)
    item = int(np.searchsorted(begins, at, side="right")) - 1
    raise QualityError(
        "a logit is not finite",
        where=f"{model.name}, item {corpus.items[item].id!r}, token {at - int(begins[item])}",
        hint="look for the broken tensor with gemcut diff",
    )


# ---------------------------------------------------------------- rows of the table


def _chunks(corpus: Corpus, chunk_tokens: int | None) -> I64:
    """int64 [T]: the chunk of every scored token. Chunks never span two items."""
    parts, count = [], 0
    for row in corpus.items:
        at = np.arange(len(row.ids) - 1, dtype=np.int64)
        part = count + (np.zeros_like(at) if chunk_tokens is None else at // chunk_tokens)
        parts.append(part)
        count = int(part[-1]) + 1
    return np.concatenate(parts)


def _rows_of(corpus: Corpus, measured: _Measured) -> list[tuple[str, I64, I64]]:
    """(name, positions [t], class of each chunk among them [n]) of every class, then of all."""
    names = list(corpus.classes)
    per_item = np.array([names.index(row.cls) for row in corpus.items], dtype=np.int64)
    of_token = np.repeat(per_item, np.diff(scored_positions(corpus.items)))
    firsts = np.flatnonzero(np.diff(measured.chunk, prepend=-1))
    of_chunk = of_token[firsts]
    rows = [(n, np.flatnonzero(of_token == i), of_chunk[of_chunk == i]) for i, n in enumerate(names)]
    return [*rows, (ALL, np.arange(len(of_token), dtype=np.int64), of_chunk)]


def _renumbered(chunk: I64) -> tuple[I64, I64]:
    """Chunks as 0 … n−1 in order, and the tokens of each."""
    _, inverse, counts = np.unique(chunk, return_inverse=True, return_counts=True)
    return inverse.astype(np.int64), counts.astype(np.int64)


def _sums(values: F64, chunk: I64) -> F64:
    return np.bincount(chunk, weights=values).astype(np.float64)


def _kld_row(name: str, take: I64, strata: I64, measured: _Measured, i: int, draw: tuple[int, int]) -> KldRow:
    chunk, tokens = _renumbered(measured.chunk[take])
    bootstrap = Bootstrap(strata, *draw)
    kl = measured.kl[i, take]
    first, second = measured.nll[0, take], measured.nll[i + 1, take]
    median, p99 = bootstrap.quantiles(kl, chunk, (0.5, 0.99))
    return KldRow(
        cls=name,
        tokens=int(tokens.sum()),
        mean=bootstrap.ratio(_sums(kl, chunk), tokens),
        median=median,
        p99=p99,
        same_top=bootstrap.ratio(_sums(measured.same[i, take].astype(np.float64), chunk), tokens),
        ln_ppl_ratio=bootstrap.ratio(_sums(second - first, chunk), tokens),
        ppl_base=float(np.exp(first.mean())),
        ppl_candidate=float(np.exp(second.mean())),
    )
