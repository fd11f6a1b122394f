r"""Tokenize chats and pack them into rows of equal length for SFT.

Reads   --tokenizer  Hugging Face tokenizer folder; its chat template has
                     `{% generation %}` around what the assistant says
        --data       NAME=PATH, repeated: rows with `messages`, a list of
                     {role: system, user, assistant or tool; content}. The
                     assistant's may have `tool_calls`, and then no content; a row's
                     `tools`, a list or its JSON, is what the template gets as such
        --recipe     YAML of one `pack:` node
Writes  --out        packed.parquet  a row: input_ids, loss_mask, seq_start_id,
                                     each list<int32>
                     packing.json    chats, rows, tokens, loss_tokens, bad_rows,
                                     sequence_length, fill; where `too_long` is not
                                     `refuse`, also too_long: dropped, truncated and
                                     the first few by file and line
                     In --work, while it runs, chats.bin: 4 bytes a token
Raises  DataError for bad rows (no assistant turn, an empty one, a wrong role,
        tools or calls that the template leaves out), for
        a chat longer than sequence_length unless `too_long` says what to do with
        it, for a tokenizer without such a template
Resumes never: it starts again

A row is what Megatron-Bridge's GPTSFTPackedParquetDataset reads. It holds whole
chats, at most sequence_length tokens, without padding. seq_start_id is where each
chat starts. loss_mask stands one to the left, beside its label's predecessor, as
Bridge writes it: loss_mask[i] is 1 where input_ids[i + 1] is the assistant's, and 0
at each chat's last token, which predicts nothing.

Chats are packed by best fit decreasing; rows are then shuffled by the seed. Memory
holds a chat's length, not its tokens. fastokens makes the ids of a byte-level BPE,
checked against Hugging Face's tokenizers (`scripts.data.fast`), which encode all chats
where one differs.

    python -m scripts.data.pack --tokenizer T --data chat=chat.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
from array import array
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from scripts.data.chats import load_tokenizer
from scripts.data.fast import Checks, Encoder, num_cores, use_threads
from scripts.lib import cli
from scripts.lib.errors import DataError
from scripts.lib.progress import Progress
from scripts.lib.rows import BadRow, Row, field, named_sources, read_rows
from scripts.lib.schema import PackRecipe

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ROLES = ("system", "user", "assistant", "tool")
BATCH_CHATS = 512
BATCH_CHARACTERS = 4_000_000
GROUP_ROWS = 500
GROUP_TOKENS = 1 << 21
NAMED = 5

Spans = list[tuple[int, int]]
Ints = npt.NDArray[np.int32]


class Rendered(NamedTuple):
    """A chat's text and the spans of it, in characters, that the assistant says."""

    text: str
    spans: Spans


class Encoded(NamedTuple):
    """Chats one after another: ids, which the assistant says, where each ends."""

    ids: Ints
    said: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.int64]


class InexactError(Exception):
    """fastokens and Hugging Face do not agree; the message says how."""


