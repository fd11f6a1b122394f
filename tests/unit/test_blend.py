"""How pretraining draws its sequences: order, weights, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedWriter
from scripts.lib.schema import PretrainRecipe
from scripts.transformers.common import repeated
from scripts.transformers.pretrain import Sequences, blend_order, load_sequences

LENGTH = 4


def write_blend(folder: Path, weights: dict[str, float], documents: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    sources = []
    for number, (name, weight) in enumerate(weights.items()):
        writer = IndexedWriter(folder / name, vocab_size=1000)
        first = 100 * (number + 1)
        rows = [[first + i] * (1 + i % 5) for i in range(documents)]
        writer.add(rows)
        writer.finish()
        sources.append({"name": name, "prefix": name, "weight": weight})
    (folder / "blend.json").write_text(json.dumps({"sources": sources}))
    return folder


def recipe(steps: int, **changes: int) -> PretrainRecipe:
    return PretrainRecipe.model_validate(
        {"steps": steps, "batch_size": 2, "lr": 1e-3, "sequence_length": LENGTH}
        | changes
    )


def tokens(sequences: Sequences) -> list[list[int]]:
    return [sequences[i]["input_ids"].tolist() for i in range(len(sequences))]


def test_every_beginning_of_the_order_is_near_the_weights() -> None:
    weights = [5.0, 3.0, 2.0]
    order = blend_order(weights, 200)
    for count in range(1, 201):
        for source, weight in enumerate(weights):
            assert abs(order[:count].count(source) - weight / 10 * count) < 1.0


def test_sequences_come_from_sources_by_weight(tmp_path: Path) -> None:
    data = write_blend(tmp_path, {"a": 3.0, "b": 1.0})
    rows = tokens(load_sequences(data, recipe(steps=20)))
    from_a = [max(row) < 200 for row in rows]
    assert sum(from_a) == 30
    assert all((max(row) < 200) == (min(row) < 200) for row in rows)


def test_each_epoch_holds_every_token_once_in_another_order(tmp_path: Path) -> None:
    data = write_blend(tmp_path, {"a": 1.0})
    rows = tokens(load_sequences(data, recipe(steps=30)))
    stream = [token for row in rows for token in row]
    epoch = sum(1 + i % 5 for i in range(20))
    first, second = stream[:epoch], stream[epoch : 2 * epoch]
    assert sorted(first) == sorted(second)
    assert first != second
    assert np.unique(first).size == 20


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    data = write_blend(tmp_path, {"a": 1.0, "b": 1.0})
    first = tokens(load_sequences(data, recipe(steps=10)))
    assert first == tokens(load_sequences(data, recipe(steps=10)))
    assert first == tokens(load_sequences(data, recipe(steps=20)))[: len(first)]
    assert first != tokens(load_sequences(data, recipe(steps=10, seed=2)))


def test_fewer_tokens_than_a_sequence_is_an_error(tmp_path: Path) -> None:
    data = write_blend(tmp_path, {"a": 1.0}, documents=1)
    with pytest.raises(DataError, match="fewer than one sequence"):
        load_sequences(data, recipe(steps=1))


def test_repeated_rows_are_epochs_of_shuffled_rows() -> None:
    order = repeated(10, 25, seed=3)
    assert len(order) == 25
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20]
    assert order[:15] == repeated(10, 15, seed=3)
