"""The line that shows how far a stage is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.lib.run import progress_line


@pytest.mark.parametrize(
    ("loss", "shown"), [(2, "2"), (0.43125, "0.4313"), (float("nan"), "nan")]
)
def test_any_loss_is_shown_even_one_that_is_no_number(
    tmp_path: Path, loss: float, shown: str
):
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({"step": 3, "steps": 9, "loss": loss}))
    assert progress_line(path, trains=True) == f"step 3 of 9  loss {shown}"