class ChatEncoder:
    """Renders chats and tokenizes them, each once, with the assistant's tokens."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        self.template = self.tokenizer.chat_template
        if not isinstance(self.template, str) or not GENERATION.search(self.template):
            raise DataError(
                str(folder),
                "its chat template has no `{% generation %}`",
                "give the tokenizer node a `chat_template` with `{% generation %}`",
            )
        self.special_tokens = self.tokenizer.special_tokens_map
        self.encoder = Encoder(self.tokenizer.backend_tokenizer, False)
        self.checks = Checks()
        self.num_bytes = bytes_of_tokens(self.encoder.tokenizer)
        if self.encoder.refusal:
            print(
                f"fastokens refuses this tokenizer ({self.encoder.refusal}): Hugging "
                "Face's encodes it all, more slowly",
                file=sys.stderr,
            )
            self.num_bytes = None

    def render(self, row: Row, column: str) -> Rendered:
        """A chat's text and the spans of it that the assistant says."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages, tools = checked(row, column), tools_of(row)
        calls = any(message.get("tool_calls") for message in messages)
        for name, used in (("tools", tools), ("tool_calls", calls)):
            if used and not re.search(rf"\b{name}\b", self.template):
                raise BadRow(f"the chat template leaves out its `{name}`")
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from error
        if not any(start < end for start, end in spans[0]):
            raise BadRow("the chat template marks nothing as the assistant's")
        return Rendered(texts[0], spans[0])

    def encode(self, rendered: list[Rendered]) -> Encoded:
        """Ids of rendered chats, and whether each token has a letter in a span.

        apply_chat_template's own mask looks characters up one by one: it loses a
        span that starts with a blank where offsets are trimmed, and the last bytes
        of a letter of several tokens. Here every token has the letters from the
        token before it to its end. Raises InexactError.
        """
        if self.num_bytes is None:
            return self.encode_by_offsets(rendered)
        texts = [text for text, _spans in rendered]
        ids, lengths, fault = self.encoder.checked(texts, self.checks.choose(texts))
        if fault:
            raise InexactError(fault)
        ends = np.cumsum(lengths)
        spans, text_ends = byte_spans(rendered)
        num_bytes = self.num_bytes[ids]
        token_ends = np.cumsum(num_bytes, dtype=np.int64)
        if not np.array_equal(np.append(0, token_ends)[ends], text_ends):
            raise InexactError("fastokens' ids are not a chat's bytes")
        firsts = np.searchsorted(token_ends, spans[:, 0], "right")
        lasts = np.searchsorted(token_ends - num_bytes, spans[:, 1], "left")
        said = np.zeros(len(ids), np.bool_)
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            said[first:last] = True
        return Encoded(ids.astype(np.int32), said, ends)

    def encode_by_offsets(self, rendered: list[Rendered]) -> Encoded:
        """The same by Hugging Face alone, for any tokenizer, some 20 times slower."""
        ids, said, ends = array("i"), array("b"), array("q")
        for encoding, (_text, spans) in zip(
            self.encoder.tokenizer.encode_batch(
                [text for text, _spans in rendered], add_special_tokens=False
            ),
            rendered,
            strict=True,
        ):
            ids.extend(encoding.ids)
            said.extend(token_mask(encoding.offsets, spans))
            ends.append(len(ids))
        return Encoded(
            np.frombuffer(ids, np.int32),
            np.frombuffer(said, np.bool_),
            np.frombuffer(ends, np.int64),
        )


def main(argv: list[str] | None = None) -> int:
    """Read, tokenize, pack and write."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, PackRecipe)
    data = cli.named_paths(args.data)
    use_threads(num_cores())
    encoder = ChatEncoder(args.tokenizer)
    progress = Progress(args.work)
    with Chats(args.work / "chats.bin", recipe) as chats:
        try:
            num_bad = collect(chats, encoder, recipe, data, progress)
        except InexactError as error:
            print(
                f"{error}; Hugging Face's tokenizer encodes all chats, from the first",
                file=sys.stderr,
            )
            encoder.num_bytes = None
            chats.clear()
            num_bad = collect(chats, encoder, recipe, data, progress)
        chats.check()
        order, num_chats = rows_of_chats(
            np.frombuffer(chats.lengths, np.int32), recipe.sequence_length, recipe.seed
        )
        write_rows(chats, order, num_chats, args.out / "packed.parquet")
        num_rows = len(num_chats)
        counts = {
            "chats": len(chats.lengths),
            "rows": num_rows,
            "tokens": chats.num_tokens,
            "loss_tokens": chats.num_loss_tokens,
            "bad_rows": num_bad,
            "sequence_length": recipe.sequence_length,
            "fill": round(chats.num_tokens / (num_rows * recipe.sequence_length), 6),
        }
        if recipe.too_long != "refuse":
            counts["too_long"] = chats.told()
    (args.out / "packing.json").write_text(json.dumps(counts, indent=2) + "\n")
    progress.report(1, 1, chats=counts["chats"])
    return 0


def collect(
    chats: Chats,
    encoder: ChatEncoder,
    recipe: PackRecipe,
    data: dict[str, list[Path]],
    progress: Progress,
) -> int:
    """Tokenize every source's chats into `chats`; the number of bad rows."""
    num_bad = done = 0
    for name, source, paths in named_sources(recipe.sources, data):
        column = source.column or "messages"
        rows = read_rows(
            name, source, paths, lambda row, c=column: encoder.render(row, c)
        )
        for rendered, wheres in batches(rows):
            chats.add(encoder.encode(rendered), wheres)
            progress.report(
                done + rows.bytes_read,
                done + max(rows.bytes_total, rows.bytes_read) + 1,
                chats=len(chats.lengths),
            )
        num_bad += rows.num_bad
        done += rows.bytes_total
    return num_bad


