"""What a finished stage's files must be before they are published."""

from __future__ import annotations

import filecmp
import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts.lib.digest import Memory, files_in, on_all_cores
from scripts.lib.errors import AttestError
from scripts.lib.stages import STAGES

TUNED = ("sft", "dpo", "grpo")
"""Stages that change a parent's weights, under its names."""
FLOATS = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}
BLOCK = 1 << 20
"""Bytes looked at together: they stay in a core's own cache."""


def attest(
    stage: str,
    recipe: dict[str, Any],
    out: Path,
    parent: Path | None,
    seen: Memory | None = None,
) -> None:
    """Check the content a stage wrote to `out`; `parent` is the model it came from.

    A training stage's metrics lie beside `out`. A file is hashed into `seen` as it is
    checked: a model larger than the main memory is read from the disk once.

    Raises AttestError naming the file: nothing written, an empty or truncated file,
    weights that are not finite, a step that was not reached, a model that training
    left as it was.
    """
    names = files_in(out)
    if not names:
        raise AttestError(str(out), "the stage wrote nothing")
    if STAGES[stage].trains:
        if not any(name.endswith(".safetensors") for name in names):
            raise AttestError(str(out), "no weights: there is no .safetensors file")
        _check_step(out.parent / "metrics.jsonl", recipe["steps"])
    checks = {".json": _load_json, ".safetensors": _check_weights}
    jobs: list[Callable[[], Any]] = []
    for path in (out / name for name in names):
        if path.suffix in checks:
            jobs.append(partial(checks[path.suffix], path))
        if seen is not None:
            jobs.append(partial(seen.file, path))
    on_all_cores(jobs)
    if stage in TUNED and parent is not None:
        model = sorted(out.glob("*.safetensors"))
        if all(same_bytes(p, parent / p.name) for p in model):
            raise AttestError(str(out), f"training left the weights of {parent} as is")


def same_bytes(path: Path, other: Path) -> bool:
    """Whether two files hold the same; read by blocks."""
    return other.is_file() and filecmp.cmp(path, other, shallow=False)


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AttestError(str(path), f"not JSON: {error}") from error


def _check_step(metrics: Path, target: int) -> None:
    try:
        last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, KeyError, ValueError) as error:
        raise AttestError(str(metrics), f"holds no step: {error!r}") from error
    if last != target:
        raise AttestError(
            str(metrics), f"ends at step {last}, the recipe says {target}"
        )


def _check_weights(path: Path) -> None:
    """A safetensors file is whole and its numbers are finite.

    The form is described in the safetensors repository's README: a little-endian
    uint64 N, N bytes of JSON, the tensors.
    """
    import numpy as np

    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise AttestError(str(path), "truncated: its header does not fit")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise AttestError(str(path), f"its header is not JSON: {error}") from error
        header.pop("__metadata__", None)
        if 8 + length + max(t["data_offsets"][1] for t in header.values()) != size:
            raise AttestError(str(path), f"truncated or padded: it has {size} bytes")
        for name, tensor in header.items():
            if tensor["dtype"] not in FLOATS:
                continue
            start, end = tensor["data_offsets"]
            kind = np.dtype(FLOATS[tensor["dtype"]])
            file.seek(8 + length + start)
            for at in range(start, end, BLOCK):
                count = min(BLOCK, end - at) // kind.itemsize
                values = np.fromfile(file, kind, count)
                if tensor["dtype"] == "BF16":
                    finite = (values & 0x7F80).max() != 0x7F80
                else:
                    finite = np.isfinite(values).all()
                if not finite:
                    raise AttestError(f"{path} {name}", "not finite")
