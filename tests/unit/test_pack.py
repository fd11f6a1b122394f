"""The pack stage: every chat once, whole, with exactly the assistant's tokens."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from scripts.data import fast, pack, tokenizer
from scripts.data.fast import Encoder
from scripts.lib.errors import DataError
from tests.unit.conftest import run

TEMPLATE = "config/models/tiny/chat_template.jinja"
TEMPLATES = [
    TEMPLATE,
    "config/models/chatml.jinja",
    "config/models/nano3/chat_template.jinja",
]
WITH_TOOLS = """
{%- for tool in tools or [] -%}{{- '<tool>' + tool | tojson + '\\n' -}}{%- endfor -%}
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' -}}
  {%- if m.role == 'assistant' -%}
    {%- generation -%}{{- m.content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '<tool_call>' + call.function | tojson + '</tool_call>' -}}
    {%- endfor -%}
    {{- eos_token -}}{%- endgeneration -%}
  {%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}
  {{- '\n' -}}
{%- endfor -%}
"""
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


def lines(path, chats):
    """A row for each chat; one that is a whole row already stays so."""
    rows = [chat if isinstance(chat, dict) else {"messages": chat} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
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


def of_transformers(tok, chats):
    """Ids and shifted mask of each chat, by apply_chat_template."""
    found = tok.apply_chat_template(
        chats, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return [(ids, [*said[1:], 0]) for ids, said in pairs]


def chats_in(out):
    return [chat for row in rows_of(out) for chat in chats_of(row)]


def remade(folder, tmp_path, template=None, change=lambda content: None):
    """A tokenizer folder with another template, its tokenizer.json changed."""
    made = tmp_path / "remade"
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    content = json.loads((made / "tokenizer.json").read_text())
    change(content)
    (made / "tokenizer.json").write_text(json.dumps(content))
    if template is not None:
        (made / "chat_template.jinja").write_text(template)
    return made


@pytest.fixture(params=["fastokens", "Hugging Face"])
def library(request, monkeypatch):
    """Every test with this runs by both ways to ids and masks."""
    if request.param == "Hugging Face":
        monkeypatch.setattr(pack, "bytes_of_tokens", lambda tokenizer: None)
    return request.param


def is_fast(folder):
    return pack.ChatEncoder(folder).num_bytes is not None


@pytest.mark.parametrize("template", [*TEMPLATES, WITH_TOOLS])
def test_each_template_gives_the_ids_and_mask_of_transformers(
    make, tmp_path, tokenizer_folder, library, template
):
    chats = CHATS
    if template == WITH_TOOLS:
        call = {"function": {"name": "add", "arguments": {"a": 1, "ü": "漢"}}}
        tools = [
            {"role": "system", "content": "Tools: add"},
            user("1+1? 🙂"),
            {"role": "assistant", "content": "I add. ", "tool_calls": [call]},
            {"role": "tool", "content": '{"sum": 2}'},
            assistant("2 — “zwei” 漢\n"),
            user("thanks"),
            assistant("é"),
        ]
        chats = [*CHATS[:20], tools]
    else:
        with open(template, encoding="utf-8") as file:
            template = file.read()
    folder = remade(tokenizer_folder, tmp_path, template)
    assert is_fast(folder) == (library == "fastokens")
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    out = make(chats, "sequence_length: 1024", folder=folder)
    assert sorted(chats_in(out)) == sorted(of_transformers(tok, chats))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"ü": "漢"}}}


@pytest.mark.parametrize("content", [None, "", "I add. ", "left out"])
@pytest.mark.parametrize("tools", [[TOOL, TOOL], json.dumps([TOOL]), [], None])
def test_calls_and_tools_are_those_of_transformers(
    make, tmp_path, tokenizer_folder, library, content, tools
):
    calls = {"role": "assistant", "content": content, "tool_calls": [CALL, CALL]}
    if content == "left out":
        del calls["content"]
    answer = {"role": "tool", "content": '{"sum": 2}'}
    chat = [user("1+1?"), calls, answer, calls, answer, assistant("2 漢")]
    folder = remade(tokenizer_folder, tmp_path, WITH_TOOLS)
    out = make(
        [{"messages": chat, "tools": tools}], "sequence_length: 2048", folder=folder
    )
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    calls["content"] = calls.get("content") or ""
    found = tok.apply_chat_template(
        chat,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ((ids, mask),) = chats_in(out)
    assert ids == found["input_ids"]
    assert mask == [*found["assistant_masks"][1:], 0]
    said = tok.decode([i for i, m in zip(ids[1:], mask, strict=False) if m])
    assert said.count("<tool_call>") == 4 and said.endswith("2 漢<eos>")
    assert '"sum"' not in said and "<tool>" not in said


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"tools": [TOOL]}, "the chat template leaves out its `tools`"),
        ({"tools": "{"}, "column `tools` is not JSON"),
        ({"tools": {"a": 1}}, "column `tools` is dict, not a list"),
        ({"calls": [CALL]}, "the chat template leaves out its `tool_calls`"),
    ],
)
def test_tools_that_would_be_lost_are_named(make, row, why):
    calls = row.pop("calls", None)
    last = {"role": "assistant", "content": "x", "tool_calls": calls}
    with pytest.raises(DataError, match=rf"chat\.jsonl:2: {why}"):
        make([CHATS[0], {"messages": [user("1+1?"), last], **row}])


def test_a_token_that_reaches_into_a_span_is_the_assistants(
    make, tmp_path, tokenizer_folder, library
):
    """`answer` begins in the token ` answer`, whose blank is the template's."""
    merged = [" a", " an", " ans"]

    def merge(content):
        content["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        }
        model = content["model"]
        for token in merged:
            token = token.replace(" ", "Ġ")
            model["merges"] = [
                pair for pair in model["merges"] if "".join(pair) != token
            ]
            model["vocab"].setdefault(token, len(model["vocab"]))
        model["merges"] = [[pair[:-1].replace(" ", "Ġ"), pair[-1]] for pair in merged]

    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ ' ' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}Q: {{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    folder = remade(tokenizer_folder, tmp_path, template, merge)
    assert is_fast(folder) == (library == "fastokens")
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[user("ü 漢"), assistant("answer"), user("q"), assistant("an ant")]]
    out = make(chats, folder=folder)
    ((ids, mask),) = chats_in(out)
    assert [(ids, mask)] == of_transformers(tok, chats)
    trained = [i for i, m in zip(ids[1:], mask, strict=False) if m]
    assert tok.decode(trained) == " answer an ant"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["added_tokens"][4].update(rstrip=True),
    ],
    ids=["normalizer", "stripping"],
)
def test_a_tokenizer_that_changes_bytes_is_left_to_hugging_face(
    make, tmp_path, tokenizer_folder, change
):
    folder = remade(tokenizer_folder, tmp_path, change=change)
    assert not is_fast(folder)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [*CHATS[:9], [user("a"), assistant("e\u0301 \u212b.")]]
    assert sorted(chats_in(make(chats, folder=folder))) == sorted(
        of_transformers(tok, chats)
    )


