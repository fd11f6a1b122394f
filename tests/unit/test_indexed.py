"""Megatron's bin/idx: the bytes Megatron-Core writes, and back."""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.lib.errors import DataError
from scripts.lib.indexed import IndexedReader, IndexedWriter, token_dtype

DOCUMENTS = [[1, 2, 3], [], [65_498], [], [], [7] * 100]


def write(prefix, documents, vocab_size=65_499, batch=2):
    writer = IndexedWriter(prefix, vocab_size)
    for first in range(0, len(documents), batch):
        writer.add(documents[first : first + batch])
    writer.finish()
    return prefix


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_498), max_size=20), max_size=12),
    vocab_size=st.sampled_from([65_499, 65_500, 200_000]),
    batch=st.integers(1, 5),
)
def test_what_is_written_is_read_back(tmp_path_factory, documents, vocab_size, batch):
    prefix = tmp_path_factory.mktemp("indexed") / "a.b"
    write(prefix, documents, vocab_size, batch)
    reader = IndexedReader(prefix)
    sequences = [ids for ids in documents if ids]
    assert [reader[i].tolist() for i in range(len(reader))] == sequences
    assert reader.tokens.tolist() == [token for ids in documents for token in ids]
    assert reader.sizes.tolist() == list(map(len, sequences))
    starts = np.cumsum([0, *(bool(ids) for ids in documents)])
    assert reader.documents.tolist() == starts.tolist()
    assert reader.dtype == token_dtype(vocab_size)


@pytest.mark.parametrize("vocab_size", [65_499, 65_500, 128_256])
def test_bytes_are_those_of_megatron_core(tmp_path, vocab_size):
    """Needs megatron-core, without its dependencies: it is in the development lock."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size)
    )
    for ids in DOCUMENTS:
        builder.add_document(np.array(ids), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path / "ours", DOCUMENTS, vocab_size)
    for suffix in (".bin", ".idx"):
        theirs = (tmp_path / f"theirs{suffix}").read_bytes()
        assert (tmp_path / f"ours{suffix}").read_bytes() == theirs


def test_the_type_changes_at_megatrons_vocabulary():
    assert [token_dtype(n).name for n in (65_499, 65_500)] == ["uint16", "int32"]


def test_an_id_outside_the_vocabulary_is_never_written(tmp_path):
    for ids in ([512], [-1]):
        with pytest.raises(ValueError, match=f"{ids[0]} is outside"):
            write(tmp_path / "a", [[1], ids], vocab_size=512)


def test_no_name_is_there_before_the_files_are_whole(tmp_path):
    writer = IndexedWriter(tmp_path / "a", 512)
    writer.add([[1, 2]])
    assert not list(tmp_path.glob("a.bin")) + list(tmp_path.glob("a.idx"))
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_damaged_file_is_refused(tmp_path, suffix):
    prefix = write(tmp_path / "a", DOCUMENTS)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"a{suffix}"):
        IndexedReader(prefix)
    path.write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=f"a{suffix}"):
        IndexedReader(prefix)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        IndexedReader(prefix)
