"""Rows of a dataset, in order: from files, folders and Hugging Face datasets.

A file is .jsonl or .json (one object a line), .txt or .parquet; all but parquet
may end in .gz or .zst. A .txt file is one document: prose has no line that ends
one. A folder stands for the data files right in it, sorted by name; for a source
with `hf` it is a Hugging Face dataset's folder.

A bad row (not JSON, not an object, not UTF-8, a column missing or of the wrong
type, or what the stage's `take` refuses) is named by file and line and left out;
more than `max_bad_rows` of them are an error. What is wrong with a whole file
(missing, empty, cut short, another encoding) is an error at once. Blank lines are
skipped. Memory does not grow with a file's size, but for one row or one .txt.
"""

from __future__ import annotations

import io
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from scripts.lib.errors import DataError, RecipeError
from scripts.lib.schema import HUB_NAME, Source

Taken = TypeVar("Taken")
Row = dict[str, Any]

LINES, PARQUET, TEXT = "lines", "parquet", "text"
FORMATS = {".jsonl": LINES, ".json": LINES, ".parquet": PARQUET, ".txt": TEXT}
IN_FOLDERS = (".jsonl", ".parquet", ".txt")
PACKED = {".gz": "gzip", ".zst": "zstd"}
READABLE = ".jsonl, .json or .txt (plain, .gz or .zst), or .parquet"

BLOCK = 1 << 18
EXAMPLES = 5
LOOK_ON_ROWS = 10_000
KINDS: dict[type, str] = {str: "a string", list: "a list"}


class BadRow(Exception):
    """A row that cannot be used; the message says why."""


def field(row: Row, column: str, kind: type = str) -> Any:
    """The value of a row's column. Raises BadRow where it is not there or no `kind`."""
    if column not in row:
        found = ", ".join(list(row)[:10]) or "none"
        raise BadRow(f"column `{column}` is missing; found: {found}")
    value = row[column]
    if not isinstance(value, kind):
        found = "null" if value is None else type(value).__name__
        raise BadRow(f"column `{column}` is {found}, not {KINDS[kind]}")
    return value


def named_sources(
    sources: Mapping[str, Source], data: Mapping[str, list[Path]]
) -> list[tuple[str, Source, list[Path]]]:
    """Each source of a recipe with the paths that `--data NAME=PATH` gave it.

    A recipe without `sources` reads what `--data` names, all by default. Raises
    RecipeError for a `--data` that the recipe does not list, and for none at all.
    """
    sources = sources or {name: Source.model_validate({}) for name in data}
    unknown = [name for name in data if name not in sources]
    if unknown:
        raise RecipeError(
            f"--data {unknown[0]}",
            "not a dataset of the recipe",
            f"its sources: {', '.join(sources)}",
        )
    if not sources:
        raise RecipeError("--data", "no dataset given", "add --data NAME=PATH")
    return [(name, source, data.get(name, [])) for name, source in sources.items()]


def files_of(name: str, source: Source, paths: list[Path]) -> list[Path]:
    """The files a source reads, in reading order; none for a hub dataset.

    Raises DataError where a path is missing or is no data file.
    """
    if source.hf:
        folder = local_folder(source, paths)
        if folder is None:
            return []
        if not folder.is_dir():
            raise DataError(str(folder), f"no such folder (dataset `{name}`)")
        return sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise DataError(
            f"dataset `{name}`", "no files were given", "add --data NAME=PATH"
        )
    result = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if _stem(p).suffix in IN_FOLDERS)
            if not inside:
                raise DataError(
                    str(path), "the folder holds no data files", f"read are {READABLE}"
                )
            result += inside
        elif path.exists():
            result.append(path)
        else:
            raise DataError(str(path), f"no such file (dataset `{name}`)")
    return result


def local_folder(source: Source, paths: list[Path]) -> Path | None:
    """Folder of a Hugging Face dataset on this machine; None for one on the hub."""
    if paths:
        return paths[0]
    if source.hf and not HUB_NAME.match(source.hf):
        return Path(source.hf)
    return None


