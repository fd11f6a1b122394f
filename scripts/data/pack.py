r"""Tokenize chats and pack them into rows of equal length for SFT.

Reads   --tokenizer  Hugging Face tokenizer folder; its chat template has
                     `{% generation %}` around what the assistant says
        --data       NAME=PATH, repeated: rows with `messages`, a list of
                     {role: system, user, assistant or tool; content}
        --recipe     YAML of one `pack:` node
Writes  --out        packed.parquet  a row: input_ids, loss_mask, seq_start_id,
                                     each list<int32>
                     packing.json    chats, rows, tokens, loss_tokens, bad_rows,
                                     sequence_length, fill
Raises  DataError for bad rows (no assistant turn, an empty one, a wrong role), for
        a chat longer than sequence_length, for a tokenizer without such a template
Resumes never: it starts again

A row is what Megatron-Bridge's GPTSFTPackedParquetDataset reads. It holds whole
chats, at most sequence_length tokens, without padding. seq_start_id is where each
chat starts. loss_mask stands one to the left, beside its label's predecessor, as
Bridge writes it: loss_mask[i] is 1 where input_ids[i + 1] is the assistant's, and 0
at each chat's last token, which predicts nothing.

Chats are packed by best fit decreasing; rows are then shuffled by the seed.

    python -m scripts.data.pack --tokenizer T --data chat=chat.jsonl \
        --recipe R --out work/try
"""

from __future__ import annotations

import json
import random
import re
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from scripts.lib import cli
from scripts.lib.errors import DataError
from scripts.lib.progress import Progress
from scripts.lib.rows import BadRow, Row, field, named_sources, read_rows
from scripts.lib.schema import PackRecipe

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ROLES = ("system", "user", "assistant", "tool")
BATCH_CHATS = 512
GROUP_ROWS = 500
NAMED = 5

Chat = tuple[list[int], list[int]]  # ids and, for each, whether the assistant says it


class ChatEncoder:
    """Renders chats and tokenizes them, each once, with the assistant's tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise DataError(
                str(folder), f"cannot be loaded as a tokenizer: {error}"
            ) from error
        template = self.tokenizer.chat_template
        hint = "give the tokenizer node a `chat_template` with `{% generation %}`"
        if not isinstance(template, str):
            raise DataError(str(folder), "the tokenizer has no chat template", hint)
        if not GENERATION.search(template):
            raise DataError(
                str(folder), "its chat template has no `{% generation %}`", hint
            )
        self.template = template
        self.backend = self.tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()

    def render(self, row: Row, column: str) -> tuple[str, list[tuple[int, int]]]:
        """A chat's text and the spans of it that the assistant says."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = checked(row, column)
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadRow(f"the chat template refuses it: {error}") from error
        if not any(start < end for start, end in spans[0]):
            raise BadRow("the chat template marks nothing as the assistant's")
        return texts[0], spans[0]

    def encode(self, rendered: list[tuple[str, list[tuple[int, int]]]]) -> list[Chat]:
        """Ids of rendered chats, and 1 for each token with a letter in a span.

        apply_chat_template's own mask looks characters up one by one: it loses a
        span that starts with a blank where offsets are trimmed, and the last bytes
        of a letter of several tokens. Here every token has the letters from the
        token before it to its end.
        """
        encodings = self.backend.encode_batch(
            [text for text, _spans in rendered], add_special_tokens=False
        )
        return [
            (encoding.ids, token_mask(encoding.offsets, spans))
            for encoding, (_text, spans) in zip(encodings, rendered, strict=True)
        ]


def main(argv: list[str] | None = None) -> int:
    """Read, tokenize, pack and write."""
    args = cli.parse_rows(__doc__, argv)
    recipe = cli.load_recipe(args.recipe, PackRecipe)
    chats = Chats(recipe.sequence_length)
    encoder = ChatEncoder(args.tokenizer)
    progress = Progress(args.work)
    num_bad = done = 0
    for name, source, paths in named_sources(
        recipe.sources, cli.named_paths(args.data)
    ):
        column = source.column or "messages"
        rows = read_rows(
            name, source, paths, lambda row, c=column: encoder.render(row, c)
        )
        pairs = iter(rows)
        while batch := list(islice(pairs, BATCH_CHATS)):
            encoded = encoder.encode([rendered for rendered, _where in batch])
            for chat, (_rendered, where) in zip(encoded, batch, strict=True):
                chats.add(*chat, where)
            progress.report(
                done + rows.bytes_read,
                done + max(rows.bytes_total, rows.bytes_read) + 1,
                chats=len(chats.lengths),
            )
        num_bad += rows.num_bad
        done += rows.bytes_total
    chats.refuse_long_ones()
    packed = best_fit_decreasing(chats.lengths, recipe.sequence_length)
    random.Random(recipe.seed).shuffle(packed)
    num_loss_tokens = write_rows(chats, packed, args.out / "packed.parquet")
    num_tokens = len(chats.ids)
    counts = {
        "chats": len(chats.lengths),
        "rows": len(packed),
        "tokens": num_tokens,
        "loss_tokens": num_loss_tokens,
        "bad_rows": num_bad,
        "sequence_length": recipe.sequence_length,
        "fill": round(num_tokens / (len(packed) * recipe.sequence_length), 6),
    }
    (args.out / "packing.json").write_text(json.dumps(counts, indent=2) + "\n")
    progress.report(max(1, done), max(1, done), chats=len(chats.lengths))
    return 0


