"""A build on the cluster that a test watches, disturbs and waits for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import yaml

from scripts.lib import slurm
from scripts.lib.store import dump_yaml, load_yaml
from tests.cluster.kit import Cluster
from tests.workflow.conftest import Project

SNAKEMAKE = [
    "snakemake", "--profile", "slurm",
    "--slurm-init-seconds-before-status-checks", "2",
]  # fmt: skip
LONG = 400
"""Steps of a training that is not over before a test has disturbed it."""


class Build:
    """One `snakemake --profile slurm`, running."""

    count = 0
    running: ClassVar[list[Build]] = []

    def __init__(
        self, site: Site, *words: str, env: dict[str, str] | None = None
    ) -> None:
        Build.count += 1
        Build.running.append(self)
        self.site = site
        self.log = site.project.path.with_name(f"controller-{Build.count}.txt")
        with open(self.log, "w") as output:
            self.process = subprocess.Popen(
                [*SNAKEMAKE, *words],
                cwd=site.project.path,
                env={**os.environ, **site.cluster.env, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # xdist's workers ignore it, and so would what they start
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def said(self) -> str:
        return self.log.read_text()

    def until(self, pattern: str, seconds: float = 120) -> re.Match[str]:
        """Wait until the controller has printed this."""

        def look() -> re.Match[str] | None:
            found = re.search(pattern, self.said, re.MULTILINE)
            if found is None and self.process.poll() is not None:
                raise AssertionError(f"ended without {pattern!r}:\n{self.said}")
            return found

        return self.site.cluster.wait(look, seconds)

    def job(self, node: str) -> str:
        """The id of the node's newest Slurm job, once it is submitted."""
        self.until(rf"^{node}  is Slurm job \d+")
        return re.findall(rf"(?m)^{node}  is Slurm job (\d+)", self.said)[-1]

    def at_step(self, node: str, step: int = 1) -> str:
        """Wait until the node has trained that far; its job's id."""
        self.site.cluster.wait(lambda: self.step(node) >= step, 120)
        return self.job(node)

    def step(self, node: str) -> int:
        stage, name = node.split("/")
        found = sorted(
            self.site.project.path.glob(f"work/{stage}/{name}-*/progress.json"),
            key=os.path.getmtime,
        )
        if self.process.poll() is not None:
            raise AssertionError(f"ended before:\n{self.said}")
        began = f"{node}  starts" in self.said or f"{node}  resumes" in self.said
        return json.loads(found[-1].read_text())["step"] if found and began else 0

    def end(self, seconds: float = 240) -> int:
        """Wait until the controller ends; its exit code."""
        self.site.cluster.wait(lambda: self.process.poll() is not None, seconds)
        return self.process.returncode

    def done(self, seconds: float = 240) -> set[str]:
        """Wait for a good end; the nodes it built."""
        assert self.end(seconds) == 0, self.said
        return set(re.findall(r"(?m)^(\w+/\w+)  done in", self.said))

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


def end_all() -> None:
    """Kill the controllers that a failed test left."""
    while Build.running:
        build = Build.running.pop()
        if build.process.poll() is None:
            build.kill()


class Site:
    """A project on a cluster."""

    def __init__(self, project: Project, cluster: Cluster) -> None:
        self.project, self.cluster = project, cluster

    def build(self, *words: str, **env: str) -> Build:
        return Build(self, *words, env=env)

    def change(self, file: str, **sections: Any) -> None:
        """Merge settings into one of the project's YAML files."""
        path = self.project.path / file
        content = yaml.safe_load(path.read_text())
        merge(content, sections)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def place(self, stage: str, **settings: Any) -> None:
        self.change("slurm/cluster.yaml", placement={stage: {"default": settings}})

    def train(self, steps: int = LONG, **settings: Any) -> None:
        """Make the pretraining of other length, so that it is not current."""
        self.change("config/config.yaml", pretrain={"base": {"steps": steps}})
        self.place("pretrain", save_steps=50, **settings)

    def submitted(self) -> list[str]:
        """The nodes of this project's jobs that Slurm remembers, oldest first."""
        ours = slurm.job_name(self.project.path)
        rows = [j for j in self.cluster.jobs() if j["name"] == ours]
        rows.sort(key=lambda job: int(job["id"]))
        return [j["comment"].removeprefix("rule_") for j in rows]

    def weights(self, node: str) -> bytes:
        folder = self.project.path / "artifacts" / node
        return (folder / "model/model.safetensors").read_bytes()

    def losses(self, node: str) -> list[float]:
        file = self.project.path / "artifacts" / node / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in file.read_text().splitlines()]

    def saves(self, node: str) -> list[int]:
        stage, name = node.split("/")
        found = self.project.path.glob(f"work/{stage}/{name}-*/checkpoint-*")
        return sorted(int(p.name.rpartition("-")[2]) for p in found)


def merge(into: dict[str, Any], what: dict[str, Any]) -> None:
    for key, value in what.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            merge(into[key], value)
        else:
            into[key] = value


def wrapper(folder: Path, name: str, script: str) -> str:
    """A command put before the real one of this name; the PATH to use."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def forget(site: Site, node: str) -> None:
    """Have a node built anew: no record, no cached run, no artifact, no work."""
    lock = site.project.path / "dvc.lock"
    content = load_yaml(lock)
    del content["stages"][node.replace("/", "-")]
    lock.write_text(dump_yaml(content))
    shutil.rmtree(site.project.path / ".dvc/cache/runs")
    for folder in (f"artifacts/{node}", "work"):
        shutil.rmtree(site.project.path / folder)
