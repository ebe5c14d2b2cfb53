"""Calibration: what the shipped text is, which tokens are chosen from a text, and what is said where that cannot be.

Tokens come from the small hybrid's tokenizer (byte-level BPE, so any text is tokens) and from the fixture's.
"""

import builtins
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

torch = pytest.importorskip("torch", reason="the quantizer needs torch: pip install 'qwenfit[quant]'")
tokenizers = pytest.importorskip("tokenizers", reason="calibration needs tokenizers: pip install 'qwenfit[quant]'")

from qwenfit.profiles.errors import BadInput, Unsupported  # noqa: E402
from qwenfit.quant import calibration  # noqa: E402
from qwenfit.quant.calibration import (  # noqa: E402
    END_OF_TEXT,
    Text,
    choose_sequences,
    consecutive_sequences,
    read_text,
    read_tokenizer,
)

SMALL_HYBRID = Path(__file__).parent.parent / "data/small_hybrid"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(str(SMALL_HYBRID))


@pytest.fixture(scope="module")
def numbered() -> Text:
    """1,000 lines that say where they are."""
    lines = (f"line {number:04} of a thousand, which all look alike but for their number" for number in range(1000))
    return Text("numbered.txt", "\n".join(lines).encode())


def test_shipped_text_is_small_and_has_many_scripts_and_kinds() -> None:
    text = read_text()
    assert 120_000 < len(text.data) <= 300_000
    content = text.data.decode()
    assert content.count(f"\n{END_OF_TEXT}\n") > 80
    scripts = {
        "Han": "[\u4e00-\u9fff]",
        "kana": "[\u3040-\u30ff]",
        "Hangul": "[\uac00-\ud7af]",
        "Cyrillic": "[\u0400-\u04ff]",
        "Arabic": "[\u0600-\u06ff]",
        "Devanagari": "[\u0900-\u097f]",
    }
    counts = {name: len(re.findall(pattern, content)) for name, pattern in scripts.items()}
    assert min(counts.values()) > 500, counts
    for mark in ("<|im_start|>assistant\n<think>", "<tool_call>\n<function=", "\\frac", '{"', "#include", "def "):
        assert mark in content


def test_shipped_text_shares_no_line_with_the_text_that_quality_is_measured_on() -> None:
    held_out = {line for line in (SMALL_HYBRID / "heldout.txt").read_text("utf-8").splitlines() if len(line) > 30}
    assert len(held_out) > 1500
    assert not held_out & set(read_text().data.decode().splitlines())


def test_every_kind_of_the_shipped_text_is_in_the_default_draw(tokenizer: Any) -> None:
    """16 stretches of a text whose kinds are mixed along its whole length: with any of these seeds, code, chat and
    other scripts than Latin are among 8,192 tokens."""
    for seed in range(3):
        sequences = choose_sequences(read_text(), tokenizer, seed=seed)
        assert sequences.shape == (16, 512)
        content = "\n".join(tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in sequences)
        assert "<|im_start|>" in content
        assert "return " in content
        assert len(re.findall("[\u0400-\u07ff\u0900-\u0fff\u3040-\uffef]", content)) > 200


def test_tokens_are_the_same_on_every_machine(tokenizer: Any) -> None:
    """The checksum was computed on x86-64 Linux with Python 3.11 and tokenizers 0.22: another one is another draw."""
    text = read_text(str(SMALL_HYBRID / "heldout.txt"))
    chosen = choose_sequences(text, tokenizer, tokens=4096, sequence_tokens=256, seed=7)
    assert crc32(chosen.numpy().astype("<i4").tobytes()) == CHECKSUM
    assert torch.equal(chosen, choose_sequences(text, tokenizer, tokens=4096, sequence_tokens=256, seed=7))
    assert not torch.equal(chosen, choose_sequences(text, tokenizer, tokens=4096, sequence_tokens=256, seed=8))


