"""Base and candidate through the canary: answers, cached or new, and the verdict kept as `canary.json`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from gemcut import machine
from gemcut.canary.judge import check_whole, judge
from gemcut.canary.prompts import prompts_hash
from gemcut.canary.settings import CanarySettings
from gemcut.checkpoint import Checkpoint
from gemcut.errors import CheckpointError
from gemcut.records.canary import Answers, CanaryResult, load_answers, save_answers, save_canary
from gemcut.store import fingerprint

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
CANARY = "canary.json"


def run_canary(
    base: Checkpoint,
    candidate: Checkpoint,
    settings: CanarySettings,
    out: Path | None = None,
    progress: Progress | None = None,
    *,
    base_answers: Path | None = None,
) -> CanaryResult:
    """Ask both the same prompts and judge. A failed verdict is a result, not an error: the caller decides.

    For many candidates of one base, call `base_of` once and `against` for each.

    Args:
        out: a folder; `canary.json` in it is replaced.
        base_answers: a file with the base's answers: read where it exists, else written.
    Raises:
        CheckpointError: the candidate has another tokenizer, template or vocabulary; the answers file is damaged, stale
            or another model's.
        MissingError: a model does not fit into memory.
    """
    check_pair(base, candidate)
    answers = base_of(base, settings, base_answers, progress)
    result = against(answers, candidate, settings, progress)
    if out is not None:
        save_canary(result, out / CANARY)
    return result


def base_of(
    base: Checkpoint, settings: CanarySettings, file: Path | None = None, progress: Progress | None = None
) -> Answers:
    """The base's answers: from `file` where it exists and is current, else made, and kept there."""
    if file is not None and file.exists():
        answers = load_answers(file)
        check_current(answers, base, settings, file)
        log.info("base answers from %s", file.name)
        return answers
    from gemcut.canary.generate import answer

    answers = answer(base, settings, progress=progress)
    if file is not None:
        save_answers(answers, file)
    return answers


def against(
    base_answers: Answers, candidate: Checkpoint, settings: CanarySettings, progress: Progress | None = None
) -> CanaryResult:
    """One candidate against the kept answers of its base."""
    from gemcut.canary.generate import answer

    return judge(base_answers, answer(candidate, settings, known=base_answers, progress=progress), settings)


def check_pair(base: Checkpoint, candidate: Checkpoint) -> None:
    """Refuse two models that cannot be asked the same token ids, before either is loaded.

    Raises:
        CheckpointError: another tokenizer, chat template or vocabulary.
    """
    from gemcut.stream.rendering import open_tokenizer

    ours, theirs = open_tokenizer(base.path), open_tokenizer(candidate.path)
    for what, a, b in (
        ("tokenizer", ours.hash, theirs.hash),
        ("chat template", ours.template_hash, theirs.template_hash),
        ("vocabulary", ours.vocab_size, theirs.vocab_size),
    ):
        if a != b:
            raise CheckpointError(
                f"base and candidate have another {what}: their answers cannot be compared",
                where=candidate.name,
                got=str(b)[:16],
                wanted=str(a)[:16],
                hint="is the candidate cut from this base?",
            )


def check_current(answers: Answers, base: Checkpoint, settings: CanarySettings, file: Path) -> None:
    """Refuse cached answers of another model, other prompts, settings or versions: a stale cache hides what broke.

    Raises:
        CheckpointError: see above; also answers that are not whole.
    """
    for what, got, wanted in (
        ("model", answers.fingerprint, base.fingerprint),
        ("prompts", answers.prompts_hash, prompts_hash()),
        ("settings", answers.settings_hash, fingerprint(settings.identity())),
        ("package versions", dict(answers.stack), machine.stack()),
    ):
        if got != wanted:
            raise CheckpointError(
                f"the base answers are stale: they come from other {what}"
                if what != "model"
                else "the base answers are another model's",
                where=file.name,
                got=_difference(got, wanted),
                wanted=_difference(wanted, got),
                hint="remove the file, or name another: it is made again in one run of the base",
            )
    check_whole(answers)


def _difference(a: object, b: object) -> str:
    """A hash in short, or the entries of a mapping that the other one says otherwise."""
    if isinstance(a, dict) and isinstance(b, dict):
        return ", ".join(f"{key} {a.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
    return str(a)[:16]
