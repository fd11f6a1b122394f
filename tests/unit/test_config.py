"""Mistakes in a config are found before anything runs, with the place and the way out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.lib import graph
from scripts.lib.errors import UserError
from scripts.lib.load import ConfigError, load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's definitions, as the working folder."""
    for name in ("config", "envs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(old: str, new: str) -> None:
    path = Path("config/config.yaml")
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, 1))


def message() -> str:
    with pytest.raises(UserError) as caught:
        graph.build(Path("config/config.yaml"))
    return str(caught.value)


def overlay(text: str) -> Path:
    path = Path("config/top.yaml")
    path.write_text(f"extends: config.yaml\n{text}")
    return path


def test_the_default_config_is_valid(folder: Path):
    assert "grpo/reasoner" in graph.build(Path("config/config.yaml")).nodes


def test_yaml_that_does_not_parse_is_named_by_line(folder: Path):
    edit("tokenizer:\n", "tokenizer: [\n")
    assert "config/config.yaml:" in message() and "not YAML" in message()


def test_an_unknown_key_gets_the_nearest_as_a_hint(folder: Path):
    edit("from: base", "form: base")
    text = message()
    assert "sft.instruct.form: unknown key" in text
    assert "did you mean `from`?" in text
    assert "config/config.yaml:" in text


def test_an_unknown_section_gets_the_nearest_as_a_hint(folder: Path):
    edit("tokenizer:\n", "tokeniser:\n")
    assert "did you mean `tokenizer`?" in message()


def test_a_missing_key_is_named(folder: Path):
    edit("from: base\n", "\n")
    assert "sft.instruct.from: missing" in message()


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("steps: ", "steps: many #", "pretrain.base.steps"),
        ("steps: ", "steps: 1.5 #", "pretrain.base.steps"),
        ("steps: ", "steps: -1 #", "pretrain.base.steps"),
        ("from: base", "from: 7", "sft.instruct.from"),
        ("  nano:", "  Nano!:", "export"),
    ],
)
def test_a_wrong_type_is_named_with_what_was_found(folder: Path, old, new, key):
    edit(old, new)
    assert (key in message() and "found" in message()) or "cannot name" in message()


def test_a_parent_that_does_not_exist_gets_the_nearest(folder: Path):
    edit("from: instruct", "from: instrukt")
    text = message()
    assert "grpo.reasoner.from: no such node: instrukt" in text
    assert "did you mean `instruct`?" in text


def test_a_cycle_is_shown_whole(folder: Path):
    edit("from: base", "from: reasoner")
    assert "a cycle: " in message()
    assert "grpo/reasoner" in message() and "sft/instruct" in message()


def test_two_nodes_with_one_name_are_refused(folder: Path):
    edit("export:\n", "export:\n  instruct: {from: base}\n")
    assert "two nodes with one name: sft/instruct and export/instruct" in message()


def test_a_key_given_twice_is_refused(folder: Path):
    edit("export:\n", "export:\n  nano: {from: base}\n")
    assert "two nodes or keys with one name" in message()


def test_a_missing_and_an_empty_file_are_named(folder: Path):
    edit("tokenizer:\n", "data:\n  own: {files: data/own.jsonl}\ntokenizer:\n")
    edit("    data: corpus\n", "    data: [corpus, own]\n")
    assert "data/own.jsonl: no such file" in message()
    Path("data").mkdir()
    Path("data/own.jsonl").touch()
    assert "data/own.jsonl is empty" in message()


def test_a_glob_without_a_match_is_refused(folder: Path):
    edit("tokenizer:\n", "data:\n  own: {files: data/*.jsonl}\ntokenizer:\n")
    edit("    data: corpus\n", "    data: [corpus, own]\n")
    assert "data/*.jsonl: no file matches" in message()


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.jsonl", "data/../../x"])
def test_a_path_that_leaves_the_project_is_refused(folder: Path, path: str):
    edit("tokenizer:\n", f"data:\n  own: {{files: {path}}}\ntokenizer:\n")
    edit("    data: corpus\n", "    data: [corpus, own]\n")
    assert "leads out of the project" in message()


def test_a_hub_dataset_without_a_revision_is_refused(folder: Path):
    edit("tokenizer:\n", "data:\n  own: {hf: org/name}\ntokenizer:\n")
    edit("    data: corpus\n", "    data: [corpus, own]\n")
    assert "data.own.revision: missing" in message()


def test_a_row_longer_than_the_model_is_refused(folder: Path):
    edit("sequence_length: 256", "sequence_length: 1000000")
    assert "the model's longest is" in message()


