"""The benchmarks run, and their page keeps what was not run again."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

from scripts.lib.errors import UserError
from tests.bench import __main__ as bench
from tests.bench.measure import Command, Run, compared, run


def rows(page: Path) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {one[0]: one[1:] for one in cells}


def test_the_table_has_a_row_for_each_promise_and_outputs_are_alike(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Performance\n\nKept.\n\n<!-- plan -->\nold\n<!-- end of plan -->\n"
    )
    flags = ["--mb", "0.2", "--large-mb", "0.3", "--chats", "30", "--rounds", "1"]
    where = ["--page", str(page), "--folder", str(tmp_path)]
    assert bench.main(["tokenize", "pack", *flags, *where]) == 0
    found = rows(page)
    for what in ("tokenize, whole command, one core", "tokenize 0.3 MB on 2 cores"):
        assert found[what][-1].startswith("identical .bin and .idx")
        assert re.fullmatch(r"[\d.]+ / [\d.]+", found[what][0])
        assert all(float(mb) > 10 for mb in found[what][5].split("/"))
    (bos,) = (cells for what, cells in found.items() if "adds BOS" in what)
    assert bos[2] == "yes"
    assert found["pack 30 chats, whole command, one core"][-1].endswith(
        "30 of 30 chats"
    )
    assert "fill of the rows" in found
    assert "\nKept.\n" in page.read_text()
    assert "<!-- plan -->\nold\n<!-- end of plan -->" in page.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_a_command_that_fails_is_no_figure(tmp_path):
    words = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(UserError, match="no such thing"):
        run(Command(words, tmp_path / "log"))


def test_peak_memory_is_of_all_processes_at_once(tmp_path):
    program = (
        "import os, time\n"
        "pid = os.fork()\n"
        "held = b'x' * 60_000_000\n"
        "time.sleep(0.5)\n"
        "pid and os.wait()\n"
    )
    start = time.perf_counter()
    found = run(Command([sys.executable, "-c", program], tmp_path / "log"))
    assert 120 < found.peak_mb < 180
    assert 0.5 < found.wall_s < time.perf_counter() - start
    assert found.first_s <= found.cpu_s


def test_a_ratio_is_of_pairs_and_met_by_the_median():
    ours = [Run(1, s, s, 10) for s in (1.0, 2.0, 1.0)]
    theirs = [Run(1, s, s, 30) for s in (30.0, 50.0, 20.0)]
    row = compared("it", "them", ours, theirs, 25)
    assert (row.ratio, row.met) == ("20.0 / 25.0", True)
    assert (row.seconds, row.memory) == ("1.00 / 20.00", "10 / 30")