def batches(
    rows: Iterable[tuple[Rendered, str]],
) -> Iterator[tuple[list[Rendered], list[str]]]:
    """Chats, and where they are from, in groups small enough to hold."""
    rendered: list[Rendered] = []
    wheres: list[str] = []
    characters = 0
    for chat, where in rows:
        rendered.append(chat)
        wheres.append(where)
        characters += len(chat.text)
        if len(rendered) == BATCH_CHATS or characters > BATCH_CHARACTERS:
            yield rendered, wheres
            rendered, wheres, characters = [], [], 0
    if rendered:
        yield rendered, wheres


def checked(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages of a chat that can be trained on. Raises BadRow."""
    messages = field(row, column, list)
    result = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} is no object")
        role = message.get("role")
        if role not in ROLES:
            raise BadRow(
                f"message {number} has role {role!r}; known: {', '.join(ROLES)}"
            )
        content = message.get("content")
        if role == "assistant" and message.get("tool_calls") and content is None:
            content = ""
        if not isinstance(content, str):
            raise BadRow(f"message {number} ({role}) has no text as content")
        if role == "assistant" and not (content.strip() or message.get("tool_calls")):
            raise BadRow(f"message {number} (assistant) is empty")
        given = {key: value for key, value in message.items() if value is not None}
        result.append({**given, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no message of the assistant")
    return result


def tools_of(row: Row) -> list[Any] | None:
    """The tools of a row, if it has some. Raises BadRow."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow(f"column `tools` is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"column `tools` is {type(tools).__name__}, not a list")
    return tools or None


def token_mask(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
) -> list[int]:
    """1 for each token that has a character in a span; spans are in order."""
    mask = [0] * len(offsets)
    remaining = iter([span for span in spans if span[0] < span[1]])
    span = next(remaining, None)
    previous_end = 0
    for position, (start, end) in enumerate(offsets):
        if start == end:  # a blank, trimmed to nothing
            start = min(previous_end, max(0, end - 1))
        while span is not None and span[1] <= start:
            span = next(remaining, None)
        if span is None:
            break
        mask[position] = int(start < span[1] and end > span[0])
        previous_end = end
    return mask


