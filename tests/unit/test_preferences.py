"""The preferences stage: two sets apart, of pairs that say which answer is better."""

import itertools
import json

import pytest
import transformers

from scripts.data import generate, preferences, prompts, tokenizer
from scripts.lib.errors import DataError, RecipeError
from scripts.lib.schema import Generate
from tests.unit.conftest import run

TEMPLATE = "config/models/tiny/chat_template.jinja"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


ROWS = [
    {"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a), "id": a}
    for a in range(40)
]
KEPT = [
    {
        "messages": [user(row["prompt"])],
        "chosen": row["chosen"],
        "rejected": row["rejected"],
    }
    for row in ROWS
]
TALK = [{"role": "system", "content": "Be brief."}, user("a"), assistant("b")]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(out):
    return [
        [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    ]


def all_rows_of(out):
    return sorted(itertools.chain(*rows_of(out)), key=str)


def counts_of(out):
    return json.loads((out / "preferences.json").read_text())


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    data = lines(folder / "corpus.jsonl", [{"text": "one two three"}] * 9)
    flags = [f"--data=corpus={data}", f"--chat-template={TEMPLATE}"]
    return run(tokenizer, folder / "made", "vocab_size: 270", *flags)


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    def make(rows, recipe="max_tokens: 64", out="out", folder=tokenizer_folder):
        data = lines(tmp_path / "rows.jsonl", rows)
        flags = [f"--tokenizer={folder}", f"--data=sums={data}"]
        return run(preferences, tmp_path / out, recipe, *flags)

    return make


def test_every_pair_is_in_one_set_and_in_one_only(make):
    out = make(ROWS)
    train, held = rows_of(out)
    assert (len(train), len(held)) == (38, 2)  # 5% of 40
    assert all_rows_of(out) == sorted(KEPT, key=str)
    assert list(train[0]) == ["messages", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.05, 2), (0.05, 1), (0.9, 2), (0.0, 9), (0.25, 40)]
)
def test_as_many_are_held_back_as_of_prompts(
    make, tmp_path, tokenizer_folder, fraction, count
):
    _, held = rows_of(
        make(ROWS[:count], f"{{max_tokens: 64, validation_fraction: {fraction}}}")
    )
    asked = [{"input": row["prompt"], "output": "?"} for row in ROWS[:count]]
    data = lines(tmp_path / "asked.jsonl", asked)
    twin = run(
        prompts,
        tmp_path / "twin",
        f"{{max_prompt_tokens: 64, validation_fraction: {fraction}}}",
        f"--tokenizer={tokenizer_folder}",
        f"--data=sums={data}",
    )
    expected = {row["input"] for row in rows_of(twin)[1]}
    assert {row["messages"][0]["content"] for row in held} == expected


def test_the_seed_decides_the_split_and_nothing_else_does(make):
    first, again = rows_of(make(ROWS)), rows_of(make(ROWS, out="again"))
    other = rows_of(make(ROWS, "{max_tokens: 64, seed: 1}", "other"))
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_no_prompt_has_pairs_in_both_sets(make):
    rows = [{**row, "rejected": wrong} for row in ROWS for wrong in ("x", "y", "z")]
    train, held = rows_of(make(rows))
    assert (len(train), len(held)) == (114, 6)
    assert not {str(row["messages"]) for row in train} & {
        str(row["messages"]) for row in held
    }
    together = sum(a["messages"] == b["messages"] for a, b in itertools.pairwise(train))
    assert together < 20, "pairs of a prompt are not shuffled apart"


def test_a_pair_that_comes_twice_is_kept_once_and_counted(make):
    out = make([*ROWS[:3], ROWS[0], {**ROWS[1], "id": 7}])
    assert counts_of(out) == {
        "train": 2,
        "validation": 1,
        "duplicates": 2,
        "conflicting": 0,
        "equal": 0,
        "too_long": 0,
        "bad_rows": 0,
        "longest_tokens": 8,  # five, and three of the template
    }
    assert all_rows_of(out) == sorted(KEPT[:3], key=str)


