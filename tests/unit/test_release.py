"""What an export is served with, and what is told of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts import release
from scripts.lib import graph, hub, run, serving
from scripts.lib.errors import RecipeError, UserError
from scripts.lib.graph import Graph
from scripts.lib.schema import Generation, ReleaseRecipe

ROOT = Path(__file__).parents[2]
REVISION = "0123456789abcdef0123456789abcdef01234567"
FROM = f"{{hf: org/small, revision: {REVISION}"
CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "<|user|>\n{% endfor %}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a plan reads."""
    for name in ("config", "envs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def planned(text: str = "") -> Graph:
    """The graph of the default config with an overlay."""
    Path("mine/top.yaml").write_text(f"extends: ../config/config.yaml\n{text}")
    return graph.build(Path("mine/top.yaml"))


def changed(before: Graph, after: Graph) -> set[str]:
    return {
        id
        for id, node in after.nodes.items()
        if (n := before.nodes.get(id)) is None or n.params != node.params
    }


# ---- what an export is served with -------------------------------------------------


@pytest.fixture
def exported(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A folder as a trainer leaves it, without weights."""
    place = tmp_path / "exported"
    shutil.copytree(tokenizer_folder, place)
    shutil.copy(ROOT / "config/models/tiny/config.json", place)
    (place / "generation_config.json").write_text('{"eos_token_id": 1}')
    return place


def generation_of(place: Path, **wanted: Any) -> dict[str, Any]:
    serving.complete(place, Generation(**wanted) if wanted else None)
    found: dict[str, Any] = json.loads((place / "generation_config.json").read_text())
    return found


def test_an_answer_ends_with_the_chats_end_token_too(exported: Path):
    assert generation_of(exported)["eos_token_id"] == 1
    (exported / "chat_template.jinja").write_text(CHATML)
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(exported)
    end = words.convert_tokens_to_ids("<|user|>")
    assert generation_of(exported)["eos_token_id"] == [end, 1]


def test_sampling_is_what_the_config_says_and_greedy_without(exported: Path):
    assert not generation_of(exported).get("do_sample")
    found = generation_of(exported, temperature=0.7, top_p=0.9, max_new_tokens=12)
    assert found["do_sample"] is True
    assert (found["temperature"], found["top_p"]) == (0.7, 0.9)
    assert found["max_new_tokens"] == 12


def test_the_tokenizer_knows_the_models_context_length(exported: Path):
    serving.complete(exported, None)
    words = json.loads((exported / "tokenizer_config.json").read_text())
    assert words["model_max_length"] == 512


@pytest.mark.parametrize("name", ["tiny", "nano3_small", "qwen3_small"])
def test_a_config_has_the_released_form_and_means_the_same(name: str, tmp_path: Path):
    from transformers import AutoConfig

    before = AutoConfig.from_pretrained(ROOT / "config/models" / name)
    before.save_pretrained(tmp_path)
    told = serving.as_released(serving.read(tmp_path / "config.json"))
    serving.write(tmp_path / "config.json", told)
    after = AutoConfig.from_pretrained(tmp_path)
    same = {"_name_or_path": ""}
    assert after.to_dict() | same == before.to_dict() | same
    if name != "qwen3_small":  # what vLLM 0.20 reads, and Transformers 5.8
        given = serving.read(ROOT / "config/models" / name / "config.json")
        assert told["hybrid_override_pattern"] == given["hybrid_override_pattern"]
        assert told["num_hidden_layers"] == len(told["hybrid_override_pattern"])
        assert "layers_block_type" not in told


# ---- what is told, and what that reruns --------------------------------------------


DATA = "data: {own: {files: mine/chat.jsonl%s}}\npack: {chat: {data: own}}\n"


def test_what_is_told_of_data_reruns_the_release_only(folder: Path):
    Path("mine/chat.jsonl").write_text("{}\n")
    before = planned(DATA % "")
    after = planned(DATA % ", license: MIT, url: 'https://a.b', description: Mine")
    assert changed(before, after) == {"release/nano"}
    assert after.nodes["release/nano"].recipe["sources"]["own"]["license"] == "MIT"
    assert changed(after, planned("release: {nano: {license: mit}}\n")) >= {
        "release/nano"
    }


def test_what_is_told_of_a_base_reruns_the_release_only(folder: Path):
    text = f"""
tokenizer: {{ready: {{hf: org/small, revision: {REVISION}}}}}
pack: {{chat: {{tokenizer: ready}}}}
prompts: {{arithmetic: {{tokenizer: ready}}}}
sft: {{instruct: {{from: {FROM}%s}}}}}}
"""
    before, after = planned(text % ""), planned(text % ", license: MIT")
    assert changed(before, after) == {"release/nano"}
    base = after.nodes["release/nano"].recipe["base"]
    assert base == {"hf": "org/small", "revision": REVISION, "license": "MIT"}
    assert ReleaseRecipe.model_validate(after.nodes["release/nano"].recipe).base


def test_generation_settings_rerun_the_export_but_nothing_trained(folder: Path):
    after = planned("export: {nano: {generation: {temperature: 0.7}}}\n")
    assert changed(planned(), after) == {"export/nano"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("release: {nano: {license: My own}}", "nano.license: 'My own' is no name"),
        ("release: {nano: {license: My own}}", "license_link says where"),
        ("release: {nano: {license_link: 'https://a.b'}}", "license: missing, with"),
        ("release: {nano: {language: English}}", "release.nano.language"),
        ("release: {nano: {from: nana}}", "no such node: nana (of export)"),
        ("release: {nano: {sources: {}}}", "release.nano.sources: unknown key"),
        ("export: {nano: {generation: {temperature: 0.0}}}", "generation.temperature"),
        ("export: {nano: {generation: {top_q: 0.5}}}", "did you mean `top_p`?"),
    ],
)
def test_mistakes_in_what_is_told_are_named(text: str, said: str, folder: Path):
    with pytest.raises(UserError) as error:
        planned(text)
    assert said in str(error.value)


def test_pickled_weights_are_not_released(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/pytorch_model.bin").write_text("")
    with pytest.raises(RecipeError, match="runs code as it is loaded"):
        release.place_files(tmp_path / "model", tmp_path / "out")


def test_of_what_best_did_not_take_the_card_tells_no_training():
    def row(node: str, *above: str, content: str) -> dict[str, Any]:
        inputs = {f"artifacts/{a}/model": a.upper() for a in above}
        return {"node": node, "inputs": inputs, "outs": {"model": content}}

    rows = [
        row("sft/a", content="SFT/A"),
        row("sft/b", content="SFT/B"),
        row("eval/all", "sft/a", "sft/b", content="EVAL/ALL"),
        row("best/one", "sft/a", "sft/b", "eval/all", content="SFT/B"),
        row("export/nano", "best/one", content=""),
    ]
    taken = [found["node"] for found in release.chosen(rows)]
    assert taken == ["sft/b", "best/one", "export/nano"]


# ---- a parent on the hub -----------------------------------------------------------


@pytest.fixture
def snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the hub with one model, and no way to the hub."""
    from huggingface_hub import constants

    place = folder / "hub/models--org--small/snapshots" / REVISION
    place.mkdir(parents=True)
    for name in hub.NEEDED:
        (place / name.replace("*", "model")).write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    hub.fetch.cache_clear()
    yield place
    hub.fetch.cache_clear()


