"""Command lines for every way of starting a script, in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.lib import launch
from scripts.lib.errors import UserError

# Apptainer 1.5 (`apptainer help exec`; signals reach the script, since it runs without
# a terminal: checkSignalPropagation in prepare_linux.go) and Pyxis 0.24.0 (README, and
# args.c for what is a file, what mounts' flags look like, and RANK of pytorch_setup).
PYTHON = sys.executable
WORDS = ["-P", "-m", "scripts.transformers.sft", "--out", "work/sft/x/out"]
PLACEMENT = {"cpus": 4, "memory_gb": 8.0, "nodes": 1, "gpus": 0, "processes": 1}
SLURM = {"SLURM_JOB_ID": "45", "SLURM_JOB_NODELIST": "n[1-2]"}
SRUN_1 = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
SRUN_1 += ["--cpus-per-task=4", "--kill-on-bad-exit=1", "--export=ALL"]
SRUN_2 = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
SRUN_2 += ["--cpus-per-task=4", "--kill-on-bad-exit=1", "--export=ALL"]
LAUNCH = ["-P", "-m", "scripts.lib.launch"]
STANDALONE = ["-P", "-m", "torch.distributed.run", "--standalone"]
STANDALONE += ["--local-addr=127.0.0.1", "--nproc-per-node=3", "--no-python"]
TORCHRUN = ["torchrun", "--hosts", "n1,n2", "--port", "11000", "--processes", "3", "--"]
RAY_FLAGS = ["--port", "11000", "--cpus", "4", "--gpus", "8", "--memory-gb", "8.0"]
RAY_FLAGS += ["--logs", "work/sft/x/ray", "--"]
RAY_1 = ["ray", *RAY_FLAGS]
RAY_2 = ["ray", "--hosts", "n1,n2", *RAY_FLAGS]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder, and programs that only have to be there."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write(programs / "scontrol", "printf 'n1\\nn2\\n'")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setattr(launch, "is_free", lambda port: True)
    return project


def write(path: Path, line: str = "true") -> None:
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def line(launcher: str = "", environ: Any = (), **placement: Any) -> list[str]:
    return launch.command(
        WORDS,
        launcher=launcher,
        placement=PLACEMENT | placement,
        work=Path("work/sft/x"),
        environ={"PATH": os.environ["PATH"], **dict(environ)},
    )


def contained(runtime: str, here: Path, **keys: Any) -> dict[str, Any]:
    name = "images/x.sif" if runtime == "apptainer" else "images/x.sqsh"
    (here / "images").mkdir(exist_ok=True)
    (here / name).touch()
    write(here.parent / "bin/apptainer")
    container = {"runtime": runtime, "image": name, "mounts": [], "environment": {}}
    return {"container": container | keys}


# ---- no container --------------------------------------------------------------

NO_CONTAINER = [
    ("", {}, [PYTHON]),
    ("", {"gpus": 8, "processes": 8}, [PYTHON]),
    ("torchrun", {}, [PYTHON]),
    ("torchrun", {"processes": 3}, [PYTHON, *STANDALONE, PYTHON]),
    (
        "torchrun",
        {"processes": 3, "nodes": 2},
        [*SRUN_2, PYTHON, *LAUNCH, *TORCHRUN],
    ),
    ("ray", {"gpus": 8}, [PYTHON, *LAUNCH, *RAY_1]),
    ("ray", {"gpus": 8, "nodes": 2}, [*SRUN_2, PYTHON, *LAUNCH, *RAY_2]),
]


@pytest.mark.parametrize("runtime", [None, {"runtime": "none", "image": None}])
@pytest.mark.parametrize(("launcher", "placement", "expected"), NO_CONTAINER)
def test_in_a_job(launcher, placement, expected, runtime):
    placement = placement | ({"container": runtime} if runtime else {})
    assert line(launcher, SLURM, **placement) == [*expected, *WORDS]


@pytest.mark.parametrize(
    ("launcher", "placement", "expected"),
    [case for case in NO_CONTAINER if case[1].get("nodes") is None],
)
def test_without_slurm(launcher, placement, expected, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 45)  # ports are by it
    assert line(launcher, **placement) == [*expected, *WORDS]


@pytest.mark.parametrize(
    ("placement", "before", "after"),
    [
        ({}, [], []),
        ({"processes": 3}, [], [*STANDALONE, "/env/python"]),
        ({"processes": 3, "nodes": 2}, SRUN_2, [*LAUNCH, *TORCHRUN]),
    ],
)
def test_with_an_engines_own_python(placement, before, after):
    got = launch.command(
        WORDS,
        launcher="torchrun",
        placement=PLACEMENT | placement,
        work=Path("work/sft/x"),
        environ={"PATH": os.environ["PATH"], **SLURM},
        python="/env/python",
    )
    assert got == [*before, "/env/python", *after, *WORDS]


def test_in_a_container_python_is_the_images(here):
    got = launch.command(
        WORDS,
        launcher="torchrun",
        placement=PLACEMENT | contained("apptainer", here),
        work=Path("work/sft/x"),
        environ={"PATH": os.environ["PATH"]},
        python="/env/python",
    )
    assert "/env/python" not in got
    assert got[-len(WORDS) - 1 :] == ["python", *WORDS]


# ---- containers ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "placement", "before", "nv", "inside"),
    [
        ("", {}, [], [], []),
        ("", {"gpus": 8}, [], ["--nv"], []),
        ("torchrun", {"processes": 3}, [], [], [*STANDALONE, "python"]),
        (
            "torchrun",
            {"processes": 3, "nodes": 2, "gpus": 8},
            SRUN_2,
            ["--nv"],
            [*LAUNCH, *TORCHRUN],
        ),
        ("ray", {"gpus": 8}, [], ["--nv"], [*LAUNCH, *RAY_1]),
        ("ray", {"gpus": 8, "nodes": 2}, SRUN_2, ["--nv"], [*LAUNCH, *RAY_2]),
    ],
)
def test_apptainer(launcher, placement, before, nv, inside, here):
    placement |= contained("apptainer", here, mounts=["/data:/data:ro", "/a:/b"])
    container = ["apptainer", "exec", *nv, "--bind", f"{here}:{here}"]
    container += ["--bind", "/data:/data:ro", "--bind", "/a:/b"]
    container += ["--pwd", str(here), f"{here}/images/x.sif"]
    container += ["env", "PYTHONNOUSERSITE=1", "python"]
    assert line(launcher, SLURM, **placement) == [
        *before,
        *container,
        *inside,
        *WORDS,
    ]


@pytest.mark.parametrize(
    ("launcher", "placement", "before", "inside"),
    [
        ("", {}, SRUN_1, []),
        ("torchrun", {"processes": 3}, SRUN_1, [*STANDALONE, "python"]),
        ("torchrun", {"processes": 3, "nodes": 2}, SRUN_2, [*LAUNCH, *TORCHRUN]),
        ("ray", {"gpus": 8}, SRUN_1, [*LAUNCH, *RAY_1]),
        ("ray", {"gpus": 8, "nodes": 2}, SRUN_2, [*LAUNCH, *RAY_2]),
    ],
)
def test_pyxis(launcher, placement, before, inside, here):
    placement |= contained("pyxis", here, mounts=["/data:/data:ro", "/a:/b"])
    container = [
        f"--container-image={here}/images/x.sqsh",
        f"--container-mounts={here}:{here},/data:/data:ro,/a:/b",
        f"--container-workdir={here}",
        "--no-container-mount-home",
    ]
    container += ["env", "-u", "RANK", "-u", "LOCAL_RANK", "-u", "WORLD_SIZE"]
    container += ["-u", "MASTER_ADDR", "-u", "MASTER_PORT"]
    container += ["PYTHONNOUSERSITE=1", "python"]
    assert line(launcher, SLURM, **placement) == [
        *before,
        *container,
        *inside,
        *WORDS,
    ]


def test_images_of_registries_are_passed_as_they_are(here):
    for image in ("docker://a/b:1", "oras://a/b:1", "library://a/b:1"):
        assert image in line(**contained("apptainer", here, image=image))
    for image in ("nvcr.io#nvidia/nemo:25.09", "ubuntu", "docker://a/b:1"):
        placement = contained("pyxis", here, image=image)
        assert f"--container-image={image}" in line("", SLURM, **placement)


def test_singularity_serves_where_apptainer_is_not(here):
    placement = contained("apptainer", here)
    (here.parent / "bin/apptainer").rename(here.parent / "bin/singularity")
    assert line(**placement)[:2] == ["singularity", "exec"]


def test_containers_get_the_scripts_variables_but_no_secret(here):
    environ = {
        "PYTHONPATH": "/code",
        "PYTHONHOME": "/usr",
        "OMP_NUM_THREADS": "4",
        "GOMP_SPINCOUNT": "1000",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "secret",
        "NCCL_SOCKET_IFNAME": "ib0",
        "NVTE_DEBUG": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": "/fast/i",
        "TRITON_CACHE_DIR": "/fast/t",
        "LANG": "C",
    }
    values = {"PYTHONPATH": "/of/image", "A": "1,2 $x", "OMP_NUM_THREADS": "2"}
    got = line("", environ, **contained("apptainer", here, environment=values))
    assert got[got.index("env") :] == [
        "env",
        "GOMP_SPINCOUNT=1000",
        "HF_HUB_DISABLE_TELEMETRY=1",
        "NCCL_SOCKET_IFNAME=ib0",
        "NVTE_DEBUG=1",
        "OMP_NUM_THREADS=2",
        "PYTHONPATH=/code:/of/image",
        "TOKENIZERS_PARALLELISM=false",
        "TORCHINDUCTOR_CACHE_DIR=/fast/i",
        "TRITON_CACHE_DIR=/fast/t",
        "PYTHONNOUSERSITE=1",
        "A=1,2 $x",
        "python",
        *WORDS,
    ]


# ---- what cannot be run --------------------------------------------------------


def refused(
    match: str, launcher: str = "", environ: Any = (), **placement: Any
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        line(launcher, environ, **placement)
    assert caught.value.hint


def test_mistakes_are_named(here):
    refused("placement.nodes 2: this is no Slurm job", "torchrun", nodes=2)
    refused("placement.nodes 2: this stage runs on one", "", SLURM, nodes=2)
    refused("placement.nodes 3: job 45 has 2: n1, n2", "ray", SLURM, nodes=3)
    pyxis, apptainer = contained("pyxis", here), contained("apptainer", here)
    refused("pyxis: this is no Slurm job", **pyxis)
    for container in (pyxis, apptainer):
        container = container["container"]
        refused("image: not set", "", SLURM, container=container | {"image": None})
        for image in ("/no/x.sif", "./x.sqsh", "no.sqsh"):
            container["image"] = image
            refused(f"{image}: no such file", "", SLURM, container=container)
    (here.parent / "bin/apptainer").unlink()
    refused("neither apptainer nor singularity", **apptainer)


# ---- ports and machines --------------------------------------------------------


def test_jobs_begin_at_ports_of_their_own_and_pass_over_taken_ones(monkeypatch):
    assert launch.FIRST_PORT + launch.BLOCKS * launch.PORTS <= 32768
    blocks = [launch.first_block({"SLURM_JOB_ID": str(id)}) for id in range(22)]
    assert sorted(blocks) == [*range(22)]
    again = SLURM | {"SLURM_RESTART_COUNT": "1"}
    assert launch.first_block(again) != launch.first_block(SLURM)
    taken = {31003, 10000}
    monkeypatch.setattr(launch, "is_free", lambda port: port not in taken)
    assert launch.free_ports(21) == 11000
    monkeypatch.setattr(launch, "is_free", lambda port: False)
    with pytest.raises(UserError, match="no free ports from 10000 to 31999"):
        launch.free_ports(0)


def test_rays_ports_are_apart():
    heads = [0, *launch.OFFSETS.values(), launch.DASHBOARD_PORT, launch.CLIENT_PORT]
    assert len({*heads}) == len(heads)
    assert max(heads) < launch.WORKER_PORTS


def test_torchrun_of_a_machine(monkeypatch):
    """The master is the first machine; this one is the second, by the loopback here."""
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    flags = ["--hosts", "localhost,n2", "--port", "11000", "--processes", "3"]
    launch.main(["torchrun", *flags, "--", *WORDS])
    assert started == [
        [
            *(PYTHON, "-P", "-m", "torch.distributed.run", "--nnodes=2"),
            *("--node-rank=1", "--nproc-per-node=3", "--max-restarts=0"),
            *("--master-addr=localhost", "--master-port=11000"),
            *("--no-python", PYTHON, *WORDS),
        ]
    ]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_it_runs_on_the_standard_library_and_explains_itself():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [PYTHON, "-S", "-P", "-m", "scripts.lib.launch", "--help"],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    for word in ("torchrun", "ray", "-- -P -m scripts.transformers.sft"):
        assert word in done.stdout
