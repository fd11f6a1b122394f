"""The fast tokenizer library gives Hugging Face's ids, or Hugging Face's are taken."""

import json
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from scripts.data import fast
from scripts.data.documents import DocumentEncoder
from scripts.data.fast import EVERY, NEEDED_APART, WHOLE, Checks
from scripts.lib.schema import TokenizeRecipe

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PLAIN = "the of and hello world tokenizer don't we'LL it's I'M 12345 3.14 foo_bar"
FAR = "naïve Straße 漢字仮名 한국어 привет नमस्ते ภาษาไทย שלום مرحبا 🙂👩\u200d👩\u200d👧 e\u0301 ﬁ İ ſ"
SPECIAL = "<bos> <eos> <eos>x <pad> <tool> <|x|> <eo s>"
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\0", "\u00a0", "\u3000", "\u2028", "\ufeff"]
RUNS = ["a" * 70, "!?" * 40, "é" * 50, "\n" * 30, " " * 90, "0" * 33]
WORDS = [*PLAIN.split(), *FAR.split(), *SPECIAL.split(), *SPACES, *RUNS]
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]


def byte_level():
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    train(tok, 700, initial_alphabet=alphabet)
    return tok


def gpt_2():
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    train(tok, 600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tok


def metaspace():
    """As Llama 2's: pieces of characters, bytes where one is unknown."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    train(tok, 700, special=["<unk>", *pieces])
    return tok


def word_piece():
    tok = Tokenizer(
        models.WordPiece({"<unk>": 0, "the": 1, "<eos>": 2}, unk_token="<unk>")
    )
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return tok


def train(tok, vocab_size, special=(), **settings):
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + len(special),
        special_tokens=["<bos>", "<eos>", "<pad>", *special],
        show_progress=False,
        **settings,
    )
    tok.train_from_iterator(CORPUS * 3, trainer)
    tok.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True), "<|x|>"])


def save(tok, folder):
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def encoder_of(folder, **recipe):
    return DocumentEncoder(folder, TokenizeRecipe(**recipe))


FAMILIES = (byte_level, gpt_2, metaspace)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.__name__)
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / request.param.__name__
    found = encoder_of(save(request.param(), folder))
    assert not found.refusal
    return found


def assert_same(encoder, texts):
    ids, lengths = encoder.fastokens(texts)
    theirs, their_lengths = encoder.hugging_face(texts)
    starts = np.cumsum(lengths) - lengths
    if np.array_equal(ids, theirs) and np.array_equal(lengths, their_lengths):
        return
    at = np.cumsum(their_lengths) - their_lengths
    for i, text in enumerate(texts):
        ours = ids[starts[i] : starts[i] + lengths[i]].tolist()
        assert ours == theirs[at[i] : at[i] + their_lengths[i]].tolist(), repr(text)


@pytest.mark.parametrize("family", [*FAMILIES, word_piece])
def test_short_merges_mean_the_same(family, tmp_path):
    tok = family()
    content = (save(tok, tmp_path / "tokenizer") / "tokenizer.json").read_bytes()
    short = fast.with_short_merges(content)
    assert Tokenizer.from_str(short).to_str() == tok.to_str()
    assert (len(short) < len(content)) == (family in FAMILIES)


@pytest.mark.parametrize("text", ["a b", "#versions"])
def test_merges_that_no_string_can_tell_stay_pairs(text, tmp_path):
    tokens = [text[:end] for end in range(1, len(text) + 1)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *text]))}
    tok = Tokenizer(models.BPE(vocab, list(zip(tokens, text[1:], strict=False))))
    content = (save(tok, tmp_path / "tokenizer") / "tokenizer.json").read_bytes()
    short = fast.with_short_merges(content)
    assert json.loads(short) == json.loads(content)
    assert Tokenizer.from_str(short).encode(text).tokens == [text]


def test_every_code_point_has_hugging_faces_ids(encoder):
    points = [p for p in range(0x110000) if not 0xD800 <= p < 0xE000]
    step = 64
    assert_same(
        encoder,
        [
            "".join(f"{chr(p)}a" if p % 3 else chr(p) for p in points[i : i + step])
            for i in range(0, 0x30000, step)
        ],
    )
    assert_same(
        encoder,
        [
            "".join(map(chr, points[i : i + step]))
            for i in range(0x30000, len(points), 16 * step)
        ],
    )


def test_random_mixes_have_hugging_faces_ids(encoder):
    draw = random.Random(7)
    ranges = [
        (0, 0x250),
        (0x250, 0x2000),
        (0x2000, 0x3400),
        (0x3400, 0xD7FF),
        (0xE000, 0x1FFFF),
    ]
    texts = []
    for _ in range(3000):
        parts = []
        for _ in range(draw.randrange(12)):
            kind = draw.random()
            if kind < 0.6:
                parts.append(draw.choice(WORDS))
            elif kind < 0.7:
                parts.append(" ")
            else:
                first, last = draw.choice(ranges)
                parts.append(chr(draw.randrange(first, last)) * draw.choice([1, 1, 2]))
        texts.append("".join(parts))
    assert_same(encoder, texts)


def test_long_words_and_long_runs_have_hugging_faces_ids(encoder):
    draw = random.Random(3)
    letters = "".join(draw.choices("abcdefgé漢", k=20_000))
    assert_same(
        encoder,
        [
            letters,
            "a" * 20_000,
            " " * 20_000,
            "\n" * 9_999,
            "1" * 9_999,
            "<eos>" * 3_000,
            "",
        ],
    )


def test_special_tokens_in_a_text_and_around_it(encoder):
    assert_same(
        encoder,
        [
            "<eos>",
            " <eos> ",
            "a <tool> b",
            "<tool><|x|>",
            "<eos",
            "<EOS>",
            "<bos><bos>",
        ],
    )


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.__name__)
def overlapping(request, tmp_path_factory):
    """A tokenizer of which special tokens are parts of others, and of ordinary ones."""
    folder = tmp_path_factory.mktemp("tokenizers") / request.param.__name__
    tok = request.param()
    tok.add_special_tokens(
        [
            "<|x|>y",
            AddedToken("<a>", lstrip=True),
            AddedToken("<a><b", normalized=False),
            AddedToken("word", single_word=True),
            AddedToken("<n>", normalized=True, special=True),
        ]
    )
    tok.add_tokens(["<b>", "b>x"])
    return save(tok, folder)


PARTS = [
    *(
        "<bos>",
        "<eos>",
        "<pad>",
        "<a>",
        "<b>",
        "<a><b",
        "b>x",
        "<|x|>y",
        "<|x|>",
        "<n>",
    ),
    *("<tool>", "word", "words", "x", " ", "é", "<", "a", "\n", "\0", "<unk>"),
]
PROPERTY = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MIXES = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=8).map("".join)


def of_hugging_face(folder, texts, as_text):
    tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.encode_special_tokens = as_text
    return [tok.encode(text).ids for text in texts]


def whole(*indexes):
    return [(i, WHOLE) for i in indexes]


def one_by_one(encoded):
    ids = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    return [part.tolist() for part in ids] if len(encoded.lengths) else []


@PROPERTY
@given(texts=st.lists(MIXES, min_size=1, max_size=5))
@pytest.mark.parametrize("library", ["fastokens", "tokenizers"])
@pytest.mark.parametrize("mode", ["keep", "escape"])
def test_special_tokens_in_documents_are_kept_or_escaped_as_by_hugging_face(
    overlapping, mode, library, texts
):
    encoder = known(overlapping, mode)
    check = None if library == "tokenizers" else []
    found = encoder.encode(texts, check)
    assert one_by_one(found) == of_hugging_face(overlapping, texts, mode == "escape")
    assert (found.fault, found.refused) == ("", ())


@PROPERTY
@given(texts=st.lists(MIXES, min_size=1, max_size=5))
def test_a_document_is_refused_where_escaping_would_change_it(overlapping, texts):
    found = known(overlapping, "refuse").encode(texts, [])
    kept = of_hugging_face(overlapping, texts, False)
    escaped = of_hugging_face(overlapping, texts, True)
    changed = [i for i, ids in enumerate(kept) if ids != escaped[i]]
    assert [i for i, _token in found.refused] == changed
    for i, token in found.refused:
        assert token.strip() in texts[i]
    if not changed:
        assert one_by_one(found) == kept


ENCODERS = {}


def known(folder, mode):
    key = folder, mode
    if key not in ENCODERS:
        ENCODERS[key] = encoder_of(folder, append_eod=False, special_tokens=mode)
    return ENCODERS[key]


def test_no_texts_and_empty_texts(encoder):
    for texts in ([], [""], ["", "a", ""]):
        assert_same(encoder, texts)
        encoded = encoder.encode(texts, whole(*range(len(texts))))
        assert not encoded.fault
        assert len(encoded.lengths) == len(texts)


@pytest.mark.parametrize("append_eod", [True, False])
def test_the_end_follows_each_document_with_a_token_by_either_library(
    encoder, append_eod
):
    texts = ["", *CORPUS[:9], ""]
    encoder.append_eod = append_eod
    ours, theirs = encoder.encode(texts, []), encoder.encode(texts, None)
    encoder.append_eod = True
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    end = [encoder.eod_id] if append_eod else []
    wanted = [encoder.tokenizer.encode(text).ids for text in texts]
    assert theirs.ids.tolist() == [id for ids in wanted if ids for id in (*ids, *end)]


def test_a_tokenizer_that_is_refused_says_why(tmp_path):
    encoder = encoder_of(save(word_piece(), tmp_path / "word"))
    assert "unsupported" in encoder.refusal
    assert encoder.encode(["the"], None).ids.tolist() == [1, 2]


class Wrong:
    """fastokens with a fault: every z is another token."""

    def __init__(self, right):
        self.right = right

    def encode_batch_flat(self, texts, **flags):
        return self.right.encode_batch_flat(
            [t.replace("z", "q") for t in texts], **flags
        )


def test_a_difference_in_a_checked_text_is_told(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "fast", Wrong(encoder.fast))
    assert "'az'" in encoder.encode(["b", "az"], whole(1)).fault
    assert not encoder.encode(["b", "az"], whole(0)).fault


def test_pieces_of_a_long_text_are_checked(encoder, monkeypatch):
    monkeypatch.setattr(fast, "PIECE_CHARACTERS", 10)
    texts = ["a", "b c" * 9, "b c" * 9 + "z"]
    parts = [*Checks().choose(texts), (1, slice(0, 20)), (2, slice(20, 99))]
    assert not encoder.encode(texts, parts).fault
    monkeypatch.setattr(encoder, "fast", Wrong(encoder.fast))
    assert not encoder.encode(texts, parts[:-1]).fault
    assert "z'" in encoder.encode(texts, parts).fault


def test_of_a_long_text_only_pieces_with_what_is_rare_are_encoded_twice(monkeypatch):
    monkeypatch.setattr(fast, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(fast, "SAMPLE_CHARACTERS", 150)
    text = "a" * 250 + "é" + "a" * 400
    checks = Checks()
    assert checks.choose([text]) == [(0, slice(0, 150)), (0, slice(136, 364))]
    assert checks.choose([text, "é"]) == [], "it is settled"
    short = "a" * 150 + "\0"
    assert checks.choose([text, short]) == [(1, WHOLE)]


def test_a_failure_of_the_library_is_told(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "fast", None)
    assert "fastokens failed" in encoder.encode(["a"], whole(0)).fault


def test_each_text_with_a_code_point_not_seen_is_checked_and_a_sample():
    checks = Checks()
    texts = ["ab", "ba", "abc", *["a"] * EVERY, "é", "é", "漢", "演", "ab\0", "ab\0"]
    chosen = checks.choose(texts[:2]) + [
        (i + 2, p) for i, p in checks.choose(texts[2:])
    ]
    assert chosen == whole(0, EVERY, *(EVERY + i for i in (3, 5, 7, 8)))


def test_pieces_hold_each_rare_code_point_once_and_what_is_never_settled_always(
    monkeypatch,
):
    monkeypatch.setattr(fast, "PIECE_CHARACTERS", 100)
    checks = Checks()
    checks.choose(["a"])
    rare = ["é", "\0", "ü漢", "é演", "b\0"]
    found = checks.choose(["".join(part.ljust(100, "a") for part in rare)])
    assert [(part.stop - 64) // 100 for _i, part in found] == [1, 2, 3, 5]


def test_of_many_texts_fewer_are_a_sample(monkeypatch):
    monkeypatch.setattr(fast, "MANY", EVERY + 1)
    later = fast.EVERY_LATER
    found = Checks().choose(["a"] * (2 * later + 1))
    assert found == whole(0, EVERY, later, 2 * later)


def test_what_unicode_may_yet_change_is_always_checked_and_marks_more_often():
    for char, wanted in (("\U000e0999", 50), ("\ue000", 50), ("\u0301", NEEDED_APART)):
        checks = Checks()
        checks.choose(["a"])
        assert len(checks.choose([f"a{char}"] * 50)) == wanted, hex(ord(char))
    assert fast.ALWAYS > NEEDED_APART