def can_be_cut(path: Path) -> bool:
    """Whether some rows of a file can be read without the others."""
    return FORMATS.get(path.suffix) in (LINES, PARQUET)


def is_parquet(path: Path) -> bool:
    """Whether a file is read as parquet."""
    return FORMATS.get(path.suffix) == PARQUET


class RowGroups:
    """A parquet file's row groups, as its footer tells of them.

    Raises DataError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with _parquet_errors(path):
            from pyarrow import parquet

            self._footer = parquet.read_metadata(path)
        self._columns = range(self._footer.num_columns)

    def between(self, num_bytes: int) -> list[range]:
        """Neighbours of so many bytes together, or just above."""
        found, first, size = [], 0, 0
        for group in range(self._footer.num_row_groups):
            size += len(self.bytes_of(range(group, group + 1)))
            if size >= num_bytes:
                found.append(range(first, group + 1))
                first, size = group + 1, 0
        if size:
            found.append(range(first, self._footer.num_row_groups))
        return found

    def bytes_of(self, groups: range) -> range:
        """Where in the file some neighbours are."""
        found = [
            (
                min(filter(None, (c.dictionary_page_offset, c.data_page_offset))),
                c.total_compressed_size,
            )
            for group in map(self._footer.row_group, groups)
            for c in map(group.column, self._columns)
        ]
        return range(min(a for a, _ in found), max(a + size for a, size in found))

    def told_of(self, groups: range) -> list[Any]:
        """What says how to read their bytes."""
        return [
            str(self._footer.schema.to_arrow_schema()),
            *(self._footer.row_group(group).to_dict() for group in groups),
        ]

    def num_rows(self, groups: range) -> int:
        """How many rows they have."""
        return sum(self._footer.row_group(group).num_rows for group in groups)


def lines_from(path: Path, start: int, stop: int) -> range:
    """The bytes of the lines that begin at `start` or later, but before `stop`.

    Raises DataError where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return range(0)
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:

                def line_from(at: int) -> int:
                    before = content.find(b"\n", at - 1) if at else -1
                    return before + 1 if before >= 0 or not at else size

                return range(line_from(start), line_from(min(stop, size)))
    except OSError as error:
        raise _unreadable(path, error) from error


def num_lines(path: Path, start: int, stop: int) -> int:
    """Line ends among these bytes of a file."""
    found = 0
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(stop - start, BLOCK)):
            start += len(block)
            found += block.count(b"\n")
    return found


def read_rows(
    name: str,
    source: Source,
    paths: list[Path],
    take: Callable[[Row], Taken],
    part: range | None = None,
) -> RowReader[Taken]:
    """Read a source; iterate the result for pairs `(take(row), "file:line")`.

    `take` picks from a row what the stage needs, and raises BadRow for a row it
    cannot use. Raises DataError as the module says, while it is iterated. `part`: of
    the one file, what is wanted: the bytes of lines, as `lines_from` has them, or row
    groups of a parquet file.
    """
    return RowReader(name, source, paths, take, part)