def test_a_vocabulary_larger_than_the_model_is_refused(folder: Path):
    edit("vocab_size: 512", "vocab_size: 100000")
    assert "has 100000 entries, the model only" in message()


def test_completions_that_do_not_divide_into_groups_are_refused(folder: Path):
    edit("num_generations: ", "num_generations: 7 #")
    assert "do not divide into groups" in message() and "hint: try" in message()


def test_two_tokenizers_in_one_chain_are_refused(folder: Path):
    edit(
        "tokenizer:\n",
        "tokenizer:\n  other:\n    data: corpus\n    vocab_size: 300\n"
        "    chat_template: config/models/tiny/chat_template.jinja\n",
    )
    edit("chat: {tokenizer: tiny", "chat: {tokenizer: other")
    assert "use one tokenizer along a chain" in message()


def test_data_of_the_wrong_kind_is_refused(folder: Path):
    edit(
        "corpus: {tokenizer: tiny, data: corpus}",
        "corpus: {tokenizer: tiny, data: chat}",
    )
    assert "chat holds chats, not documents" in message()


def test_placement_of_an_unknown_node_and_key_is_refused(folder: Path):
    edit("  sft: {default: {cpus: 2}}", "  sft: {instrukt: {cpus: 2}}")
    assert "did you mean `instruct`?" in message()
    edit("instrukt: {cpus", "instruct: {cpu")
    assert "did you mean `cpus`?" in message()


def test_an_overlay_changes_what_it_names_and_null_deletes(folder: Path):
    top = overlay("sft: {instruct: {steps: 3, warmup_steps: null}}\nreport: null\n")
    config, lines, files = load_config(top)
    assert config.sft["instruct"].steps == 3
    assert config.sft["instruct"].warmup_steps == 0
    assert config.report == {}
    assert lines.where("sft", "instruct", "steps") == (
        "config/top.yaml:2 sft.instruct.steps"
    )
    assert [f.name for f in files] == ["top.yaml", "config.yaml"]


def test_an_overlay_of_itself_is_refused(folder: Path):
    Path("config/config.yaml").write_text("extends: config.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(Path("config/config.yaml"))


def test_training_waits_for_all_data_of_its_descendants(folder: Path):
    whole = graph.build(Path("config/config.yaml"))
    assert {"pack/chat", "prompts/arithmetic"} <= set(whole.before("pretrain/base"))
    assert "sft/instruct" not in whole.before("pretrain/base")


def test_a_graph_survives_json(folder: Path):
    whole = graph.build(Path("config/config.yaml"))
    assert graph.Graph.from_json(whole.to_json()).nodes == whole.nodes


@pytest.mark.parametrize(
    "text",
    [
        "placement: {sft: {instruct: 4}}",
        "placement: {sft: {instruct: {cpus: '4'}}}",
        "placement: {default: {default: {memory_gb: .inf}}}",
        "sft: {instruct: 3}",
        "sft: [instruct]",
        "tokenize: {corpus: {data: {corpus: null}}}",
        "data: {own: {files: 'data/**.jsonl'}}\ntokenizer: {tiny: {data: own}}",
        "data: {own: {files: state/x.jsonl}}\ntokenizer: {tiny: {data: own}}",
        "pretrain: {base: {lr: .inf}}",
        "tokenizer: {tiny: {chat_template: config}}",
    ],
)
def test_odd_forms_are_refused_without_a_traceback(folder: Path, text: str):
    with pytest.raises(UserError):
        graph.build(overlay(text + "\n"))


def test_an_empty_section_or_node_has_its_defaults(folder: Path):
    edit("report:\n  main: {title: A tiny hybrid learns to add}", "report: {main: }")
    assert "report/main" in graph.build(Path("config/config.yaml")).nodes


def test_a_config_outside_the_project_is_not_read(folder: Path):
    Path("config/top.yaml").write_text("extends: /etc/passwd\n")
    with pytest.raises(ConfigError, match="outside of the project"):
        load_config(Path("config/top.yaml"))


def test_data_that_dvc_tracks_counts_whether_pulled_or_not(folder: Path):
    Path("data").mkdir()
    Path("data/a.jsonl").write_text('{"text": "one"}\n')
    for name in ("a", "b"):
        Path(f"data/{name}.jsonl.dvc").write_text("outs: [{md5: x, path: x}]\n")
    top = overlay(
        'data: {own: {files: "data/*.jsonl"}}\ntokenize: {corpus: {data: own}}\n'
    )
    files = graph.build(top).nodes["tokenize/corpus"].files
    assert files == ("data/a.jsonl", "data/b.jsonl")
