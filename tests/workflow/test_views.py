"""What a user looks at: the DAG, the plan, the report, the chat, the README."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflow.conftest import ROOT, Project

README = (ROOT / "README.md").read_text()
FENCED = re.findall(r"(?ms)^```(\w*)\n(.*?)^```", README)
BLOCKS = [text for language, text in FENCED if not language]
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.replace("$ ", "").splitlines()
    if re.match(r"(make|snakemake|python -m|dvc) ", line)
] + re.findall(r"`((?:make|snakemake|dvc|python -m) [^`]+)`", README)


def test_the_dag_is_drawn_with_each_nodes_state(project: Project):
    shutil.rmtree(project.path / "artifacts/export")
    project.edit("config/config.yaml", "lr: 1.0e-5", "lr: 2.0e-5")
    project.sh(
        sys.executable,
        "-m",
        "scripts.lib.plan",
        "--draw",
        "dag.svg",
        "--draw",
        "dag.png",
    )
    svg = (project.path / "dag.svg").read_text()
    assert "reasoner" in svg and "stale" in svg and "current" in svg
    assert (project.path / "dag.png").read_bytes().startswith(b"\x89PNG")


def test_snakemakes_own_dag_and_rulegraph_work(built: Project):
    for flag in ("--dag", "--rulegraph"):
        done = subprocess.run(
            ["snakemake", flag, "--", "export"],
            cwd=built.path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("digraph") and "sft/instruct" in done.stdout


def test_snakemakes_own_report_works(built: Project, tmp_path: Path):
    built.sh("snakemake", "--report", str(tmp_path / "report.html"), "--", "export")
    text = (tmp_path / "report.html").read_text()
    assert "state/eval/sums.json" in text and "Scores on held-out items" in text


def test_dvc_draws_the_same_graph(built: Project):
    text = built.sh("dvc", "dag", "--dot")
    edges = re.findall(r'"([\w-]+)" -> "([\w-]+)"', text)
    assert ("pretrain-base", "sft-instruct") in edges
    assert ("sft-instruct", "grpo-reasoner") in edges


def test_the_report_shows_scores_and_curves_of_each_model(built: Project):
    page = (built.path / "artifacts/report/main/page/report.html").read_text()
    for text in ("pretrain/base", "grpo/reasoner", "export/nano", "95", "loss"):
        assert text in page


def test_the_exported_model_answers_in_the_terminal(built: Project):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat", "artifacts/export/nano/model"],
        cwd=built.path,
        input="1+2=\n/quit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_the_readmes_commands_exist(built: Project, command: str):
    words = command.split()
    if words[0] == "make":
        built.sh("make", "-n", *words[1:])
    elif words[0] == "snakemake":
        built.sh(*words, "--dry-run", "--quiet", "all")
    elif words[0] == "dvc":
        built.sh(*words[:2], "--help")
    else:
        built.sh(sys.executable, *words[1:3], "--help")


def test_the_readmes_table_names_each_stage_and_script():
    from scripts.lib.stages import STAGES

    for stage in STAGES.values():
        script = "/".join(stage.script.split(".")) + ".py"
        assert f"| `{stage.name}` |" in README and f"`{script}`" in README