def test_sequences_begin_with_a_line_in_each_stretch_of_the_text(tokenizer: Any, numbered: Text) -> None:
    sequences = choose_sequences(numbered, tokenizer, tokens=20 * 64, sequence_tokens=64, seed=3)
    starts = []
    for row in sequences.tolist():
        found = re.match(r"line (\d+) of a thousand", tokenizer.decode(row))
        assert found, tokenizer.decode(row)
        starts.append(int(found[1]))
    # The place is drawn within the stretch, and lies in the line before the one that the sequence begins with.
    assert [(start - 1) // 50 for start in starts] == list(range(20))
    assert len({start % 50 for start in starts}) > 10


def test_fewer_tokens_than_a_sequence_make_one_short_sequence(tokenizer: Any, numbered: Text) -> None:
    assert choose_sequences(numbered, tokenizer, tokens=100, sequence_tokens=512).shape == (1, 100)
    assert choose_sequences(numbered, tokenizer, tokens=1000, sequence_tokens=512).shape == (1, 512)


def test_a_sequence_goes_on_at_the_beginning_of_the_text(tokenizer: Any) -> None:
    text = Text("ring.txt", b"first line, a long one with many words in it\n" + b"x\n" * 20 + b"last line\n")
    tokens = len(tokenizer.encode(text.data.decode()).ids)
    for seed in range(8):
        row = choose_sequences(text, tokenizer, tokens=tokens, sequence_tokens=tokens, seed=seed)[0]
        content = tokenizer.decode(row.tolist())
        assert content.count("last line") == content.count("first line") == 1


def test_a_text_that_is_too_short_is_told(tokenizer: Any) -> None:
    text = Text("short.txt", b"only a few words\nand no more\n" * 3)
    with pytest.raises(BadInput, match=r"short.txt has fewer than 8192 tokens; give a longer text"):
        choose_sequences(text, tokenizer)
    with pytest.raises(BadInput, match="fewer"):
        choose_sequences(text, tokenizer, tokens=512)
    assert choose_sequences(text, tokenizer, tokens=16, sequence_tokens=8).shape == (2, 8)


def test_wide_characters_are_never_cut(tokenizer: Any) -> None:
    text = Text("chinese.txt", "雨天的书店,门口放一只铁桶。".encode() * 2000)
    for seed in range(4):
        row = choose_sequences(text, tokenizer, tokens=300, sequence_tokens=100, seed=seed)[0].tolist()
        assert "\ufffd" not in tokenizer.decode(row).rstrip("\ufffd")


def test_markup_is_encoded_as_the_tokens_that_it_stands_for(tokenizer: Any, checkpoint: Callable[..., Path]) -> None:
    start, end = (tokenizer.token_to_id(mark) for mark in ("<|im_start|>", END_OF_TEXT))
    text = Text("chat.txt", f"<|im_start|>user\nhello<|im_end|>\n{END_OF_TEXT}\n".encode() * 50)
    row = consecutive_sequences(text, tokenizer, 256)[0].tolist()
    assert row.count(start) > 10 and row.count(end) > 10
    other = json.loads((checkpoint("qwen3_5") / "tokenizer.json").read_text("utf-8"))
    other["added_tokens"] = []
    plain = tokenizers.Tokenizer.from_str(json.dumps(other))
    assert "endoftext" not in plain.decode(choose_sequences(text, plain, tokens=256)[0].tolist())


def test_consecutive_sequences_are_the_text_in_order(tokenizer: Any, numbered: Text) -> None:
    sequences = consecutive_sequences(numbered, tokenizer, 128, tokens=1300)
    assert sequences.shape == (10, 128)
    assert sequences.flatten().tolist() == tokenizer.encode(numbered.data.decode()).ids[:1280]
    whole = consecutive_sequences(numbered, tokenizer, 1000)
    assert whole.numel() == len(tokenizer.encode(numbered.data.decode()).ids) // 1000 * 1000
    with pytest.raises(BadInput, match="fewer than asked for"):
        consecutive_sequences(numbered, tokenizer, 1000, tokens=10_000_000)


def test_fewer_tokens_than_a_sequence_holds_are_one_sequence(tokenizer: Any, numbered: Text) -> None:
    """256 tokens in sequences of 512 were no sequence, and the search for no token never ended."""
    sequences = consecutive_sequences(numbered, tokenizer, 512, tokens=256)
    assert sequences.flatten().tolist() == tokenizer.encode(numbered.data.decode()).ids[:256]


@pytest.mark.parametrize(("sequence_tokens", "tokens"), [(512, 1), (512, 0), (512, -5), (0, 256), (-4, 256), (1, None)])
def test_sequences_that_predict_nothing(
    tokenizer: Any, numbered: Text, sequence_tokens: int, tokens: int | None
) -> None:
    with pytest.raises(BadInput, match="predicts nothing: give --tokens and --sequence 2 or more"):
        consecutive_sequences(numbered, tokenizer, sequence_tokens, tokens=tokens)


def test_jsonl_is_the_texts_of_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\ntwo", "url": 3}\n\n{"text": "drei ß"}\n', "utf-8")
    assert read_text(str(path)).data.decode() == f"one\ntwo\n{END_OF_TEXT}\ndrei ß\n{END_OF_TEXT}\n"
    assert read_text(str(path)).name == "a.jsonl"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"text": "a"}\n{"text": 1}\n', r"line 2 has no text"),
        ('{"messages": []}\n', r"line 1 has no text"),
        ("[" * 100_000 + "\n", r"line 1 is not JSON"),
        ("nonsense\n", r"line 1 is not JSON"),
        ('{"text": "  "}\n', None),
        ("\n\n", r"holds no text"),
    ],
)
def test_jsonl_that_is_not_so_is_told_with_its_line(tmp_path: Path, content: str, sentence: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, "utf-8")
    if sentence is None:
        assert read_text(str(path)).data
        return
    with pytest.raises(BadInput, match=sentence):
        read_text(str(path))


