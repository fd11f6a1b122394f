"""Documents, chats and a tokenizer to measure with, from text that a machine has.

    python -m tests.bench.corpus documents FILE --mb 26
    python -m tests.bench.corpus chats FILE --count 5000 --documents FILE
    python -m tests.bench.corpus tokenizer FOLDER --documents FILE [--bos]

Documents come from packages' documentation and manual pages, then from Python's
library, then from installed packages, each as far as it is there and needed; they are
cut to log-normal lengths, a few of a hundred thousand letters, most of a page. Where
the files are fewer than the megabytes asked for, they are cut again elsewhere. Chats
have their words. The same files and numbers give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import sysconfig
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np

ROOTS = (
    ("/usr/share/doc", "/usr/share/man"),
    (sysconfig.get_paths()["stdlib"],),
    (sysconfig.get_paths()["purelib"],),
)
KINDS = {"", ".c", ".gz", ".h", ".html", ".md", ".pl", ".py", ".rst", ".sh", ".txt"}
LARGEST = 5_000_000
POOL = 150_000_000
"""Letters that are kept to be cut again: enough that repeats are rare in a word cache."""

HTML = re.compile(r"(?is)<(script|style|head)\b.*?</\1>|<!--.*?-->|<[^>]+>")
ROFF = re.compile(
    r"(?m)^[.'](\\\"|[a-z]{2}\b).*\n|^\.[A-Z][A-Za-z]? ?|\\f.|\\[&|/,]|\\s[-+]?\d|\\\*\(.."
)
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3, Qwen and Nemotron cut a text into words."""

BOS, EOS = "<|begin|>", "<|im_end|>"
SPECIALS = (BOS, EOS, "<|im_start|>")
TEMPLATE = """
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endgeneration -%}
  {%- else -%}{{- message['content'] + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
"""ChatML as Megatron-Bridge knows it: a turn's last newline is trained on too."""

VOCABULARY = 32_000
SHARES = {"user": 0.25, "assistant": 0.75}


def read_text(path: Path) -> str:
    """A file's plain text; none where it holds none."""
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return ""
    if "\0" in text:
        return ""
    if re.search(r"(?i)<html|<!doctype", text[:2000]):
        text = html.unescape(HTML.sub("", text))
    elif "/man/" in str(path):
        text = ROFF.sub("", text).replace("\\-", "-")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def texts(rng: np.random.Generator) -> Iterator[str]:
    """Each text of the machine once, shuffled within the kinds of places."""
    seen = set()
    for roots in ROOTS:
        found = chain.from_iterable(Path(root).rglob("*") for root in roots)
        files = sorted(path for path in found if path.suffix in KINDS)
        for i in rng.permutation(len(files)):
            path = files[i]
            if not path.is_file() or path.stat().st_size > LARGEST:
                continue
            text = read_text(path)
            digest = hashlib.sha1(text.encode(errors="replace")).digest()
            if text and digest not in seen:
                seen.add(digest)
                yield text


def cut(text: str, rng: np.random.Generator) -> Iterator[str]:
    """A text as documents of whole lines."""
    at = 0
    while at < len(text):
        length = int(rng.lognormal(np.log(2000), 1.1)) + 20
        end = text.find("\n", at + length) + 1 or len(text)
        yield text[at:end]
        at = end


def documents(num_bytes: float, seed: int = 0) -> Iterator[str]:
    """Documents of this many bytes in all."""
    rng = np.random.default_rng(seed)
    pool: list[str] = []
    left = num_bytes

    def kept() -> Iterator[str]:
        letters = 0
        for text in texts(rng):
            pool.append(text)
            yield text
            letters += len(text)
            if letters > POOL:
                return

    def again() -> Iterator[str]:
        for _ in count():
            for i in rng.permutation(len(pool)):
                start = int(rng.integers(0, len(pool[i]) // 2 + 1))
                yield pool[i][start:]

    for text in chain(kept(), again()):
        for document in cut(text, rng):
            yield document
            left -= len(document.encode())
            if left <= 0:
                return


def read_documents(path: Path) -> Iterator[str]:
    """The texts of a file of documents."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def chats(number: int, words: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Chats of one to six turns; most are short, a few are very long."""
    rng = np.random.default_rng(seed)
    for size in np.clip(rng.lognormal(np.log(200), 0.9, number), 25, 1500):
        turns = int(min(rng.integers(1, 7), max(1, size // 20)))
        messages = []
        if rng.random() < 0.3:
            messages.append({"role": "system", "content": "You are careful."})
        for share in rng.dirichlet(np.full(turns, 4.0)):
            for role, part in SHARES.items():
                length = max(1, int(size * share * part))
                start = int(rng.integers(0, max(1, len(words) - length)))
                said = " ".join(words[start : start + length])
                messages.append({"role": role, "content": said})
        yield {"messages": messages}


def make_tokenizer(folder: Path, path: Path, bos: bool) -> None:
    """A byte-level BPE, trained on every fourth document."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(read_documents(path), 0, None, 4), trainer)
    tokenizer.post_processor = (
        processors.TemplateProcessing(f"{BOS} $A", None, [(BOS, 0)])
        if bos
        else processors.ByteLevel(trim_offsets=False)
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=BOS,
        pad_token=EOS,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def main() -> None:
    """Make one of the three, and say how large it is."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("kind", choices=("documents", "chats", "tokenizer"))
    flags.add_argument("path", type=Path)
    flags.add_argument("--mb", type=float, default=26)
    flags.add_argument("--count", type=int, default=5000)
    flags.add_argument("--documents", type=Path)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--bos", action="store_true")
    args = flags.parse_args()
    if args.kind == "tokenizer":
        make_tokenizer(args.path, args.documents, args.bos)
        return
    if args.kind == "documents":
        rows = ({"text": text} for text in documents(args.mb * 1e6, args.seed))
    else:
        every = chain.from_iterable(
            t.split(" ") for t in read_documents(args.documents)
        )
        words = islice(filter(str.strip, every), 2_000_000)
        rows = chats(args.count, list(words))
    number = 0
    with args.path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            number += 1
    print(f"{number:,} {args.kind}, {args.path.stat().st_size / 1e6:.1f} MB of JSON")


if __name__ == "__main__":
    main()
