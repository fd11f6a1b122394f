"""What `logging:` and `keep:` may say, and that neither makes a node stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.lib import graph, tracking
from scripts.lib.errors import UserError
from scripts.lib.workflow import Workflow

ROOT = Path(__file__).parents[2]
CONFIG = Path("config/config.yaml")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the project's definitions."""
    for name in ("config", "envs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)


def built(text: str) -> graph.Graph:
    """The graph of the default config under an overlay."""
    CONFIG.with_name("top.yaml").write_text(f"extends: config.yaml\n{text}")
    return graph.build(CONFIG.with_name("top.yaml"))


def refused(text: str) -> str:
    with pytest.raises(UserError) as error:
        built(text)
    return str(error.value)


def test_logging_and_keeping_are_no_identity(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tracking, "has", lambda package: True)
    text = "logging: {wandb: {project: nano}}\n"
    text += "generate: {corpus: {keep: true}}\nsft: {instruct: {keep: true}}\n"
    with_both, without = built(text).nodes, graph.build(CONFIG).nodes
    assert with_both["sft/instruct"].keep and with_both["generate/corpus"].keep
    assert with_both["sft/instruct"].logging == {"wandb": {"project": "nano"}}
    assert not with_both["pack/chat"].logging and not with_both["pack/chat"].keep
    for id, node in without.items():
        assert with_both[id].params == node.params


def test_what_is_not_installed_is_an_error_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
):
    text = "logging: {wandb: {project: nano}}"
    monkeypatch.setattr(tracking, "has", lambda package: False)
    whole = built(text)  # what is current needs no package
    flow = Workflow(SimpleNamespace(graph=whole))  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        flow.check_logging(whole.nodes["sft/instruct"].logging)
    said = str(error.value)
    assert ":2 logging.wandb: " in said and "has no wandb" in said
    assert "pip install wandb" in said
    flow.check_logging(whole.nodes["pack/chat"].logging)
    assert built("").nodes["sft/instruct"].logging == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wandb: {project: nano, api_key: x}", "logging.wandb.api_key: unknown key"),
        ("wandb: {}", "logging.wandb.project"),
        ("mlflow: {experiment: nano}", "logging.mlflow.tracking_uri"),
        ("mlflow: {experiment: n, tracking_uri: 'https://me:key@host'}", "tracking_uri"),
        ("tensorbord: true", "did you mean `tensorboard`?"),
    ],
)  # fmt: skip
def test_a_key_of_logging_that_is_wrong_is_named(text: str, said: str):
    assert said in refused(f"logging: {{{text}}}")


def test_a_script_says_at_once_that_a_key_or_a_package_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    told = tmp_path / "logging.json"
    told.write_text(json.dumps({"wandb": {"project": "nano"}, "tensorboard": False}))
    for name in tracking.WANDB_KEYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(tracking, "has", lambda package: True)
    with pytest.raises(UserError, match="no WANDB_API_KEY"):
        tracking.read(str(told))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.read(str(told))["wandb"] == {"project": "nano"}
    monkeypatch.setattr(tracking, "has", lambda package: False)
    with pytest.raises(UserError, match="has no wandb"):
        tracking.read(str(told))
