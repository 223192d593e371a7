"""KL divergence of candidates from a base, and perplexity: streamed, with no logits file.

Every checkpoint goes through its layers once, one layer in memory; its last hidden states are kept (10 KB a token for a
26B model, where logits would be 1 MB). The head then runs for the base and all candidates together, a few positions at
a time, so that several candidates share the base's pass and nothing of vocabulary size is ever stored. A GGUF file, as
base or as candidate, is run by llama.cpp in step with that: its own logits, from the same token ids.

Scored are all next-token positions of every item: an item of T tokens (BOS first) has T − 1. Every scored token counts
once; item weights belong to calibration and are not used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import QualityError, UsageError
from gemcut.evaluate.chunks import KldChunks
from gemcut.evaluate.interval import RESAMPLES
from gemcut.evaluate.kld_sources import (
    Compared,
    Heads,
    Lockstep,
    Source,
    check_ids,
    fingerprint_of,
    name_of,
    stream_states,
    vocabulary_of,
)
from gemcut.evaluate.kld_tile import compare
from gemcut.evaluate.rows import ALL, Measured, chunks_of, classes_of, kld_row, rows_of, sums
from gemcut.ggml.model import Model, run_bytes
from gemcut.gguf_file.header import GgufFile
from gemcut.stream.corpus import Corpus
from gemcut.stream.hidden import BATCH_TOKENS, Progress, Slabs, rows_per_tile, scored_positions
from gemcut.types import KldResult

# Of the free memory, for the mapped files that run at the same time: what does not stay in memory is read again for
# every batch of tokens.
_MAPPED_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class KldSettings:
    """How the models run, and what the intervals are drawn from.

    device: "cpu", "cuda", "cuda:1".
    dtype: of the layers: "float32", "bfloat16", …; None or "auto": as the base is stored, but float32 beside a GGUF,
        whose arithmetic is nearer to that: the noise floor is a tenth. Heads compute in float32.
    seed, resamples: of the bootstrap.
    chunk_tokens: what is resampled is a whole item (None), or runs of at most this many scored tokens of one.
    batch_tokens: padded positions that go through a layer together.
    memory_bytes: hidden states beyond this lie in a nameless file in `scratch`; None: a quarter of what is free.
    threads: of llama.cpp, for GGUF files; None: the cores that are free.
    context_tokens: predictions at this many first positions of an item are not scored: they only give context.
    tokenizer: the folder whose tokenizer made the ids, where no compared model is a folder.
    """

    device: str = "cpu"
    dtype: str | None = None
    seed: int = 0
    resamples: int = RESAMPLES
    chunk_tokens: int | None = None
    batch_tokens: int = BATCH_TOKENS
    memory_bytes: int | None = None
    scratch: Path | None = None
    threads: int | None = None
    context_tokens: int = 0
    tokenizer: Path | None = None


DEFAULTS = KldSettings()


def kld(
    base: Compared,
    candidates: Sequence[Compared],
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
        UsageError: no candidate; settings that do not fit the corpus.
        CheckpointError: another tokenizer or vocabulary than the base or the corpus; a GGUF that does not load.
        QualityError: a hidden state or a logit is not finite.
    """
    measured = _measure(base, candidates, corpus, settings, progress)
    rows, fingerprint = rows_of(corpus.classes, measured), fingerprint_of(base)
    draw = (settings.seed, settings.resamples)
    return [
        KldResult(
            base_fingerprint=fingerprint,
            candidate_fingerprint=fingerprint_of(candidate),
            candidate=name_of(candidate),
            corpus_hash=corpus.hash,
            template_hash=corpus.template_hash,
            dtype=measured.dtype,
            chunks=int(measured.chunk[-1]) + 1,
            seed=settings.seed,
            rows=tuple(kld_row(name, take, strata, measured, i, draw) for name, take, strata in rows),
        )
        for i, candidate in enumerate(candidates)
    ]


def kld_chunks(
    base: Compared,
    candidates: Sequence[Compared],
    corpus: Corpus,
    settings: KldSettings = DEFAULTS,
    *,
    progress: Progress | None = None,
) -> KldChunks:
    """KL of every chunk and candidate, for paired comparisons. Positions, arguments, errors as in `kld`."""
    measured = _measure(base, candidates, corpus, settings, progress)
    _, _, strata = rows_of(corpus.classes, measured)[-1]
    tokens = np.bincount(measured.chunk).astype(np.int64)
    kl = np.stack([sums(one, measured.chunk) for one in measured.kl])
    return KldChunks(strata, tokens, kl, settings.seed, settings.resamples)


# ---------------------------------------------------------------- running the models


