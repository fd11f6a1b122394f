"""What Slurm could not run is named before anything is submitted, at its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scripts.lib import doctor, graph, slurm
from scripts.lib.doctor import FAIL, OK, WARN, Found, Places, Slurm
from tests.unit.test_slurm import ASSOCIATIONS, SETTINGS, SINFO

CONFIG = Path("config/config.yaml")


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch):
    said = {"sinfo": SINFO, "scontrol": SETTINGS, "sacctmgr": ASSOCIATIONS}
    monkeypatch.setattr(slurm, "ask", lambda *words: said[words[0]])
    monkeypatch.setattr(doctor, "user", lambda: "ada")


def asked(tmp_path: Path, placement: str, top: str = "") -> list[Found]:
    """What is found wrong with a cluster's file of these lines."""
    file = tmp_path / "cluster.yaml"
    file.write_text(f"{top}placement:\n{placement}")
    nodes = doctor.jobs_of(graph.build(CONFIG, file).nodes.values())
    return doctor.check_requests(nodes, Places(CONFIG, file), Slurm.asked())


@pytest.mark.parametrize(
    ("placement", "said", "hint"),
    [
        ("sft: {default: {partition: gup}}", ":2 placement.sft.default.partition: no such partition: gup", "did you mean `gpu`? there are: gpu, debug, long"),
        ("default: {default: {partition: debug}}", ":2 placement.default.default.partition: partition debug is down", "another: gpu, long"),
        ("sft: {default: {account: reserch}}", ":2 placement.sft.default.account: ada has no account reserch for partition gpu", "did you mean `research`?"),
        ("sft: {default: {account: teaching}}", "ada has no account teaching for partition gpu", "there are: research, root"),
        ("sft: {default: {account: research, qos: hihg}}", "placement.sft.default.qos: no such qos for research: hihg", "did you mean `high`?"),
        ("sft: {default: {constraint: hoper}}", "placement.sft.default.constraint: no machine has hoper", "did you mean `hopper`?"),
        ("sft: {default: {constraint: hopper&ampere}}", "no machine of partition gpu has hopper&ampere", "there are: ampere, hopper, ib"),
        ("sft: {default: {partition: long, constraint: hopper}}", "no machine of partition long has hopper", "there are: none"),
        ("sft: {instruct: {gpus: 2, gres: 'gpu:h100'}}", "placement.sft.instruct.gres: no machine of partition gpu has gpu:h100", "there are: gpu, gpu:a100, gpu:h200"),
        ("sft: {instruct: {gpus: 2, partition: long}}", "placement.sft.instruct.gpus: 2, but partition long has no GPUs", "gpus: 0"),
        ("sft: {instruct: {gpus: 16, cpus: 16}}", "placement.sft.instruct.gpus: 16, but a machine of partition gpu has 8", "gpus: 8"),
        ("sft: {instruct: {gpus: 8, gres: 'gpu:a100', cpus: 8}}", "placement.sft.instruct.gpus: 8, but a machine of partition gpu with gpu:a100 has 4", "gpus: 4"),
        ("sft: {instruct: {cpus: 97}}", "placement.sft.instruct.cpus: 97, but a machine of partition gpu has 96", "cpus: 96"),
        ("sft: {instruct: {memory_gb: 1501}}", "placement.sft.instruct.memory_gb: 1501, but a machine of partition gpu has 1500", "memory_gb: 1500"),
        ("sft: {instruct: {memory_gb: 300, gres: 'gpu:a100', gpus: 1}}", "placement.sft.instruct.memory_gb: 300, but a machine of partition gpu with gpu:a100 has 256", "memory_gb: 256"),
        ("sft: {instruct: {nodes: 4, gpus: 8, cpus: 8}}", "placement.sft.instruct.nodes: 4, but partition gpu has 2 machines with cpus 8, memory_gb 2, gpus 8", "nodes: 2"),
        ("sft: {instruct: {minutes: 2191}}", "placement.sft.instruct.minutes: 2191, but partition gpu ends jobs after 2190", "minutes: 2190; training goes on in further jobs"),
        ("pack: {default: {minutes: 2191}}", "partition gpu ends jobs after 2190", "minutes: 2190"),
    ],
)  # fmt: skip
def test_what_the_cluster_lacks_is_named_with_line_and_hint(
    tmp_path: Path, placement: str, said: str, hint: str
):
    (found,) = [f for f in asked(tmp_path, f"  {placement}\n") if f.level == FAIL]
    assert said in found.what and hint in found.hint
    assert str(tmp_path) in found.what