HUB = f"""
tokenizer: {{ready: {{hf: org/small, revision: {REVISION}}}}}
pack: {{chat: {{tokenizer: ready}}}}
prompts: {{arithmetic: {{tokenizer: ready}}}}
preferences: {{pairs: {{tokenizer: ready, data: opinions, max_tokens: 32}}}}
generate: {{opinions: {{kind: preferences, count: 9}}}}
sft: {{instruct: {{from: {FROM}}}}}}}
dpo: {{a: {{from: {FROM}}}, data: pairs, steps: 9, batch_size: 8, lr: 1.0e-3}}}}
rm: {{b: {{from: {FROM}}}, data: pairs, steps: 9, batch_size: 8, lr: 1.0e-3}}}}
grpo: {{reasoner: {{from: {FROM}}}}}}}
"""


def test_every_trainer_starts_from_a_model_on_the_hub(snapshot: Path):
    nodes = planned(HUB).nodes
    for id in ("sft/instruct", "dpo/a", "rm/b", "grpo/reasoner"):
        assert nodes[id].recipe["parent"] == {"hf": "org/small", "revision": REVISION}
        assert ("--parent", str(snapshot)) in run.with_parent(nodes[id])
        assert run.parent_of(nodes[id]) == snapshot


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (f"org/small@{40 * 'f'}", f"revision {40 * 'f'} is not in the hub's cache"),
        (f"org/other@{REVISION}", "hf download org/other --revision"),
    ],
)
def test_a_revision_that_cannot_be_had_is_named(name: str, said: str, snapshot: Path):
    with pytest.raises(UserError) as error:
        hub.fetch(f"hf:{name}")
    assert said in str(error.value)


def test_a_model_on_the_hub_must_be_whole_and_no_adapter(snapshot: Path):
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        hub.fetch(f"hf:org/small@{REVISION}")
    (snapshot / hub.ADAPTER).write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        hub.fetch(f"hf:org/small@{REVISION}")