class RowReader(Generic[Taken]):
    """One source's rows, once; counts `num_rows`, `num_bad` and bytes on the way."""

    def __init__(
        self,
        name: str,
        source: Source,
        paths: list[Path],
        take: Callable[[Row], Taken],
        part: range | None = None,
    ) -> None:
        self.name, self.source, self.paths, self.take = name, source, paths, take
        self.part, self.place = part, ""
        self.num_rows = self.num_bad = 0
        self.files = files_of(name, source, paths)
        self.bytes_total = sum(path.stat().st_size for path in self.files)
        self._bytes_before = 0
        self._position: Callable[[], int] = lambda: 0
        self._examples: list[str] = []

    @property
    def bytes_read(self) -> int:
        """Bytes of the files read so far, as they lie on disk; 0 for hub datasets."""
        return self._bytes_before + self._position()

    def numbered(self) -> Iterator[tuple[int, Taken | BadRow]]:
        """Each row's number in its file, from 1, and what was taken, or what is wrong.

        `place` is the file that it is from, and a .txt its row 0. Of a part, the
        first is number 1.
        """
        take = self.take
        for number, row in self._rows():
            try:
                if not isinstance(row, dict):
                    raise _no_object(row)
                taken = take(row)
            except BadRow as bad:
                yield number, bad
            else:
                yield number, taken

    def __iter__(self) -> Iterator[tuple[Taken, str]]:
        looked_on = 0
        for number, taken in self.numbered():
            where = place_of(self.place, number)
            if isinstance(taken, BadRow):
                self._leave_out(f"{where}: {taken}")
            elif self.num_bad <= self.source.max_bad_rows:
                self.num_rows += 1
                yield taken, where
            if self.num_bad > self.source.max_bad_rows:
                looked_on += 1
                enough = self.num_bad >= self.source.max_bad_rows + EXAMPLES
                if enough or looked_on > LOOK_ON_ROWS:
                    break
        if self.num_bad > self.source.max_bad_rows:
            raise too_many_bad_rows(self.name, self.source, self._examples)
        if not self.num_rows:
            raise DataError(f"dataset `{self.name}`", "holds no usable row")

    def _leave_out(self, what: str) -> None:
        self.num_bad += 1
        if len(self._examples) < EXAMPLES:
            self._examples.append(what)
        if self.num_bad <= self.source.max_bad_rows:
            tell_bad_row(what)

    def _rows(self) -> Iterator[tuple[int, Any]]:
        if self.source.hf:
            yield from self._dataset()
            return
        readers = {LINES: self._lines, PARQUET: self._parquet, TEXT: self._text}
        for path in self.files:
            self.place = str(path)
            items = readers[_format(path)](path)
            for first in items:
                yield first
                yield from items
                break
            else:
                if self.part is None:
                    raise no_rows(path)
            self._position = lambda: 0
            self._bytes_before += path.stat().st_size

    @contextmanager
    def _open(self, path: Path) -> Iterator[IO[bytes]]:
        """A file's bytes, unpacked; what cannot be read is a DataError."""
        try:
            with path.open("rb", BLOCK) as raw:
                self._position = lambda: 0 if raw.closed else raw.tell()
                if path.suffix in PACKED:
                    import pyarrow

                    unpacked: Any = pyarrow.CompressedInputStream(
                        pyarrow.PythonFile(raw, "r"), PACKED[path.suffix]
                    )
                    yield io.BufferedReader(unpacked, 1 << 20)
                else:
                    yield raw
        except OSError as error:
            raise _unreadable(path, error) from error

    def _lines(self, path: Path) -> Iterator[tuple[int, Any]]:
        import orjson

        loads, fault = orjson.loads, orjson.JSONDecodeError
        with self._open(path) as stream:
            left = sys.maxsize
            if self.part is not None:
                stream.seek(self.part.start)
                left = len(self.part)
            for number, line in enumerate(stream if left else (), 1):
                left -= len(line)
                if number == 1 and not (self.part and self.part.start):
                    line = _first_line(path, line)
                try:
                    yield number, loads(line)
                except fault as error:
                    if line and not line.isspace():
                        yield number, BadRow(_json_fault(line, error))
                if left <= 0:
                    break

    def _text(self, path: Path) -> Iterator[tuple[int, Any]]:
        with self._open(path) as stream:
            content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                str(path),
                f"not UTF-8: {error.reason} at byte {error.start}",
                "convert it with `iconv -t utf-8`",
            ) from error
        if text:
            yield 0, {self.source.column or "text": text}

    def _parquet(self, path: Path) -> Iterator[tuple[int, Any]]:
        from pyarrow import parquet

        number, size = 0, path.stat().st_size
        with _parquet_errors(path), parquet.ParquetFile(path) as file:
            num_rows = max(1, file.metadata.num_rows)
            self._position = lambda: size * number // num_rows
            for batch in file.iter_batches(batch_size=256, row_groups=self.part):
                for row in _batch_rows(batch):
                    number += 1
                    yield number, row

    def _dataset(self) -> Iterator[tuple[int, Any]]:
        """Rows of a Hugging Face dataset; code of its own is never run."""
        import datasets

        source, folder = self.source, local_folder(self.source, self.paths)
        self.place = where = f"{folder or source.hf}[{source.split}]"
        if folder is None and source.revision is None:
            raise RecipeError(
                f"data.{self.name}.revision",
                f"missing: `{source.hf}` may change on the hub",
                "name a commit of the dataset, 40 hex digits",
            )
        try:
            if folder is None:
                rows: Any = datasets.load_dataset(
                    source.hf, split=source.split, revision=source.revision
                )
            elif (folder / "dataset_dict.json").exists():
                rows = datasets.load_from_disk(str(folder))[source.split]
            elif (folder / "state.json").exists():
                rows = datasets.load_from_disk(str(folder))
            else:
                rows = datasets.load_dataset(
                    str(folder), split=source.split, streaming=True
                )
            yield from enumerate(rows, 1)
        except GeneratorExit:
            raise
        except Exception as error:
            raise DataError(
                where,
                f"cannot be read: {type(error).__name__}: {error}",
                "is the name, split and revision right, and the hub within reach?",
            ) from error