def test_all_mistakes_are_named_at_once_and_each_once(tmp_path: Path):
    found = asked(
        tmp_path,
        "  default: {default: {cpus: 200}}\n  sft: {default: {partition: gup}}\n",
    )
    assert {f.what.partition(" ")[2] for f in found} == {
        "placement.default.default.cpus: 200, but a machine of partition gpu has 96",
        "placement.sft.default.partition: no such partition: gup",
    }


def test_a_mistake_in_the_config_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    weak = "gpu|gpu*|up|infinite|1-infinite|1|8000|gpu:8||2|idle|n[1-2]\n"
    monkeypatch.setattr(slurm, "machines", lambda: [slurm._machines(weak)])
    texts = [f.what for f in asked(tmp_path, "  {}\n")]
    lines = CONFIG.read_text().splitlines()
    number = lines.index("  sft: {default: {cpus: 2}}") + 1
    what = "cpus: 2, but a machine of partition gpu has 1"
    assert f"{CONFIG}:{number} placement.sft.default.{what}" in texts


def test_no_machine_need_have_all_that_some_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = [
        "gpu|gpu*|up|infinite|1-infinite|96|8000|gpu:4||2|idle|n[1-2]",
        "gpu|gpu*|up|infinite|1-infinite|8|8000|gpu:8||2|idle|n[3-4]",
    ]
    monkeypatch.setattr(slurm, "machines", lambda: [*map(slurm._machines, texts)])
    (found,) = asked(tmp_path, "  sft: {instruct: {cpus: 96, gpus: 8}}\n")
    what = "no one machine of partition gpu has all of cpus 96, memory_gb 2, gpus 8"
    assert (
        found.what == f"{tmp_path}/cluster.yaml:2 placement.sft.instruct.cpus: {what}"
    )


def test_light_nodes_may_ask_for_what_no_machine_has(tmp_path: Path):
    assert not asked(
        tmp_path, "  report: {default: {controller: true, partition: none}}\n"
    )


def test_jobs_that_will_wait_for_broken_machines_are_only_noted(tmp_path: Path):
    (found,) = asked(tmp_path, "  sft: {default: {constraint: ampere, nodes: 2}}\n")
    assert found.level == WARN
    assert "0 machines of partition gpu that fit are up now, a job of 2" in found.what


def test_without_a_default_partition_one_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    machines = [slurm._machines(s.replace("*|up", "|up")) for s in SINFO.splitlines()]
    monkeypatch.setattr(slurm, "machines", lambda: machines)
    (found,) = asked(tmp_path, "  {}\n")
    assert "placement.default.default.partition: none given" in found.what
    assert found.hint == "there are: gpu, long"


@pytest.mark.parametrize(
    "settings",
    [
        "AccountingStorageType = accounting_storage/none\n",
        "AccountingStorageType = accounting_storage/slurmdbd\n"
        "AccountingStorageEnforce = none\n",
    ],
)
def test_accounts_are_not_checked_where_slurm_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str
):
    said = {"sinfo": SINFO, "scontrol": settings}
    monkeypatch.setattr(slurm, "ask", lambda *words: said[words[0]])
    assert not asked(tmp_path, "  default: {default: {account: nobody, qos: none}}\n")


@pytest.mark.parametrize(
    ("constraint", "fits"),
    [
        (None, True),
        ("hopper", True),
        ("ampere", False),
        ("hopper&ib", True),
        ("hopper&eth", False),
        ("ampere|hopper", True),
        ("(ampere|hopper)&ib", True),
        ("[rack1*2&hopper*1]", True),
        ("rack1*2", False),
    ],
)
def test_constraints_choose_machines(constraint: str | None, fits: bool):
    assert doctor.has_features(frozenset({"hopper", "ib"}), constraint) == fits