@pytest.mark.parametrize("wrong", ["ids", "bytes", "refused"])
def test_where_fastokens_differs_hugging_face_starts_over(
    make, monkeypatch, capsys, wrong
):
    ids_of, bytes_of, calls = Encoder.fastokens, pack.bytes_of_tokens, []

    def differing(encoder, texts):
        calls.append(texts)
        if wrong == "refused" and len(calls) > 1:
            raise RuntimeError("match limit")
        ids, lengths = ids_of(encoder, texts)
        if wrong == "ids":
            ids = np.where(np.arange(len(ids)) == lengths[0] - 1, 7, ids)
        return ids, lengths

    def other_bytes(tokenizer):
        return bytes_of(tokenizer) + (wrong == "bytes")

    right = make(CHATS, out="right")
    monkeypatch.setattr(pack, "BATCH_CHATS", 10)
    monkeypatch.setattr(Encoder, "fastokens", differing)
    monkeypatch.setattr(pack, "bytes_of_tokens", other_bytes)
    out = make(CHATS)
    assert "encodes all chats, from the first" in capsys.readouterr().err
    assert len(calls) == (2 if wrong == "refused" else 1)
    for name in ("packed.parquet", "packing.json"):
        assert (out / name).read_bytes() == (right / name).read_bytes()