def test_a_pair_and_its_reverse_are_both_kept_and_counted(make):
    reverse = {"prompt": "1+1=", "chosen": "1", "rejected": "2"}
    elsewhere = {"prompt": "2+0=", "chosen": "1", "rejected": "2"}
    counts = counts_of(make([*ROWS[:3], reverse, elsewhere, reverse]))
    assert (counts["conflicting"], counts["duplicates"]) == (1, 1)
    assert counts["train"] + counts["validation"] == 5


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [*TALK, user("c")], "chosen": "d", "rejected": "e"},
        {
            "chosen": [*TALK, user("c"), assistant("d")],
            "rejected": [*TALK, user("c"), assistant("e")],
        },
        {
            "prompt": [*TALK, user("c")],
            "chosen": [*TALK, user("c"), assistant("d")],
            "rejected": [*TALK, user("c"), {**assistant("e"), "name": None}],
        },
        {
            "prompt": "a ",
            "chosen": [*TALK, user("c"), assistant("d")],
            "rejected": [*TALK, user("c"), assistant("e")],
        },
        {
            "prompt": [*TALK, user("c")],
            "chosen": [assistant("d")],
            "rejected": [assistant("e")],
        },
    ],
    ids=["texts", "conversations", "with prompt", "with its text", "last messages"],
)
def test_every_common_form_gives_the_same_pair(make, row):
    expected = {"messages": [*TALK, user("c")], "chosen": "d", "rejected": "e"}
    assert all_rows_of(make([row])) == [expected]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"chosen": "2", "rejected": "3"}, "column `prompt` is missing"),
        ({"prompt": "?", "chosen": "2"}, "column `rejected` is missing"),
        ({"prompt": "?", "chosen": 2, "rejected": "3"}, "column `chosen` is int, not"),
        ({"prompt": " ", "chosen": "2", "rejected": "3"}, "the user's last message is"),
        ({"prompt": "?", "chosen": " ", "rejected": "3"}, r".* \(column `chosen`\)"),
        ({"prompt": "?", "chosen": "2", "rejected": ""}, r".* \(column `rejected`\)"),
        ({"prompt": TALK, "chosen": "2", "rejected": "3"}, "the last message before"),
        ({"prompt": [], "chosen": "2", "rejected": "3"}, "the last message before"),
        ({"prompt": ["?"], "chosen": "2", "rejected": "3"}, "message 1 of `prompt` is"),
        (
            {"prompt": [{"role": "bot", "content": "?"}], "chosen": "", "rejected": ""},
            "message 1 of `prompt` has role 'bot'; known: system",
        ),
        (
            {"prompt": [user(["?"])], "chosen": "2", "rejected": "3"},
            r"message 1 of `prompt` \(user\) has no text as content",
        ),
        (
            {"prompt": "?", "chosen": [user("?"), assistant("2")], "rejected": "3"},
            "column `rejected` is str, not a list",
        ),
        (
            {"chosen": [user("?"), assistant("2")], "rejected": [user("?")]},
            "the last message of `rejected` is not the assistant's",
        ),
        (
            {"chosen": [], "rejected": []},
            "the last message of `chosen` is not the assistant's",
        ),
        (
            {
                "chosen": [user("?"), assistant("2")],
                "rejected": [user("!"), assistant("3")],
            },
            "`chosen` and `rejected` differ before their last message",
        ),
        (
            {
                "prompt": "other",
                "chosen": [user("?"), assistant("2")],
                "rejected": [user("?"), assistant("3")],
            },
            "column `prompt` is not what `chosen` and `rejected` answer",
        ),
        (
            {
                "chosen": [user("?"), {**assistant("2"), "tool_calls": [{"id": 1}]}],
                "rejected": [user("?"), assistant("3")],
            },
            "message 2 of `chosen` has `tool_calls`; only role and content are read",
        ),
        (
            {
                "prompt": [{"role": "tool", "content": "x"}, user("?")],
                "chosen": "2",
                "rejected": "3",
            },
            "the chat template refuses it: role tool",
        ),
    ],
)
def test_a_row_that_is_no_pair_is_named(make, row, why):
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: {why}"):
        make([*ROWS[:2], row])


