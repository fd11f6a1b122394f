"""The pack stage: every chat once, whole, with exactly the assistant's tokens."""

import hashlib
import itertools
import json
import random

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from scripts.data import pack, tokenizer
from scripts.lib.errors import DataError

TEMPLATE = "config/models/tiny/chat_template.jinja"
EOS = 1


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def made_chats(count):
    rng = random.Random(5)
    words = ["one", " two", "\n", " 37", " drei ü", " 🙂", "漢", "  "]
    chats = []
    for _ in range(count):
        chat = [{"role": "system", "content": "Be kind."}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            chat.append(user("".join(rng.choices(words, k=rng.randint(1, 6)))))
            chat.append(assistant("".join(rng.choices(words, k=5)) + "."))
        chats.append(chat)
    return chats


CHATS = made_chats(120)


def run(stage, out, recipe, *flags):
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(recipe)
    assert stage.main(["--recipe", str(path), "--out", str(out), *flags]) == 0
    return out


def lines(path, chats):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    data = lines(folder / "chat.jsonl", CHATS)
    flags = [f"--data=chat={data}", f"--chat-template={TEMPLATE}"]
    return run(tokenizer, folder / "made", "vocab_size: 290", *flags)


@pytest.fixture(scope="module")
def hugging_face(tokenizer_folder):
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def make(tmp_path, tokenizer_folder):
    def make(chats, recipe="sequence_length: 128", out="out", folder=tokenizer_folder):
        data = lines(tmp_path / "chat.jsonl", chats)
        flags = [f"--tokenizer={folder}", f"--data=chat={data}"]
        return run(pack, tmp_path / out, recipe, *flags)

    return make


def rows_of(out):
    return parquet.read_table(out / "packed.parquet").to_pylist()


def chats_of(row):
    """A row's chats: (ids, shifted mask) of each."""
    starts = [*row["seq_start_id"], len(row["input_ids"])]
    return [
        (row["input_ids"][a:b], row["loss_mask"][a:b])
        for a, b in itertools.pairwise(starts)
    ]


def test_every_chat_is_there_once_with_the_ids_and_mask_of_transformers(
    make, hugging_face
):
    packed = [chat for row in rows_of(make(CHATS)) for chat in chats_of(row)]
    found = hugging_face.apply_chat_template(
        CHATS, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = [
        (ids, [*said[1:], 0])
        for ids, said in zip(found["input_ids"], found["assistant_masks"], strict=True)
    ]
    assert sorted(packed) == sorted(expected)


def test_loss_is_on_the_label_that_the_assistant_says(make, hugging_face):
    chat = [user("1+1="), assistant("2"), user("and 3?"), assistant("5")]
    (row,) = rows_of(make([chat]))
    labels = row["input_ids"][1:]
    trained = [i for i, m in zip(labels, row["loss_mask"], strict=False) if m]
    assert hugging_face.decode(trained) == "2<eos>5<eos>"
    assert row["loss_mask"][-1] == 0, "the last token of a chat predicts nothing"


def test_rows_hold_no_more_than_the_sequence_length_and_are_full(make):
    out = make(CHATS)
    rows, counts = rows_of(out), json.loads((out / "packing.json").read_text())
    assert all(0 < len(row["input_ids"]) <= 128 for row in rows)
    assert counts["chats"] == len(CHATS) == sum(len(r["seq_start_id"]) for r in rows)
    assert counts["rows"] == len(rows)
    assert counts["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert counts["loss_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
    assert counts["fill"] == round(counts["tokens"] / (len(rows) * 128), 6)
    assert len(rows) <= -(-counts["tokens"] // 128) + 1


def test_columns_are_what_megatron_bridge_reads(make):
    schema = parquet.read_schema(make(CHATS) / "packed.parquet")
    assert schema.names == ["input_ids", "loss_mask", "seq_start_id"]
    for column in schema:
        assert str(column.type.value_type) == "int32"


def test_packing_twice_gives_the_same_bytes_and_a_seed_another_order(make):
    def digest(out):
        return hashlib.md5((out / "packed.parquet").read_bytes()).hexdigest()

    first = make(CHATS)
    again = make(CHATS, out="again")
    other = make(CHATS, "{sequence_length: 128, seed: 1}", "other")
    assert digest(first) == digest(again) != digest(other)
    assert sorted(map(str, rows_of(first))) == sorted(map(str, rows_of(other)))


def test_rows_are_not_ordered_by_length(make):
    longest = [
        max(len(ids) for ids, _ in chats_of(row)) for row in rows_of(make(CHATS))
    ]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=80),
    spare=st.integers(0, 60),
)
def test_packing_keeps_every_sequence_and_wastes_less_than_half(lengths, spare):
    capacity = max(lengths, default=1) + spare
    rows = pack.best_fit_decreasing(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    totals = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(total <= capacity for total in totals)
    assert all(a + b > capacity for a, b in itertools.pairwise(totals))


def test_a_chat_too_long_is_named_with_its_tokens_and_what_would_fit(make, tmp_path):
    long = [user("x" * 200), assistant("y" * 100)]
    with pytest.raises(DataError) as error:
        make([CHATS[0], long, long], "sequence_length: 128")
    message = str(error.value)
    tokens = message.split("chat.jsonl:2: ")[1].split(" ")[0]
    assert "2 of 3 chats are longer than 128 tokens" in message
    assert f"the longest needs sequence_length {tokens}" in message
    make([CHATS[0], long], f"sequence_length: {tokens}")


@pytest.mark.parametrize(
    ("chat", "why"),
    [
        ([user("hello")], "no message of the assistant"),
        ([], "no message of the assistant"),
        ([user("hello"), assistant(" \n")], r"message 2 \(assistant\) is empty"),
        ([{"role": "bot", "content": "x"}], "message 1 has role 'bot'"),
        ([{"content": "x"}], "message 1 has role None"),
        (
            [user("hello"), assistant(None)],
            r"message 2 \(assistant\) has no text as content",
        ),
        (["hello"], "message 1 is no object"),
        ("hello", "column `messages` is str, not a list"),
        (
            [user("x"), {"role": "tool", "content": "y"}, assistant("z")],
            "the chat template refuses it: role tool",
        ),
    ],
)
def test_a_chat_that_cannot_be_trained_on_is_named(make, chat, why):
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: {why}"):
        make([CHATS[0], chat])


def test_bad_rows_within_the_limit_are_left_out_and_counted(make):
    recipe = "{sequence_length: 128, sources: {chat: {max_bad_rows: 1}}}"
    counts = json.loads(
        (make([CHATS[0], [user("?")], CHATS[1]], recipe) / "packing.json").read_text()
    )
    assert (counts["chats"], counts["bad_rows"]) == (2, 1)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (None, "has no chat template"),
        (
            "{{ messages[0].content }}{% if add_generation_prompt %}{% endif %}",
            "no `{%",
        ),
    ],
)
def test_a_tokenizer_whose_template_marks_nothing_is_refused(
    make, tmp_path, hugging_face, template, what
):
    tok = transformers.AutoTokenizer.from_pretrained(hugging_face.name_or_path)
    tok.chat_template = template
    tok.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match=what) as error:
        make(CHATS, folder=tmp_path / "bare")
    assert "{% generation %}" in error.value.hint


def test_trimmed_offsets_and_split_letters_lose_no_token(
    make, tmp_path, tokenizer_folder
):
    """Where apply_chat_template's own mask goes wrong, as Transformers 5.23 has it."""
    folder = tmp_path / "trimmed"
    folder.mkdir()
    for path in tokenizer_folder.iterdir():
        text = path.read_text().replace('"trim_offsets": false', '"trim_offsets": true')
        (folder / path.name).write_text(text)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    answers = [" 1 ", "  leading", "trailing  ", "ends in 🙂", "🙂"]
    for said in answers:
        chat = [user("q"), assistant(said), user(" 7"), assistant(said)]
        (row,) = rows_of(make([chat], folder=folder))
        labels = zip(row["input_ids"][1:], row["loss_mask"], strict=False)
        assert tok.decode([i for i, m in labels if m]) == said * 2
