"""What all tests on a GPU share; without one, or without the engine, they are skipped.

    make gpu

The stages run as a build runs them: as processes of the engine's interpreter, which
$NVIDIA_PYTHON names, else .venv-nvidia/bin/python. Figures that the tests see are
appended to work/gpu.jsonl. With $GPU_TESTS_FOLDER what the tests share (data, models) is
kept there from one call to the next. On a machine with one GPU, NCCL_MULTI_RANK_GPU_ENABLE=1 lets
two processes of a run share it (NCCL 2.30 or newer), so that its sums are checked; its
speed means nothing then.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from scripts.data import (
    generate,
    pack,
    preferences,
    prompts,
    tokenize,
    tokenizer,
)
from scripts.lib import launch

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
PYTHON = os.environ.get("NVIDIA_PYTHON") or str(ROOT / ".venv-nvidia/bin/python")
FIGURES = ROOT / "work/gpu.jsonl"
SHARING = FOLDER / "programs/sharing"
SHARED = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
GRPO = {
    "steps": 20,
    "batch_size": 512,
    "num_generations": 8,
    "max_completion_tokens": 4,
    "lr": 5e-4,
    "lr_scheduler": "constant_with_warmup",
    "warmup_steps": 2,
    "log_steps": 1,
    "overrides": {
        "policy.generation.vllm_cfg.enforce_eager": True,
        # else vLLM measures memory, and fails where another run's changes meanwhile
        "policy.generation.vllm_kwargs.kv_cache_memory_bytes": 2_000_000_000,
    },
}
PAIRS = {"steps": 120, "batch_size": 128, "lr": 6e-4, "warmup_steps": 5, "log_steps": 1}
RECIPE = {
    "steps": 300,
    "batch_size": 16,
    "lr": 3e-3,
    "warmup_steps": 20,
    "sequence_length": 128,
    "log_steps": 10,
}
SFT = {"steps": 150, "batch_size": 4, "lr": 2e-3, "warmup_steps": 10, "log_steps": 10}


def num_gpus() -> int:
    """GPUs that this machine has."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=False
        )
    except OSError:
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def num_ranks() -> int:
    """Processes that one run may have here."""
    return num_gpus() * (2 if SHARED else 1)