def test_bad_rows_within_the_limit_are_left_out_and_counted(make):
    recipe = "{max_tokens: 64, sources: {sums: {max_bad_rows: 1}}}"
    counts = counts_of(make([ROWS[0], {"prompt": "?"}, ROWS[1]], recipe))
    assert (counts["train"] + counts["validation"], counts["bad_rows"]) == (2, 1)


def test_both_sides_are_measured_as_the_chats_they_become(make, tokenizer_folder):
    tok = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    for sides in (("46", "forty-six"), ("forty-six", "46")):
        row = dict(zip(("chosen", "rejected"), sides, strict=True), prompt="12+34=")
        chat = [user("12+34="), assistant("forty-six")]
        tokens = len(tok.apply_chat_template(chat, return_dict=True)["input_ids"])
        out = make([ROWS[0], row], f"max_tokens: {tokens}")
        assert counts_of(out)["longest_tokens"] == tokens
        with pytest.raises(
            DataError, match=rf"rows\.jsonl:2: {tokens} tokens"
        ) as error:
            make([ROWS[0], row], f"max_tokens: {tokens - 1}")
        assert "1 pairs, rendered as chats, are longer than" in error.value.what
        assert f"needs max_tokens {tokens}" in error.value.hint


def test_equal_sides_are_refused_by_name_or_dropped_and_counted(make):
    equal = [{**row, "rejected": row["chosen"]} for row in ROWS[:7]]
    rows = [ROWS[8], *equal, ROWS[9]]
    with pytest.raises(DataError, match=r"7 pairs.* have equal sides") as error:
        make(rows)
    assert "rows.jsonl:2\n" in error.value.what
    assert "rows.jsonl:7" not in error.value.what, "only the first few are named"
    assert "`drop_equal: true` drops and counts them" in error.value.hint
    out = make(rows, "{max_tokens: 64, drop_equal: true}")
    assert counts_of(out)["equal"] == 7
    assert all_rows_of(out) == KEPT[8:10]


def test_nothing_left_but_equal_sides_is_an_error(make):
    equal = {"prompt": "?", "chosen": "2", "rejected": "2"}
    with pytest.raises(DataError, match="all 2 pairs have equal sides"):
        make([equal, equal], "{max_tokens: 64, drop_equal: true}")


def test_a_dropped_pair_is_not_too_long(make):
    equal = {"prompt": "?" * 99, "chosen": "2", "rejected": "2"}
    out = make([ROWS[0], equal], "{max_tokens: 64, drop_equal: true}")
    assert counts_of(out)["longest_tokens"] == 8


def test_sides_that_the_template_makes_equal_are_equal(
    make, tmp_path, tokenizer_folder
):
    row = {"prompt": "?", "chosen": "2", "rejected": "2\n"}
    make([row])
    tok = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tok.chat_template = (
        "{% for m in messages %}{{ m.role + m.content|trim }}{% endfor %}"
    )
    tok.save_pretrained(tmp_path / "trims")
    with pytest.raises(DataError, match=r"1 pairs.* have equal sides"):
        make([row], folder=tmp_path / "trims")


def test_a_column_setting_is_refused_rather_than_ignored(make):
    with pytest.raises(RecipeError, match="`prompt`, `chosen` and `rejected`"):
        make(ROWS, "{max_tokens: 64, sources: {sums: {column: question}}}")


def test_generated_preferences_are_taken_whole(make):
    rows = list(generate.rows(Generate(kind="preferences", count=300)))
    counts = counts_of(make(rows))
    assert sum(counts[n] for n in ("train", "validation", "duplicates")) == 300
    assert counts["equal"] == counts["conflicting"] == counts["bad_rows"] == 0