def test_what_a_machine_lacks_is_named(tmp_path: Path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "container:\n  runtime: apptainer\n  image: /images/a.sif\n"
        "  mounts: [/data:/data]\n"
        "placement:\n  sft: {default: {image: b.sif}}\n"
    )
    places = Places(CONFIG, file)
    nodes = [*graph.build(CONFIG, file).nodes.values()]
    assert doctor.paths_inside(nodes) == ["/images/a.sif", "/data", "b.sif"]
    lacks = ["runtime", "path /images/a.sif", "path /data", "path b.sif", "locks"]
    heard = [("on", "n2"), *(("lacks", words) for words in lacks), ("end", "")]
    texts = [f.what for f in doctor.explain(heard, "gpu", nodes, places)]
    assert [text.removeprefix(f"{file}:").partition(": ")[0] for text in texts] == [
        "2 container.runtime",
        "3 container.image",
        "4 container.mounts",
        "6 placement.sft.default.image",
        "5 placement.default.default.partition",
    ]
    assert all("n2 of partition gpu" in text for text in texts)
    fine = doctor.explain([("on", "n2"), ("end", "")], "gpu", nodes, places)
    assert [f.level for f in fine] == [OK]


def test_slurms_settings_are_judged():
    fine = {"JobRequeue": "1", "MinJobAge": "300 sec", "KillWait": "30 sec"}
    assert [(f.level, f.hint) for f in doctor.check_settings(fine)] == [(OK, "")]
    poor = {"JobRequeue": "0", "MinJobAge": "10 sec", "KillWait": "30 sec"}
    texts = [str(f) for f in doctor.check_settings(poor)]
    assert "JobRequeue=0" in texts[0] and "forgets jobs 10 s after" in texts[1]
    (kill,) = doctor.check_settings(fine | {"KillWait": "3 sec"})
    assert "kills after 3 s" in kill.hint


@pytest.mark.parametrize(("gigabytes", "level"), [(0.5, FAIL), (5, WARN), (50, OK)])
def test_a_full_disk_is_said(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float, level: str
):
    free = type("Usage", (), {"free": gigabytes * 1e9})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: free)
    assert {f.level for f in doctor.check_disk()} == {level}


def test_the_machine_described_is_compared(tmp_path: Path):
    file = tmp_path / "cluster.yaml"

    def compared(shape: str) -> list[Found]:
        file.write_text(f"machine: {shape}\n")
        nodes = [*graph.build(CONFIG, file).nodes.values()]
        return doctor.check_described(nodes, Places(CONFIG, file), Slurm.asked())

    assert compared("{cpus: 96, memory_gb: 1500, gpus: 8}")[0].level == OK
    (found,) = compared("{cpus: 128, memory_gb: 1500, gpus: 8}")
    assert found.level == WARN and f"{file}:1 machine: no machine used" in found.what


def test_srun_is_told_nothing_of_the_job_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = tmp_path / "srun"
    fake.write_text("#!/bin/sh\nenv\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    done = doctor.srun("hostname")
    assert done and "SLURM_JOB_ID" not in done.stdout and "SLURM_CONF" in done.stdout


@pytest.mark.parametrize(
    ("said", "level", "text"),
    [
        (
            "srun: job 6 queued and waiting for resources\n"
            "srun: error: Unable to allocate resources: Requested nodes are busy",
            WARN,
            "no machine of partition gpu was looked at: none was free within 10 s",
        ),
        (
            "srun: error: Unable to allocate resources: Invalid account or "
            "account/partition combination specified",
            FAIL,
            "Slurm refuses a job in gpu: Unable to allocate resources: Invalid account",
        ),
        (
            "srun: error: Memory specification can not be satisfied\n"
            "srun: error: Unable to allocate resources: Requested node configuration "
            "is not available",
            WARN,
            "was looked at: Memory specification can not be satisfied",
        ),
    ],
)
def test_a_job_that_gets_no_machine_is_an_error_only_if_none_ever_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, level: str, text: str
):
    (found,) = looked(tmp_path, monkeypatch, f"echo '{said}' >&2; exit 1")
    assert found.level == level and text in found.what


def test_a_look_that_hangs_is_given_up_and_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(doctor, "FREE_SECONDS", 0)
    monkeypatch.setattr(doctor, "LOOK_SECONDS", 0.5)
    (found,) = looked(tmp_path, monkeypatch, "exec sleep 30")
    assert found.level == WARN and "its job did not end in" in found.what
    (name,) = (tmp_path / "cancelled").read_text().split()
    assert name.startswith("--name=") and "doctor" in name


def looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, srun: str) -> list[Found]:
    for name, text in (("srun", srun), ("scancel", f"echo $* > {tmp_path}/cancelled")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "STATE", tmp_path)
    file = tmp_path / "cluster.yaml"
    file.write_text("{}\n")
    nodes = [*graph.build(CONFIG, file).nodes.values()]
    return doctor.look("gpu", nodes, Places(CONFIG, file), Slurm.asked())
