"""What a real cluster could not run is refused before anything is submitted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.kit import Cluster, ClusterError
from tests.workflow.conftest import Project, make_project

SLURM = {"sacctmgr", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun"}
DOCTOR = [sys.executable, "-m", "scripts.lib.doctor"]
PREFLIGHT = [
    sys.executable,
    "-c",
    "from pathlib import Path; from scripts.lib import doctor, graph;"
    "from scripts.lib.store import Store;"
    "store = Store(graph.build(Path('config/config.yaml'), doctor.CLUSTER));"
    "store.read(); store.settle(keep=False, write=False); doctor.preflight(store)",
]
SNAKEMAKE = ["snakemake", "--profile", "slurm", "export"]


class Patient:
    """A project of which nothing is built, and the cluster it is to be built on."""

    def __init__(self, project: Project, cluster: Cluster) -> None:
        self.project, self.cluster = project, cluster
        self.file = project.path / "slurm/cluster.yaml"

    def describe(self, placement: str, top: str = "") -> None:
        light = "  report: {default: {controller: true}}\n"
        self.file.write_text(f"{top}placement:\n{light}{placement}")

    def run(self, *words: str, ends: int) -> str:
        text = self.project.sh(*words, check=False, **self.cluster.env)
        assert self.project.code == ends, text
        return text

    def submitted(self) -> list[str]:
        """Ids of all jobs there were, but those of the doctor itself."""
        return [j["id"] for j in self.cluster.jobs() if "doctor" not in j["name"]]

    def waiting(self) -> str:
        return self.cluster.run("squeue", "--noheader").strip()


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return make_project(tmp_path_factory.mktemp("doctor") / "project")


@pytest.fixture
def patient(unbuilt: Project, cluster: Cluster) -> Patient:
    found = Patient(unbuilt, cluster)
    found.describe("")
    (unbuilt.path / "state/doctor.json").unlink(missing_ok=True)
    return found


def test_a_good_cluster_is_well_and_no_job_is_left(patient: Patient):
    text = patient.run(*DOCTOR, ends=0)
    assert "n1 of partition gpu has this folder, its Python and its locks" in text
    assert "FAIL" not in text and "warn" not in text
    assert text.splitlines()[-1].endswith("0 wrong: a run can start")
    assert not patient.waiting()


@pytest.mark.parametrize(
    ("placement", "found", "hint"),
    [
        ("sft: {default: {partition: gup}}", "3 placement.sft.default.partition: no such partition: gup", "did you mean `gpu`? there are: gpu, cancel, high, short"),
        ("sft: {default: {constraint: hopper}}", "3 placement.sft.default.constraint: no machine has hopper", "there are: none"),
        ("sft: {instruct: {gpus: 8, cpus: 8, gres: 'gpu:h100'}}", "3 placement.sft.instruct.gres: no machine of partition gpu has gpu:h100", "did you mean `gpu:h200`?"),
        ("grpo: {default: {gpus: 9}}", "3 placement.grpo.default.gpus: 9, but a machine of partition gpu has 8", "gpus: 8"),
        ("grpo: {default: {cpus: 9}}", "3 placement.grpo.default.cpus: 9, but a machine of partition gpu has 8", "cpus: 8"),
        ("grpo: {default: {memory_gb: 8.5}}", "3 placement.grpo.default.memory_gb: 8.5, but a machine of partition gpu has 8", "memory_gb: 8"),
        ("sft: {default: {nodes: 4}}", "3 placement.sft.default.nodes: 4, but partition gpu has 2 machines", "nodes: 2"),
        ("sft: {default: {partition: short}}", "placement.default.default.minutes: 30, but partition short ends jobs after 5", "minutes: 5; training goes on in further jobs"),
        ("sft: {default: {minutes: 1441}}", "3 placement.sft.default.minutes: 1441, but partition gpu ends jobs after 1440", "minutes: 1440"),
    ],
)  # fmt: skip
def test_what_the_cluster_lacks_is_named_with_line_and_hint(
    patient: Patient, placement: str, found: str, hint: str
):
    before = patient.submitted()
    patient.describe(f"  {placement}\n")
    text = patient.run(*DOCTOR, ends=1)
    (wrong,) = re.findall(r"(?m)^FAIL (.*)\n     hint: (.*)$", text)
    assert found in wrong[0] and hint in wrong[1]
    assert "a run would fail" in text.splitlines()[-1]
    assert patient.submitted() == before


def test_slurm_refuses_it_too(patient: Patient):
    for words in (
        ["--partition=gup"],
        ["--constraint=hopper"],
        ["--gres=gpu:h100:8"],
        ["--gres=gpu:9"],
        ["--cpus-per-task=9"],
        ["--mem=8500"],
    ):
        with pytest.raises(ClusterError, match=r"[Ii]nvalid|not available"):
            patient.cluster.submit(*words, "--output=/dev/null", "--wrap=true")


def test_a_run_is_refused_with_all_mistakes_before_it_submits(patient: Patient):
    before = patient.submitted()
    patient.describe(
        "  sft: {default: {partition: gup}}\n  grpo: {default: {gpus: 9, cpus: 9}}\n"
    )
    text = patient.run(*SNAKEMAKE, ends=1)
    file = "slurm/cluster.yaml"
    assert f"error: {file}:3 placement.sft.default.partition: no such" in text
    assert "hint: did you mean `gpu`?" in text
    assert f"\n{file}:4 placement.grpo.default.cpus: 9, but a machine" in text
    assert patient.submitted() == before and not patient.waiting()


def test_a_machine_without_the_folder_stops_a_run(patient: Patient):
    before = patient.submitted()
    for name in patient.cluster.nodes:
        patient.cluster.hide(name, patient.project.path)
    text = patient.run(*SNAKEMAKE, ends=1)
    assert (
        f"n1 of partition gpu does not have this folder, {patient.project.path}" in text
    )
    assert "hint: keep the project where all machines see it" in text
    assert patient.submitted() == before and not patient.waiting()


def test_a_machine_without_the_interpreter_is_found(patient: Patient):
    patient.cluster.hide("n1", Path(sys.prefix))
    text = patient.run(*DOCTOR, ends=1)
    assert f"n1 of partition gpu does not have {sys.executable}" in text


def test_a_file_system_that_shares_no_locks_is_found(patient: Patient, tmp_path: Path):
    layers = [tmp_path / name for name in ("upper", "work")]
    for layer in layers:
        layer.mkdir()
    folder = patient.project.path
    options = f"lowerdir={folder},upperdir={layers[0]},workdir={layers[1]}"
    # a file opened for writing there is another file than here
    patient.cluster.on(
        "n1", "mount", "-t", "overlay", "hidden", "-o", options, str(folder)
    )
    text = patient.run(*DOCTOR, ends=1)
    assert "n1 of partition gpu does not see the file locks held here" in text
    assert "`flock`, not `localflock`" in text


def test_containers_are_looked_for_where_jobs_run(patient: Patient):
    patient.describe("", "container: {runtime: apptainer, image: images/none.sif}\n")
    text = patient.run(*DOCTOR, ends=1)
    assert (
        ":1 container.image: n1 of partition gpu does not have images/none.sif" in text
    )
    patient.describe("", "container: {runtime: pyxis, image: images/none.sqsh}\n")
    text = patient.run(*DOCTOR, ends=1)
    assert ":1 container.runtime: pyxis, but srun has no --container-image" in text


def test_looking_preempts_nobody_and_leaves_nothing(patient: Patient):
    job = patient.cluster.submit(
        "--nodes=2",
        "--exclusive",
        "--mem=0",
        "--partition=gpu",
        "--output=/dev/null",
        "--wrap=sleep 300",
    )
    patient.cluster.wait_state(job, "RUNNING")
    patient.describe("  default: {default: {partition: high}}\n")
    text = patient.run(*DOCTOR, ends=0)
    assert "no machine of partition high was looked at: none is idle" in text
    assert patient.cluster.job(job)["Restarts"] == "0"
    assert patient.waiting().split()[0] == job and "\n" not in patient.waiting()


def test_a_partition_is_looked_at_once_until_the_file_changes(patient: Patient):
    def looks() -> int:
        patient.run(*PREFLIGHT, ends=0)
        return sum("doctor" in job["name"] for job in patient.cluster.jobs())

    first = looks()
    assert looks() == first, "remembered"
    known = patient.project.path / "state/doctor.json"
    assert list(json.loads(known.read_text())) == ["gpu"]
    patient.file.write_text(patient.file.read_text() + "# changed\n")
    assert looks() == first + 1


def test_a_slurm_that_is_silent_is_no_mistake_of_the_users(patient: Patient):
    patient.cluster.stop_controller()
    text = patient.run(*DOCTOR, ends=1)
    assert "FAIL Slurm: " in text and "Unable to contact slurm controller" in text
    text = patient.run(*PREFLIGHT, ends=0)
    assert text.startswith("[doctor] Slurm: ") and "was not checked" in text
    assert len(text.splitlines()) == 1


def test_without_slurm_a_run_says_so(patient: Patient, tmp_path: Path):
    for folder in ("/bin", "/usr/bin"):
        for tool in Path(folder).iterdir():
            link = tmp_path / tool.name
            if tool.name not in SLURM and not link.is_symlink():
                link.symlink_to(tool)
    path = f"{Path(sys.executable).parent}{os.pathsep}{tmp_path}"
    done = subprocess.run(
        [Path(sys.executable).parent / SNAKEMAKE[0], *SNAKEMAKE[1:]],
        cwd=patient.project.path,
        env={**os.environ, "PATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 1
    assert "error: sinfo: not found: no Slurm on this machine" in done.stderr
    assert "hint: run this on a login node, or build here" in done.stderr


def test_the_status_shows_real_jobs(patient: Patient):
    name = patient.run(
        sys.executable, "-c", "from scripts.lib import slurm; print(slurm.job_name())",
        ends=0,
    ).strip()  # fmt: skip
    words = [
        f"--job-name={name}",
        "--exclusive",
        "--nodes=2",
        "--output=/dev/null",
        "--wrap=sleep 300",
    ]
    job = patient.cluster.submit("--comment=rule_tokenizer/tiny", *words)
    patient.cluster.wait_state(job, "RUNNING")
    waits = patient.cluster.submit("--comment=rule_pack/chat", *words)
    patient.cluster.wait(lambda: "(Resources)" in patient.waiting())
    text = patient.run(sys.executable, "-m", "scripts.lib.status", ends=0)
    assert re.search(
        rf"(?m)^tokenizer/tiny +{job} +n\[1-2\] +running +0:\d\d of 1-00:00:00$", text
    )
    assert re.search(rf"(?m)^pack/chat +{waits} +pending: Resources +0:00 of", text)
    assert text.splitlines()[-1] == "1 running, 1 pending, 8 waiting"
    patient.cluster.run("scancel", job)
    patient.cluster.wait_state(job, "CANCELLED")
    text = patient.run(sys.executable, "-m", "scripts.lib.status", "--json", ends=0)
    rows = {row["node"]: row for row in json.loads(text)["nodes"]}
    assert rows["tokenizer/tiny"]["state"] == "cancelled"
