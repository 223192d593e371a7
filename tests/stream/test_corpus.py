"""Corpus files become token ids: one BOS, nothing lost unsaid, every bad line named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import full_config, make_tokenizer

from gemcut.errors import CheckpointError, UsageError
from gemcut.stream import corpus_file
from gemcut.stream.corpus import Corpus, load_corpus
from gemcut.stream.rendering import open_tokenizer, tokenizer_hash

BOS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as far as the corpus needs it: tokenizer, template, config."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    (path / "config.json").write_text(json.dumps(full_config("moe")))
    return path


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "other"))


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(json.dumps(i, ensure_ascii=False).encode() + b"\n" for i in items))
    return path


def text(name: str, body: str = "hello world", cls: str = "prose", **more: Any) -> dict[str, Any]:
    return {"id": name, "class": cls, "text": body, **more}


def chat(name: str, *turns: dict[str, str], cls: str = "math") -> dict[str, Any]:
    return {"id": name, "class": cls, "messages": list(turns)}


ASK = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4.", "reasoning_content": "two and two"}


def decoded(folder: Path, corpus: Corpus, index: int = 0) -> str:
    return str(open_tokenizer(folder).inner.decode(corpus.items[index].ids, skip_special_tokens=False))


# ---------------------------------------------------------------- what comes out


def test_messages_hold_prompt_reasoning_and_answer_with_one_bos(folder: Path, tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK, ANSWER), text("b")]), folder)
    assert decoded(folder, corpus) == (
        "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\n2+2?<turn|>\n"
        "<|turn>model\n<|channel>thought\ntwo and two<channel|>It is 4.<turn|>\n"
    )
    assert decoded(folder, corpus, 1) == "<bos>hello world"
    for row in corpus.items:
        assert row.ids.dtype == np.int64
        assert row.ids[0] == BOS
        assert np.count_nonzero(row.ids == BOS) == 1
        assert not row.ids.flags.writeable
    assert corpus.bos_policy == "chat: template; text: added"
    assert corpus.classes == ("math", "prose")
    assert (corpus.reasoning_items, corpus.spliced_items, corpus.truncated_items) == (1, 0, 0)
    assert corpus.tokens == sum(len(r.ids) for r in corpus.items) == corpus.scored_tokens + 2


def test_raw_text_has_no_template_and_one_bos(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [chat("a", ASK, ANSWER), text("b")])
    corpus = load_corpus(path, folder, raw=True)
    assert decoded(folder, corpus) == "<bos>2+2?\n\ntwo and two\n\nIt is 4."
    assert decoded(folder, corpus, 1) == "<bos>hello world"
    assert corpus.bos_policy == "text: added"
    assert corpus.reasoning_items == 0
    assert corpus.hash != load_corpus(path, folder).hash


def test_turn_markers_are_single_tokens(folder: Path, tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK, ANSWER)]), folder)
    ids = corpus.items[0].ids.tolist()
    vocab = open_tokenizer(folder).inner.get_vocab()
    assert ids.count(vocab["<|turn>"]) == 3
    assert ids.count(vocab["<|channel>"]) == ids.count(vocab["<channel|>"]) == 1


def test_no_reasoning_means_no_thinking_turn(folder: Path, tmp_path: Path) -> None:
    plain = {"role": "assistant", "content": "4"}
    corpus = load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK, plain)]), folder)
    assert decoded(folder, corpus) == "<bos><|turn>user\n2+2?<turn|>\n<|turn>model\n4<turn|>\n"


def test_reasoning_that_the_template_drops_is_put_back(other: Path, tmp_path: Path) -> None:
    """Published Gemma 4 templates render reasoning only beside tool calls."""
    template = (other / "chat_template.jinja").read_text()
    template = template.replace("{% if m.get('reasoning_content') %}", "{% if m.get('tool_calls') %}")
    (other / "chat_template.jinja").write_text(template)
    more = {"role": "user", "content": "4"}  # the reasoning's own words elsewhere must not hide the loss
    short = {"role": "assistant", "content": "  yes", "reasoning_content": "4"}
    corpus = load_corpus(write(tmp_path / "c.jsonl", [chat("a", more, short, ASK, ANSWER)]), other)
    assert decoded(other, corpus) == (
        "<bos><|turn>system\n<|think|><turn|>\n<|turn>user\n4<turn|>\n"
        "<|turn>model\n<|channel>thought\n4\n<channel|>yes<turn|>\n<|turn>user\n2+2?<turn|>\n"
        "<|turn>model\n<|channel>thought\ntwo and two\n<channel|>It is 4.<turn|>\n"
    )
    assert corpus.spliced_items == 1


def test_a_template_without_bos_gets_one_from_us(other: Path, tmp_path: Path) -> None:
    path = other / "chat_template.jinja"
    path.write_text(path.read_text().replace("{{ bos_token }}", ""))
    corpus = load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK)]), other)
    assert corpus.items[0].ids[:2].tolist() == [BOS, 5]
    assert corpus.bos_policy == "chat: added"


def test_a_tokenizer_that_adds_bos_by_itself_still_gives_one(other: Path, tmp_path: Path) -> None:
    """Base checkpoints ship a post-processor or add_bos_token; we tokenise without special tokens."""
    value = json.loads((other / "tokenizer.json").read_text())
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
    }
    (other / "tokenizer.json").write_text(json.dumps(value))
    corpus = load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK), text("b"), text("c", "<bos>own")]), other)
    assert [np.count_nonzero(r.ids == BOS) for r in corpus.items] == [1, 1, 1]
    assert corpus.bos_policy == "chat: template; text: added or text"


def test_bos_inside_an_item_is_refused(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text("fine"), text("bad", "one <bos> two")])
    with pytest.raises(UsageError, match=r"BOS stands inside(?s:.*)line 2, item 'bad'"):
        load_corpus(path, folder)


def test_hash_depends_on_what_was_read_and_nothing_else(folder: Path, other: Path, tmp_path: Path) -> None:
    items = [text("a"), text("b", "x", cls="code")]
    first = load_corpus(write(tmp_path / "one.jsonl", items), folder)
    assert load_corpus(write(tmp_path / "two.jsonl", items), other).hash == first.hash
    for changed in (
        [text("a2"), items[1]],
        [text("a", "hello worlds"), items[1]],
        [text("a", cls="math"), items[1]],
        [text("a", weight=2.0), items[1]],
        items[::-1],
        items[:1],
    ):
        assert load_corpus(write(tmp_path / "three.jsonl", changed), folder).hash != first.hash


def test_line_separators_inside_text_do_not_split(folder: Path, tmp_path: Path) -> None:
    body = "a\u2028b\u2029c\x85d\x0ce\u000bf"
    corpus = load_corpus(write(tmp_path / "c.jsonl", [text("a", body), text("b")]), folder)
    assert len(corpus.items) == 2
    assert decoded(folder, corpus) == "<bos>" + body
    (tmp_path / "c.txt").write_text(body + "\n\nnext", encoding="utf-8")
    assert decoded(folder, load_corpus(tmp_path / "c.txt", folder)) == "<bos>" + body


def test_crlf_and_byte_order_mark(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(text("a")).encode() + b"\r\n\r\n" + json.dumps(text("b")).encode())
    assert [r.id for r in load_corpus(path, folder).items] == ["a", "b"]


@settings(max_examples=40, deadline=None)
@given(body=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip() and "<" not in s))
def test_any_text_survives_the_round_trip(folder: Path, tmp_path_factory: pytest.TempPathFactory, body: str) -> None:
    path = write(tmp_path_factory.mktemp("any") / "c.jsonl", [text("a", body)])
    corpus = load_corpus(path, folder)
    assert decoded(folder, corpus) == "<bos>" + body.replace("▁", " ")


# ---------------------------------------------------------------- limits and budgets


def test_long_items_are_cut_and_counted_or_refused(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text("long", "x" * 50), text("short", "x" * 9)])
    corpus = load_corpus(path, folder, max_tokens_per_item=10)
    assert [len(r.ids) for r in corpus.items] == [10, 10]
    assert corpus.truncated_items == 1
    assert corpus.max_tokens_per_item == 10
    with pytest.raises(UsageError, match=r"item 'long'(?s:.*)51 tokens"):
        load_corpus(path, folder, max_tokens_per_item=10, on_long="refuse")


def test_budget_takes_whole_items_one_class_at_a_time(folder: Path, tmp_path: Path) -> None:
    sizes = [("a1", "a", 9), ("a2", "a", 9), ("a3", "a", 9), ("b1", "b", 9), ("b2", "b", 29), ("b3", "b", 1)]
    path = write(tmp_path / "c.jsonl", [text(n, "x" * k, cls=c) for n, c, k in sizes])
    corpus = load_corpus(path, folder, max_tokens=45)
    # a1 b1 a2, then b2 does not fit and b stops (its shorter b3 does not jump the queue), then a3
    assert [r.id for r in corpus.items] == ["a1", "a2", "a3", "b1"]
    assert (corpus.left_out_items, corpus.left_out_tokens) == (2, 32)
    assert corpus.tokens == 40
    with pytest.raises(UsageError, match="holds no item"):
        load_corpus(path, folder, max_tokens=1)


def test_so_many_items_class_by_class_in_turn(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text(n, "x" * 9, cls=n[0]) for n in ("a1", "a2", "a3", "b1", "b2")])
    assert [r.id for r in load_corpus(path, folder, max_items=3).items] == ["a1", "a2", "b1"]
    assert [r.id for r in load_corpus(path, folder, max_items=3, max_tokens=20).items] == ["a1", "b1"]
    assert [r.id for r in load_corpus(path, folder, max_items=9).items] == ["a1", "a2", "a3", "b1", "b2"]


def test_chats_alone(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text("plain"), chat("one", ASK, ANSWER), text("other"), chat("two", ASK)])
    corpus = load_corpus(path, folder, chat_only=True)
    assert [r.id for r in corpus.items] == ["one", "two"]
    assert corpus.bos_policy.startswith("chat: ")
    assert "text" not in corpus.bos_policy
    with pytest.raises(UsageError, match="no item with messages"):
        load_corpus(write(tmp_path / "t.jsonl", [text("plain")]), folder, chat_only=True)


def test_classes_choose_before_the_budget(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text("a", cls="code"), text("b", cls="math"), text("c", cls="prose")])
    corpus = load_corpus(path, folder, classes=["prose", "code"])
    assert [r.id for r in corpus.items] == ["a", "c"]
    assert corpus.classes == ("code", "prose")
    with pytest.raises(UsageError, match=r"no class 'maths'(?s:.*)code, math, prose"):
        load_corpus(path, folder, classes=["maths"])


def test_plain_text_in_blocks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\n\none\ntwo\n \t\n\nthree\n")
    corpus = load_corpus(path, folder)
    assert [(r.id, r.cls, decoded(folder, corpus, i)) for i, r in enumerate(corpus.items)] == [
        ("block-000001", "text", "<bos>one\ntwo"),
        ("block-000002", "text", "<bos>three"),
    ]


def test_plain_text_in_chunks_loses_no_token(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_file, "PIECE_CHARACTERS", 64)
    body = "".join(f"line {i} of a text\n\n" for i in range(40))
    path = tmp_path / "c.txt"
    path.write_text(body)
    corpus = load_corpus(path, folder, max_tokens_per_item=33, text_items="chunks")
    assert {len(r.ids) for r in corpus.items[:-1]} == {33}
    tokenizer = open_tokenizer(folder).inner
    joined = np.concatenate([r.ids[1:] for r in corpus.items])
    assert tokenizer.decode(joined) == body
    assert corpus.bos_policy == "text: added"
    assert corpus.truncated_items == 0


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "class": "c", "text": "t", "wieght": 2}', "wieght"),
        ('{"id": "a", "class": "c", "text": "t", "messages": [{"role": "user", "content": "x"}]}', "exactly one of"),
        ('{"id": "a", "class": "c"}', "exactly one of"),
        ('{"id": "a", "class": "c", "text": null}', "exactly one of"),
        ('{"id": "a", "class": "c", "text": "t", "weight": 0}', "greater than 0"),
        ('{"id": "a", "class": "c", "text": "t", "weight": -1.5}', "greater than 0"),
        ('{"id": "a", "class": "c", "text": "t", "weight": NaN}', "NaN is not a JSON number"),
        ('{"id": "a", "class": "c", "text": "t", "weight": 1e999}', "finite"),
        ('{"id": "a", "class": "c", "text": "t", "weight": "2"}', "weight"),
        ('{"id": "a", "class": "c", "text": "t", "weight": true}', "weight"),
        ('{"id": 7, "class": "c", "text": "t"}', "id"),
        ('{"id": " ", "class": "c", "text": "t"}', "id"),
        ('{"id": "a", "class": "\\u001b[31mred", "text": "t"}', "control characters"),
        ('{"id": "a", "class": "", "text": "t"}', "class"),
        ('{"id": "a", "class": "c", "text": " \\n"}', "blank"),
        ('{"id": "a", "class": "c", "messages": []}', "blank"),
        ('{"id": "a", "class": "c", "messages": [{"role": "user", "content": " "}]}', "blank"),
        ('{"id": "a", "class": "c", "messages": [{"role": "model", "content": "x"}]}', "role"),
        ('{"id": "a", "class": "c", "messages": [{"role": "user", "content": "x", "name": "y"}]}', "name"),
        ('{"id": "a", "class": "c", "messages": [{"role": "user", "content": [{"type": "text"}]}]}', "content"),
        (
            '{"id": "a", "class": "c", "messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}',
            "thinks",
        ),
        (
            '{"id": "a", "class": "c", "messages":'
            ' [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}',
            "system message",
        ),
        ('{"id": "a", "class": "c", "messages": "hello"}', "messages"),
        ('{"id": "a", "class": "c", "text": "\\ud800"}', "surrogates"),
        ('{"id": "a", "id": "b", "class": "c", "text": "t"}', "repeated"),
        ('["a"]', "not a JSON object"),
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(folder: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(text("good")) + "\n\n" + line + "\n")
    with pytest.raises(UsageError, match=message) as error:
        load_corpus(path, folder)
    assert error.value.where is not None
    assert error.value.where.startswith("c.jsonl, line 3")
    assert len(str(error.value).splitlines()) <= 4


def test_an_id_used_twice(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text("a"), text("b"), text("a", "other")])
    with pytest.raises(UsageError, match=r"two items named 'a'(?s:.*)lines 1 and 3"):
        load_corpus(path, folder)


@pytest.mark.parametrize(("name", "options"), [("c.jsonl", {}), ("c.txt", {}), ("c.txt", {"text_items": "chunks"})])
@pytest.mark.parametrize(("content", "message"), [(b"", "empty"), (b" \n\n\t\n", "blank")])
def test_nothing_in_the_file(
    folder: Path, tmp_path: Path, name: str, options: dict[str, Any], content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_corpus(tmp_path / name, folder, **options)


def test_no_file(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no corpus file"):
        load_corpus(tmp_path / "absent.jsonl", folder)
    with pytest.raises(UsageError, match="not a file"):
        load_corpus(tmp_path, folder)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_wrong_encoding_names_line_and_byte(folder: Path, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "c.jsonl"
    good = json.dumps(text("a")).encode() + b"\n"
    path.write_bytes(good + '{"id": "é"}'.encode(encoding))
    byte = len(good) + (0 if encoding == "utf-16" else 8)
    with pytest.raises(UsageError, match=f"not UTF-8(?s:.*)line 2, byte {byte} of the file"):
        load_corpus(path, folder)


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_an_endless_line_is_refused_without_reading_it_whole(folder: Path, tmp_path: Path, name: str) -> None:
    import tracemalloc

    path = tmp_path / name
    with open(path, "wb") as f:
        f.truncate(100 << 20)  # 100 MB of NUL bytes without a newline; sparse on disk
    tracemalloc.start()
    with pytest.raises(UsageError, match=r"line of the corpus is too long(?s:.*)line 1"):
        load_corpus(path, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * corpus_file.MAX_LINE_BYTES


def test_an_endless_block_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_file, "MAX_LINE_BYTES", 1000)
    (tmp_path / "c.txt").write_text("fine\n\n" + "a line\n" * 500)
    with pytest.raises(UsageError, match=r"block of the corpus is too long(?s:.*)from line 3"):
        load_corpus(tmp_path / "c.txt", folder)


def test_an_item_of_one_token(other: Path, tmp_path: Path) -> None:
    """Only a tokenizer that swallows text gets below two tokens; BOS alone predicts nothing."""
    value = json.loads((other / "tokenizer.json").read_text())
    value["normalizer"] = {"type": "Replace", "pattern": {"Regex": "z+"}, "content": ""}
    (other / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UsageError, match=r"too short(?s:.*)item 'a'(?s:.*)1 tokens"):
        load_corpus(write(tmp_path / "c.jsonl", [text("a", "zzz")]), other)


def test_ids_above_the_models_vocabulary(other: Path, tmp_path: Path) -> None:
    (other / "config.json").write_text(json.dumps(full_config("moe", vocab_size=100)))
    with pytest.raises(CheckpointError, match=r"ids that the model does not have(?s:.*)below vocab_size 100"):
        load_corpus(write(tmp_path / "c.jsonl", [text("a")]), other)


def test_tokenizer_files_missing_or_broken(other: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [text("a")])
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load_corpus(path, other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_corpus(path, other)


def test_no_chat_template_is_an_error_only_for_messages(other: Path, tmp_path: Path) -> None:
    (other / "chat_template.jinja").unlink()
    assert load_corpus(write(tmp_path / "t.jsonl", [text("a")]), other).template_hash == "none"
    with pytest.raises(CheckpointError, match=r"no chat template(?s:.*)item 'a'"):
        load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK)]), other)


def test_a_template_that_refuses(other: Path, tmp_path: Path) -> None:
    (other / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match=r"roles must alternate(?s:.*)item 'a'"):
        load_corpus(write(tmp_path / "c.jsonl", [chat("a", ASK)]), other)


def test_limits_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too small"):
        load_corpus(write(tmp_path / "c.jsonl", [text("a")]), folder, max_tokens_per_item=1)


def test_tokenizer_hash_sees_the_vocabulary_not_the_file(other: Path) -> None:
    before = tokenizer_hash(other)
    value = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(value, indent=3))
    assert tokenizer_hash(other) == before
    value["model"]["vocab"]["<0x00>"], value["model"]["vocab"]["<0x01>"] = 11, 10
    (other / "tokenizer.json").write_text(json.dumps(value))
    assert tokenizer_hash(other) != before
