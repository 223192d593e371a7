"""Greedy answers and teacher-forced losses of one checkpoint, whole in memory, through stock transformers.

Token ids are made here once, with exactly one BOS or with none, and passed on as they are: neither the tokenizer's call
nor `generate` may add one. Prompts of one condition run together, padded on the left; attention is eager and masked, so
that a prompt gets the same tokens as alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from transformers import GenerationConfig

from gemcut import machine
from gemcut.canary.prompts import PROMPTS, prompts_hash
from gemcut.canary.settings import CanarySettings
from gemcut.checkpoint import Checkpoint
from gemcut.errors import CheckpointError, MissingError
from gemcut.nvfp4.describe import weights_by_tensor
from gemcut.nvfp4.layout import is_nvfp4
from gemcut.records.canary import Answer, Answers, Said, Style, condition_name
from gemcut.store import fingerprint, read_json
from gemcut.stream.devices import use_free_cores
from gemcut.stream.model import stored_dtype
from gemcut.stream.rendering import Rendered, Tokenizer, open_tokenizer, render_question, render_text
from gemcut.stream.weights import DTYPE_NAMES, named_dtype
from gemcut.stream.whole import load_whole

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
Ids = list[int]

_FLOAT32_BYTES = 1 << 30  # weights up to this, as stored, compute in float32
_LOGITS_BYTES = 128 << 20  # float32 logits of one teacher-forced forward call
_WORK_BYTES = 512 << 20  # besides weights: logits, cache, the largest tensor while it is converted


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt under a condition: its ids [P], and those of its reference answer [R], empty where it has none."""

    prompt: str
    ids: Ids
    reference: Ids


@dataclass(frozen=True, slots=True)
class Condition:
    """A style with or without BOS, and what is asked in it."""

    style: Style
    bos: bool
    questions: tuple[Question, ...]