def worker() -> int:
    """The number of this pytest-xdist worker."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def missing() -> str:
    """Why nothing here can run, or nothing."""
    if not num_gpus():
        return "no GPU here: nvidia-smi shows none"
    if not Path(PYTHON).exists():
        return f"no {PYTHON}: make env-nvidia, or name the interpreter in NVIDIA_PYTHON"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(FOLDER)]
    reason = missing() if ours else ""
    for item in ours:
        wanted = item.get_closest_marker("gpus")
        need = wanted.args[0] if wanted else 1
        if reason or num_ranks() < need:
            why = reason or f"{need} GPUs wanted, {num_gpus()} here"
            item.add_marker(pytest.mark.skip(reason=f"NOT TESTED: {why}"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(n): runs on so many GPUs")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    ours = [one for one in skipped if "tests/gpu" in one.nodeid]
    if ours:
        terminalreporter.section("NOT TESTED on a GPU", bold=True, red=True)
        terminalreporter.write_line(f"{len(ours)} tests: {ours[0].longrepr[2]}")


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@dataclass
class Run:
    """One run of a stage: its folders, its process, what came of it."""

    out: Path
    work: Path
    log: Path
    process: subprocess.Popen[bytes]
    code: int | None = None
    locks: list[IO[str]] = field(default_factory=list)

    def wait(self, seconds: float = 900) -> int:
        try:
            self.code = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.kill()
            self.unlock()
        return self.code

    def unlock(self) -> None:
        """Let other workers have its GPUs."""
        while self.locks:
            self.locks.pop().close()

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def error(self) -> str:
        """The last error the script names."""
        return "error: " + self.text().rpartition("\nerror: ")[2]

    def done(self) -> Run:
        assert self.wait() == 0, self.text()[-6000:]
        return self

    @property
    def metrics(self) -> list[dict[str, float]]:
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics]

    @property
    def parity(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "parity.json").read_text()))

    def when(self, happened: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.text()[-6000:]
            assert time.monotonic() < deadline, self.text()[-6000:]
            time.sleep(0.05)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.unlock()


@dataclass
class Stages:
    """Starts stages on this worker's GPUs."""

    folder: Path
    inputs: Path
    gpu: int
    runs: list[Run] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(
        self,
        module: str,
        recipe: dict[str, Any],
        *flags: str | Path,
        gpus: int = 1,
        work: Path | None = None,
        beside_ray: bool = False,
        alone: bool = False,
    ) -> Run:
        """Start a run, once its GPUs are free for it.

        `alone`, vLLM's, waits until nobody else uses them: it fails where memory is freed
        while it measures. Two runs of NeMo-RL never share one: their trainers and vLLMs meet
        at a socket that is named after the GPU.
        """
        seen = range(min(gpus, num_gpus())) if gpus > 1 else [self.gpu]
        wanted = {f".gpu{gpu}": alone for gpu in seen}
        wanted |= {f".ray{gpu}": True for gpu in seen if beside_ray}
        locks = take(self.inputs.parent, wanted)
        name = f"{module.rpartition('.')[2]}{next(self.numbers)}"
        file = write(self.folder / f"{name}.yaml", recipe)
        out, log = self.folder / name, self.folder / f"{name}.log"
        work = work or self.folder / f"{name}.work"
        words: list[str | Path] = [PYTHON]
        if beside_ray:
            words += ["-P", "-m", "scripts.lib.launch", "ray", "--cpus", "8"]
            block = 2 * worker() + self.gpu  # others start at this moment too
            words += ["--port", str(launch.free_ports(block)), "--memory-gb", "32"]
            words += ["--gpus", str(gpus), "--logs", f"{work}/ray", "--", "-P"]
        elif gpus > 1 and not alone:
            words += ["-m", "torch.distributed.run", "--standalone"]
            words += [f"--nproc-per-node={gpus}"]
        words += ["-m", module, "--recipe", file, "--out", out, "--work", work, *flags]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, seen)),
            "OMP_NUM_THREADS": "2",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *([str(SHARING)] if SHARED else [])]
            ),
        }
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        run = Run(out, work, log, process, locks=locks)
        self.runs.append(run)
        return run

    def pretrain(
        self,
        *flags: str | Path,
        model: str | Path = "tiny",
        gpus: int = 1,
        work: Path | None = None,
        **changes: Any,
    ) -> Run:
        folder = model if isinstance(model, Path) else ROOT / "config/models" / model
        return self.start(
            "scripts.nvidia.pretrain",
            RECIPE | changes,
            *("--model", folder, "--tokenizer", self.inputs / "tokenizer"),
            *("--data", self.inputs / "blend", "--micro-batch-size", "8"),
            *flags,
            gpus=gpus,
            work=work,
        )

    def sft(
        self,
        parent: Path,
        *flags: str | Path,
        gpus: int = 1,
        work: Path | None = None,
        **changes: Any,
    ) -> Run:
        return self.start(
            "scripts.nvidia.sft",
            SFT | changes,
            *("--parent", parent, "--packed", self.inputs / "packed"),
            *flags,
            gpus=gpus,
            work=work,
        )

    def rl(
        self,
        stage: str,
        recipe: dict[str, Any],
        parent: Path,
        *flags: str | Path,
        backend: str = "dtensor",
        gpus: int = 1,
        work: Path | None = None,
        asked: Path | None = None,
    ) -> Run:
        """A stage of NeMo-RL's, beside a Ray of its own; `asked` are other prompts."""
        data = "prompts" if stage.endswith("grpo") else "preferences"
        return self.start(
            stage if "." in stage else f"scripts.nvidia.{stage}",
            recipe,
            *("--parent", parent, f"--{data}", asked or self.inputs / data),
            *("--backend", backend, "--gpus", str(gpus), "--cpus", "8"),
            *("--micro-batch-size", "32", "--generation-memory", "0.2"),
            *flags,
            gpus=gpus,
            work=work,
            beside_ray=True,
        )


def take(folder: Path, wanted: dict[str, bool]) -> list[IO[str]]:
    """Locks that all workers see, held until closed; True are for one alone.

    All or none are held, so that nobody waits for somebody who waits.
    """
    while True:
        taken: list[IO[str]] = []
        try:
            for name, alone in wanted.items():
                taken.append(open(folder / name, "w"))
                how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
                fcntl.flock(taken[-1], how | fcntl.LOCK_NB)
            return taken
        except BlockingIOError:
            for file in taken:
                file.close()
            time.sleep(0.5)