def _measure(
    base: Compared,
    candidates: Sequence[Compared],
    corpus: Corpus,
    settings: KldSettings,
    progress: Progress | None,
) -> Measured:
    if not candidates:
        raise UsageError("no candidate to compare with the base", where=name_of(base))
    models = [base, *candidates]
    _check(models, corpus, settings)
    memory = settings.memory_bytes
    slabs = Slabs(int(psutil.virtual_memory().available) // 4 if memory is None else memory, settings.scratch)
    roles = ["base", *(f"candidate {i}/{len(models) - 1}" for i in range(1, len(models)))]
    streamed = [i for i, model in enumerate(models) if isinstance(model, Checkpoint)]
    states, dtype = stream_states(
        [(roles[i], model) for i, model in enumerate(models) if isinstance(model, Checkpoint)],
        corpus,
        slabs,
        device=settings.device,
        dtype=_layer_dtype(models, settings.dtype),
        batch_tokens=settings.batch_tokens,
        progress=progress,
    )
    measured = _blank(models, corpus, settings, (dtype or "") if streamed else "gguf")
    groups = _groups(models)
    for n, group in enumerate(groups):
        label = "head, tokens" if len(groups) == 1 else f"head {n + 1}/{len(groups)}, tokens"
        _run_group(models, dict(zip(streamed, states, strict=True)), group, corpus, settings, measured, progress, label)
    if settings.context_tokens == 0:
        return measured
    at = np.concatenate([np.arange(len(row.ids) - 1) for row in corpus.items])
    return measured.only(at >= settings.context_tokens)


def _layer_dtype(models: Sequence[Compared], asked: str | None) -> str | None:
    if asked not in (None, "auto"):
        return asked
    return "float32" if any(isinstance(model, GgufFile) for model in models) else None


def _check(models: Sequence[Compared], corpus: Corpus, settings: KldSettings) -> None:
    if ALL in corpus.classes:
        raise UsageError(f"a class may not be named {ALL!r}: that row pools the classes", where="corpus")
    if settings.chunk_tokens is not None and settings.chunk_tokens < 1:
        raise UsageError("chunk_tokens is too small", got=settings.chunk_tokens, wanted="at least 1")
    longest = max(len(row.ids) for row in corpus.items)
    if not 0 <= settings.context_tokens < longest - 1:
        got, wanted = settings.context_tokens, f"0 to {longest - 2}, so that something is scored"
        raise UsageError("context_tokens does not fit the corpus", got=got, wanted=wanted)
    folder = next((model.path for model in models if isinstance(model, Checkpoint)), settings.tokenizer)
    for model in models:
        check_ids(model, models[0], corpus, folder)


def _blank(models: Sequence[Compared], corpus: Corpus, settings: KldSettings, dtype: str) -> Measured:
    chunk = chunks_of(corpus, settings.chunk_tokens)
    m, t = len(models), len(chunk)
    kl, same = np.empty((m - 1, t)), np.empty((m - 1, t), dtype=np.bool_)
    return Measured(dtype, chunk, classes_of(corpus), np.empty((m, t)), kl, same)


def _groups(models: Sequence[Compared]) -> list[list[int]]:
    """Candidates that run beside the base at a time, so that the mapped files of a group fit the free memory.

    A base that is a GGUF runs again in every group; one that is a checkpoint was streamed once for all.
    """
    room = int(_MAPPED_SHARE * psutil.virtual_memory().available)
    beside = run_bytes(vocabulary_of(models[0]))
    sizes = [model.size_bytes + beside if isinstance(model, GgufFile) else 0 for model in models]
    groups: list[list[int]] = [[]]
    used = sizes[0]
    for i in range(1, len(models)):
        if groups[-1] and sizes[i] and used + sizes[i] > room:
            groups.append([])
            used = sizes[0]
        groups[-1].append(i)
        used += sizes[i]
    return groups


def _run_group(
    models: Sequence[Compared],
    states: dict[int, torch.Tensor],
    group: Sequence[int],
    corpus: Corpus,
    settings: KldSettings,
    measured: Measured,
    progress: Progress | None,
    label: str,
) -> None:
    """Logits of the base and some candidates, a tile of positions at a time, all together; figures into `measured`."""
    target = torch.from_numpy(np.concatenate([row.ids[1:] for row in corpus.items]))
    step = rows_per_tile(vocabulary_of(models[0]))
    members = [0, *group]
    rows = [i - 1 for i in group]
    with contextlib.ExitStack() as stack:
        heads = Heads(stack, settings.device)
        sources: list[Source] = []
        for i in members:
            model = models[i]
            if isinstance(model, Checkpoint):
                sources.append(heads.open(model, states[i]))
            else:
                longest = max(len(row.ids) for row in corpus.items)
                runner = Model(model.path, context=longest, threads=settings.threads)
                sources.append(Lockstep(stack.enter_context(runner), corpus.items))
        for start in range(0, len(target), step):
            stop = min(start + step, len(target))
            logits: list[torch.Tensor] = []
            for i, source in zip(members, sources, strict=True):
                out = source.logits(start, stop)
                if not bool(torch.isfinite(out).all()):
                    _refuse_infinite(models[i], corpus, start, out)
                logits.append(out.to(logits[0].device) if logits else out)
            done = compare(logits, target[start:stop].to(logits[0].device))
            measured.nll[members, start:stop] = done.nll.cpu().numpy()
            measured.kl[rows, start:stop] = done.kl.cpu().numpy()
            measured.same[rows, start:stop] = done.same.cpu().numpy()
            if progress is not None:
                progress(stop, len(target), label)


def _refuse_infinite(model: Compared, corpus: Corpus, start: int, logits: torch.Tensor) -> None:
    at = start + int(torch.nonzero(~torch.isfinite(logits).all(-1))[0])
    begins = scored_positions(corpus.items)
    item = int(np.searchsorted(begins, at, side="right")) - 1
    raise QualityError(
        "a logit is not finite",
        where=f"{name_of(model)}, item {corpus.items[item].id!r}, token {at - int(begins[item])}",
        hint="look for the broken tensor with gemcut diff",
    )