class Speaker:
    """One checkpoint in memory. Not safe for use from two threads."""

    def __init__(self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.end_ids = end_ids(checkpoint)
        self._model = model
        self._pad = self.end_ids[0]
        # what the checkpoint's own generation_config samples with must not reach a greedy answer
        model.generation_config = GenerationConfig()

    @classmethod
    def open(cls, checkpoint: Checkpoint, settings: CanarySettings) -> Speaker:
        """Load it. Weights up to 1 GiB compute in float32 unless a dtype is given.

        Raises:
            MissingError: it does not fit into memory, or a package is absent; see `load_whole`.
            UsageError: it is quantised in a way that does not load.
            CheckpointError: transformers cannot load it, or some of its tensors would be left random or unused.
        """
        dtype = compute_dtype(checkpoint, settings)
        need_memory(checkpoint, dtype, settings)
        device = torch.device(settings.device)
        if device.type == "cpu":
            use_free_cores()
        # eager, both: a prompt in a batch then gets the tokens that it gets alone
        model = load_whole(checkpoint, dtype=dtype, device=settings.device, attention="eager", experts="eager")
        return cls(checkpoint, model, dtype, device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[Ids]:
        """Greedy continuations [T ≤ max_new_tokens] of prompts [P], the ending token included where it came.

        The prompts run together, padded on the left and masked; positions count real tokens only.
        """
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=list(self.end_ids),
            pad_token_id=self._pad,
        )
        out: torch.Tensor = self._model.generate(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=greedy
        )
        return [_until_end(row, self.end_ids) for row in out[:, longest:].tolist()]

    @torch.no_grad()
    def nats(self, prompts: Sequence[Ids], answers: Sequence[Ids]) -> list[float | None]:
        """Mean NLL per token in nats of each answer [T] after its prompt [P], teacher-forced.

            nats_i = −1/T Σ_t ln p(answer[t] | prompt, answer[:t])

        float32 logits, float64 mean. None for an empty answer and for a loss that is not finite. Which texts share a
        forward call depends on their lengths alone, so that the same texts give the same bits.
        """
        found: list[float | None] = [None] * len(prompts)
        order = sorted((i for i in range(len(prompts)) if answers[i]), key=lambda i: len(prompts[i]) + len(answers[i]))
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        while order:
            # the longest first: the rest of the batch is padded to it
            longest = len(prompts[order[-1]]) + len(answers[order[-1]])
            rows = max(1, _LOGITS_BYTES // (4 * vocabulary * longest))
            batch, order = order[-rows:], order[:-rows]
            ids = torch.full((len(batch), longest), self._pad, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                text = [*prompts[i], *answers[i]]
                ids[row, : len(text)] = torch.tensor(text)
                mask[row, : len(text)] = 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, i in enumerate(batch):
                first, size = len(prompts[i]), len(answers[i])
                scored = logits[row, first - 1 : first + size - 1].float()
                target = ids[row, first : first + size]
                value = float(torch.nn.functional.cross_entropy(scored, target, reduction="none").double().mean())
                found[i] = value if abs(value) < float("inf") else None
        return found


def answer(
    checkpoint: Checkpoint,
    settings: CanarySettings,
    *,
    known: Answers | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Every answer of one checkpoint, and its losses on the known-good ones.

    Args:
        known: the base's answers; None: this is the base, and its own answers are the known-good ones. They can be kept
            and used for any number of candidates.
        progress: called with (done, total, label), once per condition and step.
    Raises:
        MissingError, CheckpointError: see `Speaker.open`; a tokenizer that is missing or has other ids than the model.
    """
    tokenizer = open_tokenizer(checkpoint.path)
    conditions, skipped = conditions_of(tokenizer)
    speaker = Speaker.open(checkpoint, settings)
    label = f"{'answers of' if known is None else 'answers and losses of'} {checkpoint.name}"
    said = []
    for i, condition in enumerate(conditions):
        if progress is not None:
            progress(i, len(conditions), label)
        answers = speaker.generate([q.ids for q in condition.questions], settings.max_new_tokens)
        good = answers if known is None else [list(a.ids) for a in known.said[i].answers]
        said.append(_said(condition, answers, good, speaker, tokenizer))
        log.debug("%s: %s", checkpoint.name, condition_name(condition.style, condition.bos))
    if progress is not None:
        progress(len(conditions), len(conditions), label)
    return Answers(
        fingerprint=checkpoint.fingerprint,
        model=checkpoint.name,
        tokenizer_hash=tokenizer.hash,
        template_hash=tokenizer.template_hash,
        end_ids=speaker.end_ids,
        prompts_hash=prompts_hash(),
        settings_hash=fingerprint(settings.identity()),
        dtype=DTYPE_NAMES[speaker.dtype],
        stack=machine.stack(),
        markers=markers_of(tokenizer),
        skipped=skipped,
        said=tuple(said),
    )


def conditions_of(tokenizer: Tokenizer) -> tuple[list[Condition], dict[str, str]]:
    """Every condition that this tokenizer and template can be asked under, and why the others were left out."""
    conditions, skipped = [], {}
    for style in get_args(Style):
        reason = _why_not(tokenizer, style)
        for bos in (True, False):
            why = reason or ("the tokenizer has no BOS" if bos and tokenizer.bos_id is None else None)
            if why is not None:
                skipped[condition_name(style, bos)] = why
                continue
            questions = tuple(_question(tokenizer, prompt.id, style, bos=bos) for prompt in PROMPTS)
            conditions.append(Condition(style, bos, questions))
    return conditions, skipped


def markers_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Special tokens as they are spelled, sorted."""
    added = tokenizer.inner.added_tokens_decoder
    return tuple(sorted(str(token.content) for token in added.values() if token.special and token.content))


def end_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Ids that end an answer: generation_config.json's, else config.json's.

    Raises:
        CheckpointError: neither names one.
    """
    generation = checkpoint.path / "generation_config.json"
    said = read_json(generation, "generation_config.json") if generation.is_file() else {}
    for source in (said, checkpoint.config, checkpoint.text_config):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            return tuple(sorted(cast("list[int]", ids)))
    raise CheckpointError(
        "the checkpoint names no token that ends an answer", where=checkpoint.name, wanted="eos_token_id"
    )


def compute_dtype(checkpoint: Checkpoint, settings: CanarySettings) -> torch.dtype:
    """The dtype that was asked for; float32 for small weights, else as stored.

    Quantised weights count as two bytes each, so that a candidate computes in the dtype of its base.
    """
    if settings.dtype is not None:
        return named_dtype(settings.dtype)
    size = 2 * sum(weights_by_tensor(checkpoint).values()) if is_nvfp4(checkpoint.config) else checkpoint.size_bytes
    return torch.float32 if size <= _FLOAT32_BYTES else stored_dtype(checkpoint)


def need_memory(checkpoint: Checkpoint, dtype: torch.dtype, settings: CanarySettings) -> None:
    """Refuse before loading what does not fit.

    Raises:
        MissingError: weights in the compute dtype and 0.5 GiB to work in exceed what is free or allowed.
    """
    needed = sum(weights_by_tensor(checkpoint).values()) * dtype.itemsize + _WORK_BYTES
    free = machine.available_bytes()
    device = torch.device(settings.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise MissingError("there is no such device", got=settings.device, hint="gemcut doctor lists the devices")
        free = int(torch.cuda.mem_get_info(device)[0])
    budget = free if settings.max_memory is None else min(free, settings.max_memory)
    if needed > budget:
        raise MissingError(
            "the canary needs the whole model in memory",
            where=checkpoint.name,
            got=f"{budget / 2**30:.2f} GiB",
            wanted=f"{needed / 2**30:.2f} GiB in {DTYPE_NAMES[dtype]}",
            hint="use a machine with more memory; asking a served model by its URL is not there yet",
        )


def _why_not(tokenizer: Tokenizer, style: Style) -> str | None:
    if style == "raw":
        return None
    if tokenizer.template is None:
        return "the checkpoint has no chat template"
    if style == "thinking":
        question = PROMPTS[0].chat
        on, off = (render_question(tokenizer, question, "canary", thinking=t).ids for t in (True, False))
        if on == off:
            return "the chat template knows no enable_thinking"
    return None


def _question(tokenizer: Tokenizer, prompt: str, style: Style, *, bos: bool) -> Question:
    """Ids of a prompt with exactly one BOS or none. A reference is scored where it can follow directly."""
    found = next(p for p in PROMPTS if p.id == prompt)
    where = f"canary prompt {prompt}"
    if style == "raw":
        rendered: Rendered = render_text(tokenizer, found.raw, where)
    else:
        rendered = render_question(tokenizer, found.chat, where, thinking=style == "thinking")
    ids = rendered.ids if bos or tokenizer.bos_id is None else rendered.ids[1:]
    reference: Ids = []
    if found.reference is not None and style != "thinking":
        # a thinking model owes its thoughts first: an answer without them would measure the template, not the cut
        text = found.reference if style == "chat" or not found.reference.isascii() else " " + found.reference
        with_bos = render_text(tokenizer, text, where).ids
        reference = with_bos if tokenizer.bos_id is None else with_bos[1:]
    return Question(prompt, ids, reference)


def _said(
    condition: Condition, answers: Sequence[Ids], good: Sequence[Ids], speaker: Speaker, tokenizer: Tokenizer
) -> Said:
    prompts = [q.ids for q in condition.questions]
    known = speaker.nats(prompts, good)
    reference = speaker.nats(prompts, [q.reference for q in condition.questions])
    rows = []
    for i, question in enumerate(condition.questions):
        ids = answers[i]
        ended = bool(ids) and ids[-1] in speaker.end_ids
        text = tokenizer.inner.decode(
            ids[:-1] if ended else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        rows.append(Answer(question.prompt, tuple(ids), str(text), ended, known[i], reference[i]))
    return Said(condition.style, condition.bos, tuple(rows))


def _until_end(ids: Ids, ends: Sequence[int]) -> Ids:
    """Up to and with the first ending token: what follows is padding of a row that others outlived."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids
