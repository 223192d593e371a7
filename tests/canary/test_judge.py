"""The verdict on answers made by hand: what counts, what does not, and under which condition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemcut.canary import CanarySettings, Limits, judge, refuse_failed, worst
from gemcut.canary.judge import nll_ratio, wilson
from gemcut.canary.prompts import PROMPTS, prompts_hash
from gemcut.errors import CheckpointError, QualityError, UsageError
from gemcut.records.canary import Answer, Answers, Said, Style

SETTINGS = CanarySettings()
CONDITIONS: tuple[tuple[Style, bool], ...] = (("raw", True), ("raw", False), ("chat", True), ("chat", False))
LOOP = tuple([9] * 48)


def sound(prompt: str, nats: float = 0.5) -> Answer:
    return Answer(prompt, (*range(100, 140), 1), f"a sound answer to {prompt}", True, nats, None)


def broken(prompt: str, nats: float = 0.5) -> Answer:
    return Answer(prompt, LOOP, "ha " * 48, False, nats, None)


def answers(bad: dict[tuple[Style, bool], int] | None = None, nats: float = 0.5, name: str = "base") -> Answers:
    """Answers of a model; `bad`: how many of a condition's first answers loop."""
    said = []
    for style, bos in CONDITIONS:
        k = (bad or {}).get((style, bos), 0)
        rows = tuple(broken(p.id, nats) if i < k else sound(p.id, nats) for i, p in enumerate(PROMPTS))
        said.append(Said(style, bos, rows))
    return Answers(
        fingerprint="a" * 64,
        model=name,
        tokenizer_hash="t",
        template_hash="j",
        end_ids=(1, 6),
        prompts_hash=prompts_hash(),
        settings_hash="b" * 64,
        dtype="float32",
        stack={"torch": "1"},
        markers=("<eos>",),
        skipped=dict.fromkeys(("thinking, BOS", "thinking, no BOS"), "no thinking"),
        said=tuple(said),
    )


def test_a_model_against_itself_passes_with_ratio_one() -> None:
    result = judge(answers(), answers(), SETTINGS)
    assert result.passed
    for c in result.conditions:
        assert c.nll_ratio is not None
        assert (c.nll_ratio.value, c.nll_ratio.low, c.nll_ratio.high) == (1.0, 1.0, 1.0)
        assert c.identical == c.prompts == len(PROMPTS)
        assert c.median_divergence is None
    assert worst(result) == []


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_collapse_under_one_condition_fails(condition: tuple[Style, bool]) -> None:
    result = judge(answers(), answers({condition: 12}, name="cut"), SETTINGS)
    assert not result.passed
    assert [(c.style, c.bos) for c in result.conditions if c.reasons] == [condition]
    assert "12 of 24 answers newly broken" in next(c for c in result.conditions if c.reasons).reasons[0]
    assert {(a.style, a.bos) for a in worst(result)} == {condition}
    assert worst(result)[0].new == ("repetition",)


def test_what_the_base_shows_too_does_not_count() -> None:
    result = judge(answers({("raw", True): 10}), answers({("raw", True): 10}), SETTINGS)
    assert result.passed
    assert result.conditions[0].base_broken.value == pytest.approx(10 / 24)
    assert result.conditions[0].newly_broken.value == 0


def test_mended_answers_are_set_off() -> None:
    base = answers({("raw", True): 10})
    first = base.said[0]
    turned = replace(first, answers=tuple(reversed([replace(a, prompt=p.id) for a, p in zip(first.answers, reversed(PROMPTS), strict=True)])))  # noqa: E501  # fmt: skip
    result = judge(base, replace(base, said=(turned, *base.said[1:])), SETTINGS)
    assert result.conditions[0].newly_broken.value == pytest.approx(10 / 24)
    assert result.conditions[0].mended == 10
    assert result.passed