def test_the_same_chats_are_encoded_twice_whatever_the_batches(
    tokenizer_folder, monkeypatch
):
    monkeypatch.setattr(fast, "EVERY", 7)
    encoded, found = Encoder.hugging_face, []

    def noting(encoder, texts):
        found[-1].extend(texts)
        return encoded(encoder, texts)

    monkeypatch.setattr(Encoder, "hugging_face", noting)
    for batches in ([0, 1, 2, 30, 31, 50, 120], [0, 120]):
        encoder = pack.ChatEncoder(tokenizer_folder)
        rendered = [encoder.render({"messages": chat}, "messages") for chat in CHATS]
        found.append([])
        for first, last in itertools.pairwise(batches):
            encoder.encode(rendered[first:last])
    assert found[0] == found[1]
    assert {text for text, _spans in rendered[::7]} <= set(found[0])
    assert len(found[0]) < len(CHATS)


def test_one_core_and_two_give_the_same_bytes(tmp_path, tokenizer_folder):
    data = lines(tmp_path / "chat.jsonl", CHATS)
    (tmp_path / "recipe.yaml").write_text("sequence_length: 128")
    found = set()
    for cores in ("1", "2"):
        command = [sys.executable, "-m", "scripts.data.pack", f"--data=chat={data}"]
        command += [f"--tokenizer={tokenizer_folder}", f"--out={tmp_path / cores}"]
        command += [f"--recipe={tmp_path / 'recipe.yaml'}"]
        subprocess.run(
            command, check=True, env={**os.environ, "OMP_NUM_THREADS": cores}
        )
        found.add((tmp_path / cores / "packed.parquet").read_bytes())
    assert len(found) == 1


def test_row_groups_hold_no_more_tokens_for_longer_rows(make, monkeypatch):
    whole = make(CHATS, out="whole")
    monkeypatch.setattr(pack, "GROUP_TOKENS", 300)
    out = make(CHATS)
    metadata = parquet.read_metadata(out / "packed.parquet")
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert set(groups[:-1]) == {2}
    assert rows_of(out) == rows_of(whole)
    assert not list(out.with_name("out.work").glob("chats*"))


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
    order, num_chats = pack.rows_of_chats(np.array(lengths, np.int32), capacity, 0)
    rows = np.split(order, np.cumsum(num_chats)[:-1]) if lengths else []
    assert sorted(order) == list(range(len(lengths)))
    assert all(num_chats)
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


LONG = [user("x" * 20), assistant("y" * 200)]
LONG_USER = [user("x" * 200), assistant("y")]


def test_long_chats_are_dropped_when_asked_counted_and_named(make, capsys, library):
    recipe = "{sequence_length: 128, too_long: drop}"
    out = make([CHATS[0], LONG, CHATS[1], *[LONG_USER] * 5], recipe)
    counts = json.loads((out / "packing.json").read_text())
    assert counts["chats"] == 2
    told = counts["too_long"]
    assert (told["dropped"], told["truncated"]) == (6, 0)
    assert len(told["first"]) == 5
    assert told["first"][0].startswith("chat.jsonl:2: ")
    said = capsys.readouterr().err
    assert "6 of 8 chats are longer than 128 tokens: 0 cut, 6 left out" in said
    assert "chat.jsonl:4: " in said
    kept = make([CHATS[0], CHATS[1]], "sequence_length: 128", "kept")
    assert rows_of(out) == rows_of(kept)


def test_long_chats_are_cut_when_asked_but_not_to_nothing_of_the_assistants(
    make, hugging_face, library
):
    recipe = "{sequence_length: 128, too_long: truncate}"
    out = make([CHATS[0], LONG, LONG_USER], recipe)
    counts = json.loads((out / "packing.json").read_text())
    assert counts["chats"] == 2
    assert (counts["too_long"]["dropped"], counts["too_long"]["truncated"]) == (1, 1)
    ids, mask = max(chats_in(out), key=lambda chat: len(chat[0]))
    ((whole, said),) = of_transformers(hugging_face, [LONG])
    assert ids == whole[:128]
    assert mask == [*said[:127], 0], "the last token of a cut chat predicts nothing"
    assert counts["loss_tokens"] == sum(sum(row["loss_mask"]) for row in rows_of(out))


def test_where_every_chat_is_too_long_nothing_is_written(make, tmp_path):
    with pytest.raises(DataError, match="2 of 2 chats are longer"):
        make([LONG, LONG], "{sequence_length: 8, too_long: drop}")
    assert not (tmp_path / "out" / "packed.parquet").exists()


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
    make, tmp_path, tokenizer_folder, library
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
