"""What the tests of the data stages share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scripts.data import tokenizer


def run(stage: Any, out: Path, recipe: str, *flags: str) -> Path:
    """A stage's folder, made by a recipe in YAML."""
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(recipe)
    assert stage.main(["--recipe", str(path), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of four words."""
    folder = tmp_path_factory.mktemp("tokenizer")
    row = json.dumps({"text": "one two three four"}) + "\n"
    (folder / "corpus.jsonl").write_text(row * 9)
    data = f"--data=corpus={folder / 'corpus.jsonl'}"
    return run(tokenizer, folder / "made", "vocab_size: 280", data)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that tokenize encodes in this process, as it does."""
    from scripts.data.documents import DocumentEncoder

    encode, found = DocumentEncoder.encode, list[str]()

    def noting(encoder: Any, texts: list[str], check: Any) -> Any:
        found.extend(texts)
        return encode(encoder, texts, check)

    monkeypatch.setattr(DocumentEncoder, "encode", noting)
    return found