def test_a_few_broken_answers_pass_and_the_limit_is_inclusive() -> None:
    limits = replace(SETTINGS, limits=Limits(newly_broken=0.25))
    assert judge(answers(), answers({("chat", False): 6}), limits).passed
    assert not judge(answers(), answers({("chat", False): 7}), limits).passed


def test_a_broken_base_is_said_and_not_blamed_on_the_candidate() -> None:
    everywhere = dict.fromkeys(CONDITIONS, 20)
    result = judge(answers(everywhere), answers(everywhere), SETTINGS)
    assert not result.base_sound
    assert not result.passed
    assert not any(c.reasons for c in result.conditions)
    one = judge(answers({("raw", False): 20}), answers({("raw", False): 24}), SETTINGS)
    assert one.base_sound
    assert one.passed
    assert not one.conditions[1].base_sound


def test_a_failure_names_who_failed_and_where() -> None:
    refuse_failed(judge(answers(), answers(), SETTINGS))
    everywhere = dict.fromkeys(CONDITIONS, 20)
    with pytest.raises(QualityError, match="the base itself does not talk") as refused:
        refuse_failed(judge(answers(everywhere), answers(everywhere, name="cut"), SETTINGS))
    assert "cut" not in str(refused.value.where)
    with pytest.raises(QualityError, match="under 1 of 4 conditions") as refused:
        refuse_failed(judge(answers(), answers({("chat", False): 12}, name="cut"), SETTINGS), hint="heal it")
    assert refused.value.where == "cut: chat, no BOS"
    assert "12 of 24" in str(refused.value)
    assert "heal it" in str(refused.value)


def test_the_ratio_fails_where_the_answers_look_well() -> None:
    result = judge(answers(nats=0.4), answers(nats=1.2), SETTINGS)
    assert not result.passed
    assert "3.00 times" in result.conditions[0].reasons[0]


def test_a_loss_that_is_not_finite_fails() -> None:
    candidate = answers()
    rows = candidate.said[2].answers
    said = replace(candidate.said[2], answers=(replace(rows[0], known_nats=None), *rows[1:]))
    result = judge(answers(), replace(candidate, said=(*candidate.said[:2], said, candidate.said[3])), SETTINGS)
    assert not result.passed
    assert result.conditions[2].reasons == ("the loss of 1 answers is not finite",)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_hash": "other"},
        {"template_hash": "other"},
        {"end_ids": (1,)},
        {"settings_hash": "c" * 64},
        {"dtype": "bfloat16"},
        {"stack": {"torch": "2"}},
        {"prompts_hash": "d" * 64},
        {"said": answers().said[:3]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_answers_that_were_made_otherwise_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError):
        judge(answers(), replace(answers(), **change), SETTINGS)  # type: ignore[arg-type]


def test_a_missing_answer_is_refused() -> None:
    whole = answers()
    short = replace(whole.said[1], answers=whole.said[1].answers[:-1])
    cut = replace(whole, said=(whole.said[0], short, *whole.said[2:]))
    with pytest.raises(CheckpointError, match="missing"):
        judge(cut, cut, SETTINGS)


def test_wilson_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for k, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = wilson(k, n)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(n=st.integers(1, 60), data=st.data())
def test_wilson_holds_its_share(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    found = wilson(k, n)
    assert 0 <= found.low <= k / n <= found.high <= 1
    assert found.low < found.high


def test_nll_ratio_weighs_tokens() -> None:
    found = nll_ratio([2.0, 1.0], [1.0, 1.0], [30, 10])
    assert found is not None
    assert found.value == pytest.approx(70 / 40)
    assert found.low < found.value < found.high
    assert nll_ratio([], [], []) is None
    assert nll_ratio([1.0], [0.0], [5]) is None


@pytest.mark.parametrize("bad", [{"newly_broken": 1.5}, {"nll_ratio": 0.5}, {"loop_repeats": 1}, {"distinct4": -0.1}])
def test_limits_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Limits(**bad)  # type: ignore[arg-type]