def test_plain_text_is_read_up_to_the_limit_and_must_be_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "añb\r\nc".encode())
    assert read_text(str(path)).data == "añb\nc".encode()
    path.write_bytes(b"good\n\xff\xfe bad")
    with pytest.raises(BadInput, match=r"not UTF-8 \(byte 5\)"):
        read_text(str(path))
    path.write_bytes("añb".encode())
    monkeypatch.setattr(calibration, "TEXT_LIMIT_BYTES", 2)  # cuts the ñ
    assert read_text(str(path)).data == b"a"
    with pytest.raises(BadInput, match="is not a file"):
        read_text(str(tmp_path))
    path.write_bytes(b" \n")
    with pytest.raises(BadInput, match="holds no text"):
        read_text(str(path))


def test_parquet_is_read_with_pyarrow_and_told_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "import_module", _missing)
        with pytest.raises(Unsupported, match=r"needs pyarrow: pip install pyarrow"):
            read_text(str(path))
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    with pytest.raises(BadInput, match="not readable as Parquet"):
        read_text(str(path))
    parquet.write_table(arrow.table({"text": ["one", "two"], "n": [1, 2]}), path)
    assert read_text(str(path)).data.decode() == f"one\n{END_OF_TEXT}\ntwo\n{END_OF_TEXT}\n"
    parquet.write_table(arrow.table({"content": ["one"]}), path)
    with pytest.raises(BadInput, match="no column text"):
        read_text(str(path))


def test_tokenizer_that_cannot_be_read_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"tokenizer.json is missing"):
        read_tokenizer(str(tmp_path))
    path = tmp_path / "tokenizer.json"
    for content in ("{}", "nonsense", '{"model": {"type": "None"}}'):
        path.write_text(content)
        with pytest.raises(BadInput, match=r"tokenizer.json is not a tokenizer"):
            read_tokenizer(str(tmp_path))
    monkeypatch.setattr(calibration, "TOKENIZER_LIMIT_BYTES", 5)
    with pytest.raises(BadInput, match="more than the 5 that qwenfit reads"):
        read_tokenizer(str(tmp_path))
    real_import = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: _missing(name) if name == "tokenizers" else real_import(name, *a, **k),
    )
    with pytest.raises(Unsupported, match=r"pip install 'qwenfit\[quant\]'"):
        read_tokenizer(str(tmp_path))


def test_a_tokenizer_that_truncates_and_pads_does_neither_here(tmp_path: Path) -> None:
    data = json.loads((SMALL_HYBRID / "tokenizer.json").read_text("utf-8"))
    data["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    data["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END_OF_TEXT,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    ids = read_tokenizer(str(tmp_path)).encode("to be, or not to be, that is the question").ids
    assert 8 < len(ids) < 64 and 0 not in ids


@pytest.mark.skipif(os.name == "nt", reason="no FIFOs on Windows")
def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInput, match="is not a file"):
        read_text(str(tmp_path / "pipe.txt"))


def _missing(name: str) -> Any:
    raise ImportError(name)


CHECKSUM = 497827362