def keeps_bytes(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is of a BPE whose tokens are the text's bytes."""
    model, before = content["model"], content["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    return (
        content["normalizer"] is None
        and model["type"] == "BPE"
        and not any(
            model.get(key)
            for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
        )
        and steps[-1].get("type") == "ByteLevel"
        and all(
            step["type"] in ("ByteLevel", "Digits", "Split")
            and not step.get("add_prefix_space")
            and step.get("behavior") != "Removed"
            for step in steps
        )
        and not any(t["lstrip"] or t["rstrip"] for t in content["added_tokens"])
    )


def bytes_of_tokens(tokenizer: Any) -> Ints | None:
    """The number of bytes of each token; None where tokens are not the text's bytes.

    A byte-level BPE loses and changes no byte, so that its tokens' lengths tell which
    bytes each one is.
    """
    content = json.loads(tokenizer.to_str())
    if not keeps_bytes(content):
        return None
    lengths = {id: len(token) for token, id in content["model"]["vocab"].items()}
    lengths |= {t["id"]: len(t["content"].encode()) for t in content["added_tokens"]}
    result = np.zeros(1 + max(lengths), np.int32)
    result[list(lengths)] = list(lengths.values())
    return result


def byte_spans(
    rendered: list[Rendered],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Spans in bytes of all texts one after another, and where each text ends."""
    spans: list[tuple[int, int]] = []
    ends: list[int] = []
    base = 0
    for text, found in rendered:
        wanted = [span for span in found if span[0] < span[1]]
        if text.isascii():
            spans += [(base + start, base + end) for start, end in wanted]
            base += len(text)
        else:
            edges = sorted({0, len(text), *(edge for span in wanted for edge in span)})
            at = {0: base}
            for before, after in pairwise(edges):
                at[after] = at[before] + len(text[before:after].encode())
            spans += [(at[start], at[end]) for start, end in wanted]
            base = at[len(text)]
        ends.append(base)
    return np.array(spans, np.int64).reshape(-1, 2), np.array(ends, np.int64)


class Chats:
    """All chats' tokens in a file, and their lengths.

    A token is an int32 there: twice its id, and one more where its mask is set.
    """

    def __init__(self, path: Path, recipe: PackRecipe) -> None:
        self.path, self.recipe = path, recipe
        self.file = path.open("w+b")
        self.clear()

    def __enter__(self) -> Chats:
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()
        self.path.unlink()

    def clear(self) -> None:
        """Forget every chat."""
        self.file.seek(0)
        self.file.truncate()
        self.lengths = array("i")
        self.num_tokens = self.num_loss_tokens = 0
        self.num_dropped = self.num_truncated = self.longest = 0
        self.named: list[tuple[str, int]] = []

    def add(self, encoded: Encoded, wheres: list[str]) -> None:
        """Append chats; one that is too long as the recipe says."""
        ends = encoded.ends
        tokens = encoded.ids * 2
        tokens[:-1] += encoded.said[1:]
        tokens[ends - 1] &= ~1  # a last token predicts nothing
        lengths = np.diff(ends, prepend=0)
        limit = self.recipe.sequence_length
        if lengths.max() <= limit:
            self.append(tokens, lengths.tolist())
            return
        for end, length, where in zip(
            ends.tolist(), lengths.tolist(), wheres, strict=True
        ):
            chat = tokens[end - length : end]
            if length > limit:
                chat = self.shortened(chat, where)
            if len(chat):
                self.append(chat, [len(chat)])

    def append(self, tokens: Ints, lengths: list[int]) -> None:
        """Write chats that fit, one after another."""
        self.file.write(tokens)
        self.lengths.extend(lengths)
        self.num_tokens += len(tokens)
        self.num_loss_tokens += int((tokens & 1).sum())

    def shortened(self, chat: Ints, where: str) -> Ints:
        """What is left of a chat that is too long; it is counted."""
        self.longest = max(self.longest, len(chat))
        if len(self.named) < NAMED:
            self.named.append((where, len(chat)))
        limit = self.recipe.sequence_length
        cut = chat[:limit].copy()
        cut[-1] &= ~1
        if self.recipe.too_long == "truncate" and (cut & 1).any():
            self.num_truncated += 1
            return cut
        self.num_dropped += 1
        return chat[:0]

    def check(self) -> None:
        """Say which chats did not fit a row. Raises DataError if that is an error."""
        num_long = self.num_dropped + self.num_truncated
        if not num_long:
            return
        total = self.num_dropped + len(self.lengths)
        named = "".join(f"\n  {where}: {size} tokens" for where, size in self.named)
        what = (
            f"{num_long} of {total} chats are longer than "
            f"{self.recipe.sequence_length} tokens"
        )
        if self.recipe.too_long == "refuse" or not self.lengths:
            raise DataError(
                "sequence_length",
                f"{what}:{named}",
                f"the longest needs sequence_length {self.longest}; or take such "
                "chats out, or let `too_long` drop or truncate them",
            )
        print(
            f"{what}: {self.num_truncated} cut, {self.num_dropped} left out:{named}",
            file=sys.stderr,
        )

    def told(self) -> dict[str, Any]:
        """What became of chats that are too long, for packing.json.

        Files go by their names alone, for the same bytes wherever they lie.
        """
        return {
            "dropped": self.num_dropped,
            "truncated": self.num_truncated,
            "first": [
                f"{Path(where).name}: {size} tokens" for where, size in self.named
            ],
        }

    def read(self, starts: npt.NDArray[np.int64], lengths: Ints) -> Ints:
        """The tokens of some chats, one after another."""
        self.file.flush()
        result = np.empty(lengths.sum(), np.int32)
        left = memoryview(result).cast("B")
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            size = 4 * length
            found = os.preadv(self.file.fileno(), [left[:size]], 4 * start)
            assert found == size, f"{self.path} was cut short"
            left = left[size:]
        return result


def rows_of_chats(
    lengths: Ints, capacity: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All chats in the order of their rows, and how many each row has."""
    by_length = np.argsort(-lengths, kind="stable")
    row_of, num_rows = best_fit(lengths[by_length].tolist(), capacity)
    shuffled = list(range(num_rows))
    random.Random(seed).shuffle(shuffled)
    place = np.empty(num_rows, np.int64)
    place[shuffled] = np.arange(num_rows)
    places = place[np.frombuffer(row_of, np.int32)]
    order = by_length[np.argsort(places, kind="stable")]
    return order, np.bincount(places, minlength=num_rows)


def best_fit(lengths: list[int], capacity: int) -> tuple[array[int], int]:
    """Put each sequence, in this order, in the fullest row that still has room.

    The row of each, and the number of rows. Rows are kept by free space; bit n of an
    integer says that a row with n free is there, so that the best is one shift away.
    """
    row_of = array("i")
    num_rows = present = 0
    with_free: dict[int, list[int]] = {}
    for length in lengths:
        fitting = present >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = with_free[free].pop()
            if not with_free[free]:
                present &= ~(1 << free)
        else:
            free, row = capacity, num_rows
            num_rows += 1
        row_of.append(row)
        left = free - length
        if left:
            with_free.setdefault(left, []).append(row)
            present |= 1 << left
    return row_of, num_rows


def write_rows(
    chats: Chats,
    order: npt.NDArray[np.int64],
    num_chats: npt.NDArray[np.int64],
    path: Path,
) -> None:
    """Write the packed rows, some at a time."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [
            (name, pyarrow.list_(pyarrow.int32()))
            for name in ("input_ids", "loss_mask", "seq_start_id")
        ]
    )
    temporary = path.with_name(path.name + ".tmp")
    with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for columns in row_groups(chats, order, num_chats):
            arrays = [
                pyarrow.ListArray.from_arrays(as_arrow(offsets), as_arrow(values))
                for offsets, values in columns
            ]
            writer.write_table(pyarrow.table(arrays, schema=schema))
    temporary.replace(path)


def as_arrow(values: Ints) -> Any:
    """The same numbers for pyarrow, which imports pandas where it is given NumPy's."""
    import pyarrow

    content = pyarrow.py_buffer(np.ascontiguousarray(values, np.int32))
    return pyarrow.Array.from_buffers(pyarrow.int32(), len(values), [None, content])


def row_groups(
    chats: Chats, order: npt.NDArray[np.int64], num_chats: npt.NDArray[np.int64]
) -> Iterator[list[tuple[Ints, Ints]]]:
    """Offsets and values of the three columns, some rows at a time."""
    all_lengths = np.frombuffer(chats.lengths, np.int32)
    all_starts = np.cumsum(all_lengths, dtype=np.int64) - all_lengths
    num_rows = min(GROUP_ROWS, max(1, GROUP_TOKENS // chats.recipe.sequence_length))
    first_chat = 0
    for first in range(0, len(num_chats), num_rows):
        by_chat = np.append(0, np.cumsum(num_chats[first : first + num_rows]))
        members = order[first_chat : first_chat + by_chat[-1]]
        first_chat += int(by_chat[-1])
        lengths = all_lengths[members]
        tokens_before = np.append(0, np.cumsum(lengths, dtype=np.int64))
        by_token = tokens_before[by_chat]
        starts = tokens_before[:-1] - np.repeat(by_token[:-1], np.diff(by_chat))
        tokens = chats.read(all_starts[members], lengths)
        yield [
            (by_token.astype(np.int32), tokens >> 1),
            (by_token.astype(np.int32), tokens & 1),
            (by_chat.astype(np.int32), starts.astype(np.int32)),
        ]


if __name__ == "__main__":
    cli.run(main)