def place_of(file: str, number: int) -> str:
    """How a message names a row."""
    return f"{file}:{number}" if number else file


def tell_bad_row(what: str) -> None:
    """Say that a row was left out, and why."""
    print(f"bad row left out: {what}", file=sys.stderr)


def no_rows(path: Path) -> DataError:
    """The error that tells of a file with blank lines alone."""
    return DataError(str(path), "holds no rows")


def too_many_bad_rows(name: str, source: Source, some: list[str]) -> DataError:
    """The error that names some of a source's bad rows."""
    return DataError(
        f"dataset `{name}`",
        f"bad rows, more than the {source.max_bad_rows} allowed:\n  "
        + "\n  ".join(some[:EXAMPLES]),
        f"mend the rows, or allow them to be left out with `max_bad_rows` of data.{name}",
    )


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"cannot be read as parquet: {error}") from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        str(path),
        f"cannot be read to its end: {error}",
        "if the file is cut short or damaged, copy it again",
    )


def _no_object(row: Any) -> BadRow:
    if isinstance(row, BadRow):
        return row
    return BadRow(f"is {type(row).__name__}, not an object")


def _stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in PACKED else path


def _format(path: Path) -> str:
    result = FORMATS.get(_stem(path).suffix)
    if result is None or (result == PARQUET and path.suffix in PACKED):
        raise DataError(
            str(path), "not a kind of file read here", f"read are {READABLE}"
        )
    if not path.stat().st_size:
        raise DataError(str(path), "the file is empty")
    return result


def _first_line(path: Path, line: bytes) -> bytes:
    """A file's first line without its byte order mark; tells what no lines follow."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            str(path), "UTF-16, not UTF-8", "convert it with `iconv -t utf-8`"
        )
    line = line.removeprefix(b"\xef\xbb\xbf")
    if line.strip() in (b"[", b"[{"):
        raise DataError(
            str(path), "one JSON array, not an object a line", "convert it: jq -c '.[]'"
        )
    return line


def _json_fault(line: bytes, error: Any) -> str:
    try:
        line.decode()
    except UnicodeDecodeError as fault:
        return f"not UTF-8: {fault.reason} at byte {fault.start} of the line"
    if "surrogate" in error.msg:
        return f"a lone surrogate at character {error.pos} of the line"
    return f"not JSON: {error.msg} at character {error.pos} of the line"


def _batch_rows(batch: Any) -> list[Any]:
    rows: list[Any] = []
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                rows += batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as fault:
                rows.append(BadRow(f"not UTF-8: {fault.reason}"))
    return rows
