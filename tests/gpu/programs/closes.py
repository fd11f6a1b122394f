"""Run a stage with one weight spoilt on its way to Hugging Face's form.

    python -m tests.gpu.programs.closes disk:STAGE|logits:STAGE FLAG...

disk    one bit of one weight changes after it was written
logits  a tensor is mapped wrongly, which no comparison of bits could see
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.nvidia import convert, parity


def spoil(out: Path, share: float) -> None:
    """Change the last tensor of a model, its head; by one bit where the share is 0."""
    import torch
    from safetensors.torch import load_file, save_file

    (path,) = out.glob("*.safetensors")
    tensors = load_file(path)
    name = sorted(tensors)[-1]
    if share:
        tensors[name] = tensors[name] * (1 + share)
    else:
        tensors[name].view(torch.int16).view(-1)[0] ^= 1
    save_file(tensors, path, {"format": "pt"})


def main() -> int:
    """Spoil, then run."""
    asked = next(word for word in sys.argv if word.startswith(("disk:", "logits:")))
    kind, _, stage = asked.partition(":")
    flags = [word for word in sys.argv[1:] if word != asked]
    original = convert.write_configs

    def write_configs(out: Path, *rest: Any) -> None:
        original(out, *rest)
        spoil(out, 0.0 if kind == "disk" else 0.5)

    convert.write_configs = write_configs
    if kind == "logits":
        parity.compare = lambda tensors, folder, cast=False: [None for _ in tensors][:0]
    return int(importlib.import_module(stage).main(flags))


if __name__ == "__main__":
    cli.run(main)
