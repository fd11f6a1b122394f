"""A node that several Slurm jobs share: on two machines at once, none submitted twice."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.cluster.builds import Site

SHARES = [f"tokenize/corpus-{i}of2" for i in (1, 2)]


def test_jobs_of_one_node_run_on_two_machines_and_outlive_a_controller(site: Site):
    project = site.project
    rows = project.rows("data/corpus.jsonl")
    for i in range(4):
        project.write_rows(f"data/corpus-{i}.jsonl", rows[i::4])
    site.change("config/config.yaml", data={"corpus": {"files": "data/corpus-*.jsonl"}})
    site.change("config/config.yaml", tokenizer={"tiny": {"data": "chat"}})
    site.place("tokenize", jobs=2, cpus=site.cluster.cpus)
    build = site.build("tokenize")
    held: dict[str, int] = {}
    site.cluster.wait(lambda: len(hold_shares(site, held)) == 2, 120)
    build.kill()
    again = site.build("tokenize")
    for share in SHARES:
        again.until(rf"^{share}  waits for its Slurm job \d+, running already")
    for pid in held.values():
        os.kill(pid, signal.SIGCONT)
    assert again.done() == {"tokenize/corpus"}
    jobs = {j["comment"].removeprefix("rule_"): j for j in site.cluster.jobs()}
    assert {jobs[share]["node"] for share in SHARES} == {"n1", "n2"}
    submitted = site.submitted()
    assert sorted(submitted[-3:-1]) == SHARES and submitted[-1] == "tokenize/corpus"
    assert len(submitted) == 4, "and the tokenizer"
    log = (project.path / "logs/tokenize/corpus.log").read_text()
    assert "4 of 4 chunks as before, their tokens copied" in log
    assert project.planned("tokenize") == set()


def hold_shares(site: Site, held: dict[str, int]) -> dict[str, int]:
    """Stop what encodes a share, machine by machine, until it is told to go on."""
    for machine in {"n1", "n2"} - held.keys():
        for pid in site.cluster.processes(machine):
            if b"--share" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGSTOP)
                held[machine] = pid
    return held
