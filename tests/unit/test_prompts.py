"""The prompts stage: two sets apart, every prompt short enough and with an answer."""

import json

import pytest

from scripts.data import prompts, tokenizer
from scripts.lib.errors import DataError, RecipeError
from tests.unit.conftest import run

TEMPLATE = "config/models/tiny/chat_template.jinja"
ROWS = [{"input": f"{a}+1=", "output": str(a + 1), "id": a} for a in range(40)]
KEPT = [{"input": row["input"], "output": row["output"]} for row in ROWS]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(out, name):
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    data = lines(folder / "corpus.jsonl", [{"text": "one two three"}] * 9)
    flags = [f"--data=corpus={data}", f"--chat-template={TEMPLATE}"]
    return run(tokenizer, folder / "made", "vocab_size: 270", *flags)


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    def make(rows, recipe="max_prompt_tokens: 8", out="out"):
        data = lines(tmp_path / "rows.jsonl", rows)
        flags = [f"--tokenizer={tokenizer_folder}", f"--data=sums={data}"]
        return run(prompts, tmp_path / out, recipe, *flags)

    return make


def test_every_prompt_is_in_one_set_and_in_one_only(make):
    out = make(ROWS)
    train, held = rows_of(out, "train.jsonl"), rows_of(out, "validation.jsonl")
    assert len(held) == 2  # 5% of 40
    assert sorted(train + held, key=str) == sorted(KEPT, key=str)


@pytest.mark.parametrize(
    ("fraction", "count", "held"),
    [(0.05, 2, 1), (0.05, 1, 0), (0.9, 2, 1), (0.0, 9, 0), (0.5, 9, 4), (0.25, 40, 10)],
)
def test_both_sets_have_a_prompt_where_two_are_there(make, fraction, count, held):
    recipe = f"{{max_prompt_tokens: 8, validation_fraction: {fraction}}}"
    out = make(ROWS[:count], recipe)
    assert len(rows_of(out, "validation.jsonl")) == held
    assert len(rows_of(out, "train.jsonl")) == count - held


def test_the_seed_decides_the_split_and_nothing_else_does(make):
    def content(out):
        return [
            (out / f"{name}.jsonl").read_bytes() for name in ("train", "validation")
        ]

    first, again = content(make(ROWS)), content(make(ROWS, out="again"))
    other = content(make(ROWS, "{max_prompt_tokens: 8, seed: 1}", "other"))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_a_prompt_that_comes_twice_is_kept_once_and_counted(make):
    twice = [*ROWS[:3], ROWS[0], {**ROWS[1], "output": "another"}]
    out = make(twice)
    counts = json.loads((out / "prompts.json").read_text())
    assert (counts["duplicates"], counts["conflicting"]) == (2, 1)
    assert counts["train"] + counts["validation"] == 3
    rows = rows_of(out, "train.jsonl") + rows_of(out, "validation.jsonl")
    assert sorted(rows, key=str) == sorted(KEPT[:3], key=str)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"input": "1+1="}, "column `output` is missing; found: input"),
        ({"input": "1+1=", "output": " "}, "the prompt has no answer"),
        ({"input": "", "output": "2"}, "the prompt is empty"),
        ({"input": "1+1=", "output": 2}, "column `output` is int, not a string"),
    ],
)
def test_a_prompt_without_an_answer_is_named(make, row, why):
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {why}"):
        make([*ROWS[:2], row])


def test_a_prompt_is_measured_as_the_chat_it_becomes(make):
    rows = [{"input": "12+34=", "output": "46"}]  # six, and two of the template
    make(rows, "max_prompt_tokens: 8")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: 8 tokens") as error:
        make(rows, "max_prompt_tokens: 7")
    assert "needs max_prompt_tokens 8" in error.value.hint


def test_a_column_setting_is_refused_rather_than_ignored(make):
    with pytest.raises(RecipeError, match="`input` and `output`"):
        make(ROWS, "{max_prompt_tokens: 8, sources: {sums: {column: question}}}")
