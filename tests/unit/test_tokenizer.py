"""The tokenizer stage: the same bytes each time, exact text back, fit for chats."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import transformers

from scripts.data import tokenizer
from scripts.lib.errors import DataError, RecipeError

TEMPLATE = "config/models/tiny/chat_template.jinja"
DOCUMENTS = [f"The sum of {a} and {a * 7 % 100} is what? Größe 🙂" for a in range(200)]
CHATS = [
    [
        {"role": "user", "content": f"Add {a} to this."},
        {"role": "assistant", "content": f"Certainly: {a}"},
    ]
    for a in range(100)
]


def write_lines(path, column, values):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


def flags(tmp_path, out, recipe="vocab_size: 340", template=TEMPLATE, **more):
    (tmp_path / "recipe.yaml").write_text(recipe)
    result = ["--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / out]
    if template:
        result += ["--chat-template", template]
    for name, path in more.items():
        result += ["--tokenizer", path] if name == "ready" else []
        result += ["--data", f"{name}={path}"] if name != "ready" else []
    return list(map(str, result))


@pytest.fixture
def data(tmp_path):
    return {
        "corpus": write_lines(tmp_path / "corpus.jsonl", "text", DOCUMENTS),
        "chat": write_lines(tmp_path / "chat.jsonl", "messages", CHATS),
    }


@pytest.fixture
def trained(tmp_path, data):
    assert tokenizer.main(flags(tmp_path, "trained", **data)) == 0
    return tmp_path / "trained"


def digests(folder):
    return {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


def load(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_training_twice_gives_the_same_bytes(tmp_path, data, trained):
    command = [sys.executable, "-m", "scripts.data.tokenizer"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "0"}
    subprocess.run(
        command + flags(tmp_path, "again", **data), check=True, env=environment
    )
    assert digests(tmp_path / "again") == digests(trained)


def test_special_tokens_have_the_first_ids(trained):
    tok = load(trained)
    assert tok.convert_ids_to_tokens(range(6)) == [
        *("<pad>", "<eos>", "<bos>"),
        *("<|user|>", "<|assistant|>", "<|system|>"),
    ]
    assert (tok.pad_token_id, tok.eos_token_id, tok.bos_token_id) == (0, 1, 2)
    assert len(tok) <= 340


def test_text_comes_back_exactly_and_nothing_is_added(trained):
    tok = load(trained)
    text = "  x = 12+345\r\n\tGrüße 漢字 🙂\x00 <eos>"
    ids = tok(text)["input_ids"]
    assert tok.decode(ids) == text
    assert ids == tok(text, add_special_tokens=False)["input_ids"]


def test_every_digit_is_a_token_of_its_own(trained):
    tok = load(trained)
    tokens = tok.tokenize("The sum of 1234 and 77 is 1311")
    assert [t for t in tokens if any(map(str.isdigit, t))] == list("1234771311")


def test_chat_contents_are_trained_on_too(trained):
    assert "Certainly" in load(trained).get_vocab()


def test_the_tiny_template_masks_what_the_assistant_says(trained):
    tok = load(trained)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": " zwei: 2 ü"},
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4"},
    ]
    found = tok.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    assert tok.decode([i for i, said in pairs if said]) == " zwei: 2 ü<eos>4<eos>"
    assert tok.apply_chat_template(chat, tokenize=False) == (
        "<|system|>Be brief.<|user|>1+1=<|assistant|> zwei: 2 ü<eos>"
        "<|user|>2+2=<|assistant|>4<eos>"
    )
    prompt = tok.apply_chat_template(
        chat[:2], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|system|>Be brief.<|user|>1+1=<|assistant|>"


def test_the_tiny_template_refuses_other_roles(trained):
    chat = [{"role": "narrator", "content": "x"}]
    with pytest.raises(Exception, match="narrator"):
        load(trained).apply_chat_template(chat, tokenize=False)


def test_a_ready_tokenizer_keeps_its_ids_and_gets_the_new_template(tmp_path, trained):
    template = tmp_path / "other.jinja"
    template.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    arguments = flags(tmp_path, "ready", "{}", template, ready=trained)
    assert tokenizer.main(arguments) == 0
    ready = tmp_path / "ready"
    assert digests(ready)["tokenizer.json"] == digests(trained)["tokenizer.json"]
    assert load(ready).chat_template == template.read_text()
    assert load(ready).eos_token_id == 1
    assert str(tmp_path) not in (ready / "tokenizer_config.json").read_text()


def test_a_ready_tokenizer_that_cannot_end_a_document_is_refused(tmp_path, trained):
    config = trained / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["eos_token"]
    config.write_text(json.dumps(settings))
    with pytest.raises(DataError, match="has no eos token"):
        tokenizer.main(flags(tmp_path, "ready", "{}", ready=trained))


def test_a_folder_that_is_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        tokenizer.main(flags(tmp_path, "ready", "{}", ready=tmp_path))


def test_a_recipe_names_exactly_one_tokenizer(tmp_path, data, trained):
    for recipe, more in (("{}", data), ("vocab_size: 340", {"ready": trained})):
        with pytest.raises(RecipeError, match="exactly one of"):
            tokenizer.main(flags(tmp_path, "out", recipe, **more))
    with pytest.raises(RecipeError, match="revision"):
        tokenizer.main(flags(tmp_path, "out", "hf: org/name"))
    with pytest.raises(RecipeError, match="261 is below 262"):
        tokenizer.main(flags(tmp_path, "out", "vocab_size: 261", **data))


def test_a_template_that_marks_nothing_is_refused(tmp_path, data):
    template = tmp_path / "plain.jinja"
    template.write_text("{{ messages[0].content }}")
    with pytest.raises(DataError, match="SFT would not know"):
        tokenizer.main(flags(tmp_path, "out", template=template, **data))
    template.write_text("{% generation %}{{ messages[0].content }")
    with pytest.raises(DataError, match="cannot be rendered"):
        tokenizer.main(flags(tmp_path, "out", template=template, **data))


def test_a_bad_row_stops_training_with_its_name(tmp_path, data):
    with data["corpus"].open("a") as file:
        file.write('{"body": "x"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:201: column `text` is missing"):
        tokenizer.main(flags(tmp_path, "out", **data))