def once(root: Path, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first of the workers to come here makes for all."""
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / ".made").touch()
    return folder


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if kept := os.environ.get("GPU_TESTS_FOLDER"):
        Path(kept).mkdir(parents=True, exist_ok=True)
        return Path(kept)
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def make_inputs(root: Path) -> None:
    """Tokenizer, blend and packed chats, as a build makes them."""

    def stage(main: Callable[..., int], name: str, recipe: object, *flags: str) -> None:
        file = write(root / f"{name}.yaml", recipe)
        argv = ["--recipe", str(file), "--out", str(root / name), *flags]
        assert main(argv) == 0

    def rows(name: str) -> str:
        return f"{name}={root / name / 'rows.jsonl'}"

    for name, kind, count in (
        ("corpus", "documents", 20000),
        ("chat", "chats", 10000),
    ):
        stage(generate.main, name, {"kind": kind, "count": count, "max_operand": 49})
    template = str(ROOT / "config/models/tiny/chat_template.jinja")
    stage(
        tokenizer.main,
        "tokenizer",
        {"vocab_size": 512, "sources": {"corpus": {}}},
        *("--data", rows("corpus"), "--chat-template", template),
    )
    ready = ["--tokenizer", str(root / "tokenizer")]
    blend = {"sources": {"corpus": {}}}
    stage(tokenize.main, "blend", blend, *ready, "--data", rows("corpus"))
    packed = {"sequence_length": 256, "sources": {"chat": {}}}
    stage(pack.main, "packed", packed, *ready, "--data", rows("chat"))
    for name, kind, count in (
        ("arithmetic", "prompts", 4000),
        ("opinions", "preferences", 3000),
        ("heldout", "heldout", 300),
    ):
        stage(generate.main, name, {"kind": kind, "count": count, "max_operand": 49})
    asked = {"max_prompt_tokens": 32, "sources": {"arithmetic": {}}}
    stage(prompts.main, "prompts", asked, *ready, "--data", rows("arithmetic"))
    pairs = {"max_tokens": 32, "sources": {"opinions": {}}}
    stage(preferences.main, "preferences", pairs, *ready, "--data", rows("opinions"))


@pytest.fixture(scope="session")
def inputs(shared: Path) -> Path:
    return once(shared, "inputs", make_inputs)


@pytest.fixture
def stages(tmp_path: Path, inputs: Path) -> Iterator[Stages]:
    found = Stages(tmp_path, inputs, worker() % max(1, num_gpus()))
    yield found
    for run in found.runs:
        if run.process.poll() is None:
            run.kill()


def trained(shared: Path, inputs: Path, name: str, **how: Any) -> Run:
    """A run of pretrain that the tests share."""

    def make(folder: Path) -> None:
        gpu = len(list(shared.glob("*.lock"))) % num_gpus()
        run = Stages(folder, inputs, gpu).pretrain(**how).done()
        shutil.copy(run.log, folder / "log")
        run.out.rename(folder / "out")

    folder = once(shared, name, make)
    process = subprocess.Popen(["true"])
    process.wait()
    return Run(folder / "out", folder / "work", folder / "log", process, 0)


@pytest.fixture(scope="session")
def base(shared: Path, inputs: Path) -> Run:
    """The tiny model, pretrained on one GPU without interruption."""
    return trained(shared, inputs, "base", model="tiny")


@pytest.fixture(scope="session")
def hybrid(shared: Path, inputs: Path) -> Run:
    """A dense hybrid whose heads and groups divide by two."""
    return trained(shared, inputs, "hybrid", model="hybrid4b_small")


@pytest.fixture(scope="session")
def experts(shared: Path, inputs: Path) -> Run:
    """A hybrid with experts."""
    return trained(shared, inputs, "experts", model="nano3_small")


def make_chatty(folder: Path, inputs: Path, model: str = "qwen3_small") -> None:
    """A model that was fine-tuned to add, and often forgets to carry."""
    stages = Stages(folder, inputs, 0)
    base = stages.pretrain(model=model, steps=2000, lr=2e-3).done()
    tuned = stages.sft(base.out, steps=500, batch_size=32).done()
    tuned.out.rename(folder / "out")


@pytest.fixture(scope="session")
def chatty(shared: Path, inputs: Path) -> Path:
    """A transformer that answers."""
    return once(shared, "chatty", lambda made: make_chatty(made, inputs)) / "out"


@pytest.fixture(scope="session")
def chatty_hybrid(shared: Path, inputs: Path) -> Path:
    """A model of Mamba and attention that answers."""

    def make(folder: Path) -> None:
        make_chatty(folder, inputs, "tiny")

    return once(shared, "chatty_hybrid", make) / "out"


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Append what a test saw to work/gpu.jsonl."""

    def add(**values: Any) -> None:
        FIGURES.parent.mkdir(exist_ok=True)
        with open(FIGURES, "a") as file:
            file.write(json.dumps({"test": request.node.name, **values}) + "\n")

    return add
