"""One lock says which versions the engine nvidia has; scripts, table and images follow."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest

from scripts.lib import identity
from scripts.lib.stages import STAGES
from scripts.nvidia import versions

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "envs/nvidia.lock"
OF_RL = ROOT / identity.OF_RL


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment that has just what the lock pins, to be changed."""
    found = versions.pins(LOCK)

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return found


def test_the_lock_pins_what_identity_asks_for():
    wanted = {p for stage in STAGES.values() for p in stage.nvidia_packages}
    of_rl = set(versions.pins(OF_RL))
    assert wanted and wanted <= set(versions.pins(LOCK)) | of_rl
    assert wanted - of_rl <= set(versions.RESULT)


def test_the_lock_has_each_package_once_and_exactly():
    lines = [x for x in LOCK.read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_the_lock_is_read_as_the_plan_reads_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    identity.forget()
    assert identity.pins("nvidia") == versions.pins(LOCK) | versions.pins(OF_RL)


def test_the_locked_environment_has_no_problems(here: dict[str, str]):
    assert versions.installed_problems(LOCK) == []


def test_the_mark_of_a_build_does_not_matter(here: dict[str, str]):
    here["torch"] += "+cu130"
    assert versions.installed_problems(LOCK) == []


def test_another_version_is_named_with_the_one_wanted(here: dict[str, str]):
    wanted = here["megatron-core"]
    here["megatron-core"] = "0.1"
    assert versions.installed_problems(LOCK) == [
        f"megatron-core: 0.1; {LOCK} pins {wanted}"
    ]


def test_a_missing_package_is_named(here: dict[str, str]):
    del here["mamba-ssm"]
    (problem,) = versions.installed_problems(LOCK)
    assert problem.startswith("mamba-ssm: not installed")


def test_a_container_can_pin_its_own_versions(here: dict[str, str], tmp_path: Path):
    lock = tmp_path / "nvidia.lock"
    lock.write_text(LOCK.read_text())
    here |= {"torch": "2.13.0a0+4bf2261.nv26.6", "transformer-engine": "2.16.0"}
    assert len(versions.installed_problems(lock)) == 2
    assert versions.main([str(lock), "--write"]) == 0
    assert versions.installed_problems(lock) == []
    assert versions.pins(lock)["torch"] == "2.13.0a0+4bf2261.nv26.6"
    changed = {n for n, v in versions.pins(lock).items() if v != versions.pins(LOCK)[n]}
    assert changed == {"torch", "transformer-engine"}


def test_what_differs_makes_the_command_fail(
    here: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    assert versions.main([str(LOCK)]) == 0
    here["numpy"] = "1.0"
    assert versions.main([str(LOCK)]) == 1
    assert "numpy: 1.0" in capsys.readouterr().err


def test_the_table_has_the_versions_of_the_lock():
    pinned = versions.pins(LOCK) | versions.pins(OF_RL)
    table = versions.table(LOCK, OF_RL)
    for shown, name in (
        ("Megatron-Core", "megatron-core"),
        ("Megatron-Bridge", "megatron-bridge"),
        ("Transformer Engine", "transformer-engine"),
        ("PyTorch", "torch"),
        ("vLLM", "vllm"),
        ("NeMo-RL", "nemo-rl"),
    ):
        assert f"| {shown} | {pinned[name]} |" in table
    for shown in ("Python", "CUDA", "Container", "NeMo-RL's", "Tried on"):
        assert f"| {shown} | " in table


def test_both_images_are_of_one_base_that_the_lock_names():
    texts = [
        (ROOT / f"envs/nvidia.{kind}").read_text() for kind in ("Dockerfile", "def")
    ]
    digests = {tuple(set(re.findall(r"sha256:[0-9a-f]{64}", text))) for text in texts}
    assert len(digests) == 1
    tag = re.search(r"nvcr\.io/nvidia/nemo:([\d.]+\d)", LOCK.read_text())
    assert tag and all(tag[1] in text for text in texts)