def checked(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages of a chat that can be trained on. Raises BadRow."""
    messages = field(row, column, list)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow(f"message {number} is no object")
        role = message.get("role")
        if role not in ROLES:
            raise BadRow(
                f"message {number} has role {role!r}; known: {', '.join(ROLES)}"
            )
        content = message.get("content")
        if not isinstance(content, str):
            raise BadRow(f"message {number} ({role}) has no text as content")
        if role == "assistant" and not content.strip():
            raise BadRow(f"message {number} (assistant) is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no message of the assistant")
    return [
        {key: value for key, value in message.items() if value is not None}
        for message in messages
    ]


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


class Chats:
    """All chats' tokens and shifted masks in two flat arrays."""

    def __init__(self, sequence_length: int) -> None:
        self.sequence_length = sequence_length
        self.ids, self.mask = array("i"), array("b")
        self.lengths: list[int] = []
        self.too_long: list[tuple[int, str]] = []

    def add(self, ids: list[int], assistant: list[int], where: str) -> None:
        """Append a chat; one that is too long is only noted."""
        if len(ids) > self.sequence_length:
            self.too_long.append((len(ids), where))
            return
        self.ids.extend(ids)
        self.mask.extend([*assistant[1:], 0])
        self.lengths.append(len(ids))

    def refuse_long_ones(self) -> None:
        """Raise DataError where a chat did not fit a row."""
        if not self.too_long:
            return
        longest = max(self.too_long)[0]
        named = [f"{where}: {tokens} tokens" for tokens, where in self.too_long[:NAMED]]
        raise DataError(
            "sequence_length",
            f"{len(self.too_long)} of {len(self.too_long) + len(self.lengths)} chats "
            f"are longer than {self.sequence_length} tokens:\n  " + "\n  ".join(named),
            f"the longest needs sequence_length {longest}; or take such chats out",
        )


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Put each sequence, longest first, in the fullest row that still has room.

    The rows' indices into `lengths`. Rows are kept by free space; bit n of an
    integer says that a row with n free is there, so that the best is one shift away.
    """
    rows: list[list[int]] = []
    with_free: dict[int, list[int]] = {}
    present = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = present >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = with_free[free].pop()
            if not with_free[free]:
                present &= ~(1 << free)
            rows[row].append(index)
        else:
            free, row = capacity, len(rows)
            rows.append([index])
        left = free - length
        if left:
            with_free.setdefault(left, []).append(row)
            present |= 1 << left
    return rows


def write_rows(chats: Chats, packed: list[list[int]], path: Path) -> int:
    """Write the packed rows; the number of tokens with a loss."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema(
        [
            (name, pyarrow.list_(pyarrow.int32()))
            for name in ("input_ids", "loss_mask", "seq_start_id")
        ]
    )
    temporary = path.with_name(path.name + ".tmp")
    num_loss_tokens = 0
    with parquet.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for columns in row_groups(chats, packed):
            num_loss_tokens += int(columns[1][1].sum())
            arrays = [
                pyarrow.ListArray.from_arrays(offsets, values)
                for offsets, values in columns
            ]
            writer.write_table(pyarrow.table(arrays, schema=schema))
    temporary.replace(path)
    return num_loss_tokens


def row_groups(chats: Chats, packed: list[list[int]]) -> Iterator[list[Any]]:
    """Offsets and values (int32) of the three columns, some rows at a time."""
    import numpy as np

    ids = np.frombuffer(chats.ids, np.int32)
    mask = np.frombuffer(chats.mask, np.int8)
    ends = np.cumsum(chats.lengths, dtype=np.int64)

    for first in range(0, len(packed), GROUP_ROWS):
        group = packed[first : first + GROUP_ROWS]
        spans = [
            slice(ends[i] - chats.lengths[i], ends[i]) for row in group for i in row
        ]
        starts, tokens = [], []
        for row in group:
            lengths = np.array([chats.lengths[i] for i in row], np.int32)
            starts.append(np.cumsum(lengths, dtype=np.int32) - lengths)
            tokens.append(int(lengths.sum()))
        by_token = np.cumsum([0, *tokens], dtype=np.int32)
        by_chat = np.cumsum([0, *map(len, group)], dtype=np.int32)
        yield [
            (by_token, np.concatenate([ids[span] for span in spans])),
            (by_token, np.concatenate([mask[span] for span in spans]).astype(np.int32)),
            (by_chat, np.concatenate(starts)),
        ]


if __name__ == "__main__":
    cli.run(main)
