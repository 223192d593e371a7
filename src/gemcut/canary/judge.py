"""The verdict: a candidate's answers held against its base's. Pure; the same two sets give the same record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import get_args

import numpy as np

from gemcut.canary.detect import divergence, signs
from gemcut.canary.prompts import PROMPTS, prompts_hash
from gemcut.canary.settings import CanarySettings, Limits
from gemcut.errors import CheckpointError, QualityError
from gemcut.records.canary import (
    Answer,
    Answers,
    AnswerVerdict,
    CanaryResult,
    ConditionVerdict,
    Said,
    Style,
    condition_name,
)
from gemcut.types import Estimate

_Z = 1.959963984540054  # of a two-sided 95 % interval


def wilson(k: int, n: int) -> Estimate:
    """Share k/n with its 95 % score interval, which stays inside 0 … 1 and is not empty at 0 of n.

        centre = (k + z²/2) / (n + z²),   half = z/(n + z²)·√(k(n − k)/n + z²/4)

    Source: Wilson, JASA 22 (1927), 209–212.
    """
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    z2 = _Z * _Z
    centre = (k + z2 / 2) / (n + z2)
    half = _Z / (n + z2) * math.sqrt(k * (n - k) / n + z2 / 4)
    value = k / n
    return Estimate(value, min(max(0.0, centre - half), value), max(min(1.0, centre + half), value), n)


def nll_ratio(candidate: Sequence[float], base: Sequence[float], tokens: Sequence[int]) -> Estimate | None:
    """NLL of the same texts under the candidate by that under the base, with a 95 % interval over texts.

        r = Σ_i t_i·c_i / Σ_i t_i·b_i,   half = z·√(n/(n−1)·Σ_i t_i²(c_i − r·b_i)²) / Σ_i t_i·b_i

    Args:
        candidate, base: [N] mean nats per token of each text; tokens: [N] its length t_i.
    Returns:
        float64 estimate with n = N; exactly 1 with no width where both are equal. None without a text, or where the
        base's texts cost nothing.
    Source:
        Cochran, Sampling Techniques (1977), §6.4: the linearised variance of a ratio of totals.
    """
    t = np.asarray(tokens, dtype=np.float64)
    c, b = np.asarray(candidate, dtype=np.float64) * t, np.asarray(base, dtype=np.float64) * t
    n, whole = len(t), float(b.sum())
    if n == 0 or not whole > 0:
        return None
    ratio = float(c.sum()) / whole
    half = 0.0 if n < 2 else _Z * math.sqrt(n / (n - 1) * float(((c - ratio * b) ** 2).sum())) / whole
    return Estimate(ratio, max(0.0, ratio - half), ratio + half, n)


def check_comparable(base: Answers, candidate: Answers) -> None:
    """Refuse two sets of answers that were not made alike.

    Raises:
        CheckpointError: another tokenizer, template, ending, prompt, setting or stack; conditions or prompts missing.
    """
    for what in ("tokenizer_hash", "template_hash", "end_ids", "prompts_hash", "settings_hash", "dtype", "stack"):
        ours, theirs = getattr(base, what), getattr(candidate, what)
        if ours != theirs:
            raise CheckpointError(
                f"base and candidate were not asked alike: {what.removesuffix('_hash').replace('_', ' ')} differs",
                where=candidate.model,
                got=_short(theirs),
                wanted=_short(ours),
            )
    check_whole(base)
    check_whole(candidate)
    if [(s.style, s.bos) for s in base.said] != [(s.style, s.bos) for s in candidate.said]:
        raise CheckpointError("base and candidate answered under different conditions", where=candidate.model)


def check_whole(answers: Answers) -> None:
    """Refuse answers of other prompts than today's, or of a part of them.

    Raises:
        CheckpointError: conditions or prompts are missing, in another order, or of another hash.
    """
    every = [condition_name(style, bos) for style in get_args(Style) for bos in (True, False)]
    asked = [condition_name(said.style, said.bos) for said in answers.said]
    if not asked or asked != [name for name in every if name not in answers.skipped]:
        raise CheckpointError(
            "conditions are missing or out of order",
            where=answers.model,
            got="; ".join(asked) or "none",
            wanted="; ".join(name for name in every if name not in answers.skipped),
        )
    wanted = [prompt.id for prompt in PROMPTS]
    if answers.prompts_hash != prompts_hash():
        raise CheckpointError(
            "the answers are to other prompts", where=answers.model, got=answers.prompts_hash, wanted=prompts_hash()
        )
    for said in answers.said:
        found = [answer.prompt for answer in said.answers]
        if found != wanted:
            raise CheckpointError(
                "answers are missing or out of order",
                where=f"{answers.model}: {condition_name(said.style, said.bos)}",
                got=f"{len(found)} answers",
                wanted=f"one to each of {len(wanted)} prompts",
            )


def judge(base: Answers, candidate: Answers, settings: CanarySettings) -> CanaryResult:
    """Hold a candidate's answers against its base's. Pure: no model, no clock.

    A condition fails when more of its prompts are newly broken (net of mended ones) than `newly_broken` allows and its
    base is sound there, when the NLL ratio of known-good or of reference answers exceeds `nll_ratio`, or when a loss is
    not finite. The candidate fails when one condition does: a collapse may need a missing BOS to show.

    Raises:
        CheckpointError: see `check_comparable`.
    """
    check_comparable(base, candidate)
    conditions, answers = [], []
    for ours, theirs in zip(base.said, candidate.said, strict=True):
        verdicts = [_answer(ours, a, b, base.markers, settings.limits) for a, b in _pairs(ours, theirs)]
        conditions.append(_condition(ours, theirs, verdicts, settings.limits))
        answers += verdicts
    sound = any(c.base_sound for c in conditions)
    return CanaryResult(
        base_fingerprint=base.fingerprint,
        candidate_fingerprint=candidate.fingerprint,
        base=base.model,
        candidate=candidate.model,
        prompts_hash=base.prompts_hash,
        settings_hash=base.settings_hash,
        settings=settings.record(),
        dtype=base.dtype,
        stack=dict(sorted(base.stack.items())),  # a cached base gives the same bytes as a fresh one
        passed=sound and not any(c.reasons for c in conditions),
        base_sound=sound,
        skipped=dict(sorted(base.skipped.items())),
        conditions=tuple(conditions),
        answers=tuple(answers),
    )


def worst(result: CanaryResult, n: int = 3) -> list[AnswerVerdict]:
    """The answers that suffered most: most new findings, then the highest loss on the known-good answer."""

    def order(a: AnswerVerdict) -> tuple[int, float]:
        lost = math.inf if a.candidate_nats is None else a.candidate_nats - (a.base_nats or 0.0)
        return (-len(a.new), -lost)

    return sorted((a for a in result.answers if a.divergence is not None), key=order)[:n]


def refuse_failed(result: CanaryResult, *, hint: str = "cut less or heal; --json has every answer") -> None:
    """Raise where the verdict is a failure: the base's own, or the candidate's.

    Args:
        hint: what to do about a candidate that fails.
    Raises:
        QualityError: with the first condition that failed and its reasons.
    """
    if result.passed:
        return
    if not result.base_sound:
        raise QualityError(
            "the base itself does not talk: its candidates cannot be judged",
            where=result.base,
            hint="is this a base for chat, whole, with its own tokenizer and template?",
        )
    failed = [c for c in result.conditions if c.reasons]
    raise QualityError(
        f"the candidate fails the canary under {len(failed)} of {len(result.conditions)} conditions",
        where=f"{result.candidate}: {condition_name(failed[0].style, failed[0].bos)}",
        got="; ".join(failed[0].reasons),
        hint=hint,
    )


def _pairs(ours: Said, theirs: Said) -> list[tuple[Answer, Answer]]:
    return list(zip(ours.answers, theirs.answers, strict=True))


def _answer(said: Said, base: Answer, candidate: Answer, markers: Sequence[str], limits: Limits) -> AnswerVerdict:
    prompt = next(prompt for prompt in PROMPTS if prompt.id == base.prompt).text(said.style)
    a, b = (signs(answer, said.style, prompt, markers, limits, yardstick=base) for answer in (base, candidate))
    return AnswerVerdict(
        style=said.style,
        bos=said.bos,
        prompt=base.prompt,
        base_text=base.text,
        candidate_text=candidate.text,
        base=a,
        candidate=b,
        new=tuple(finding for finding in b.findings if finding not in a.findings),
        divergence=divergence(base.ids, candidate.ids),
        base_nats=base.known_nats,
        candidate_nats=candidate.known_nats,
    )


def _condition(ours: Said, theirs: Said, verdicts: Sequence[AnswerVerdict], limits: Limits) -> ConditionVerdict:
    n = len(verdicts)
    base_broken = sum(bool(v.base.findings) for v in verdicts)
    newly = sum(bool(v.new) for v in verdicts)
    mended = sum(bool(v.base.findings) and not v.candidate.findings for v in verdicts)
    splits = [v.divergence for v in verdicts if v.divergence is not None]
    pairs = _pairs(ours, theirs)
    known = [(b.known_nats, a.known_nats, len(a.ids)) for a, b in pairs]
    reference = [(b.reference_nats, a.reference_nats, 1) for a, b in pairs]
    ratio, reference_ratio = _ratio(known), _ratio(reference)
    base_sound = base_broken <= limits.base_broken * n
    reasons = []
    if base_sound and newly - mended > limits.newly_broken * n:
        but = f", {mended} mended" if mended else ""
        reasons.append(f"{newly} of {n} answers newly broken{but}; at most {limits.newly_broken * n:g} may be")
    for what, value in (("known-good", ratio), ("reference", reference_ratio)):
        if value is not None and value.value > limits.nll_ratio:
            reasons.append(f"NLL of {what} answers is {value.value:.2f} times the base's; at most {limits.nll_ratio:g}")
    lost = sum(c is None and b is not None for c, b, _ in known + reference)
    if lost:
        reasons.append(f"the loss of {lost} answers is not finite")
    return ConditionVerdict(
        style=ours.style,
        bos=ours.bos,
        prompts=n,
        base_broken=wilson(base_broken, n),
        candidate_broken=wilson(sum(bool(v.candidate.findings) for v in verdicts), n),
        newly_broken=wilson(newly, n),
        mended=mended,
        identical=n - len(splits),
        median_divergence=float(median(splits)) if splits else None,
        ended_base=sum(v.base.ended for v in verdicts),
        ended_candidate=sum(v.candidate.ended for v in verdicts),
        nll_ratio=ratio,
        reference_ratio=reference_ratio,
        base_sound=base_sound,
        reasons=tuple(reasons),
    )


def _ratio(rows: Sequence[tuple[float | None, float | None, int]]) -> Estimate | None:
    both = [(c, b, t) for c, b, t in rows if c is not None and b is not None]
    return nll_ratio([c for c, _, _ in both], [b for _, b, _ in both], [t for _, _, t in both])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"
