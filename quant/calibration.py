"""Calibration text as token sequences: a file of the user's, or the text that ships with the package.

    text = read_text(None)                                     # or a .txt, .jsonl or .parquet file
    sequences = choose_sequences(text, read_tokenizer(folder), tokens=8192, sequence_tokens=512, seed=0)

Sequences are full, so nothing is padded or masked. They are spread over the text: it is cut into as many stretches of
equal bytes as there are sequences, and in each a place is drawn, moved to the next beginning of a line. Only what is
chosen is tokenized, so a long file costs no more than a short one. Same text, tokenizer and seed give the same tokens
on every machine: the draw is Python's Mersenne Twister, whose `random()` is the same in all versions.

Why 16 sequences of 512 tokens by default. Tokens of one passage are alike, so a Hessian learns more from sixteen places
than from four of 2,048 tokens. Shorter ones would save nothing more and distort: a DeltaNet layer begins every sequence
with an empty state, and what reads its output sees that of real use only once the state has filled. For a head that
forgets over a hundred tokens this is a fifth of 512. `calibration.md` says what the text is made of.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.resources import files
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..profiles.errors import BadInput, Unsupported, install_hint
from ..profiles.json_file import short

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_TOKENS, DEFAULT_SEQUENCE_TOKENS = 8192, 512
SHIPPED = "calibration.txt"
END_OF_TEXT = "<|endoftext|>"
"""Qwen's separator of documents, in a text file a line of its own. A sequence may cross from one to the next."""
TEXT_LIMIT_BYTES = 64 << 20
TOKENIZER_LIMIT_BYTES = 256 << 20
LINE_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class Text:
    """UTF-8 bytes of documents, `END_OF_TEXT` between them; name: the file's, for the model card."""

    name: str
    data: bytes

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def read_text(path: str | None = None) -> Text:
    """A text (.txt or any other ending), JSONL ({"text": ...} per line) or Parquet (a column `text`) file.

    None: the text that ships with the package. Of a longer file the first 64 MiB of text are read. `BadInput` for what
    cannot be read so, `Unsupported` where Parquet needs pyarrow.
    """
    if path is None:
        return Text("calibration text of qwenfit", files("qwenfit.quant").joinpath(SHIPPED).read_bytes())
    if not os.path.isfile(path):
        raise BadInput(f"{path} is not a file; give a text, JSONL or Parquet file, or leave --calibration out")
    ending = os.path.splitext(path)[1].lower()
    try:
        if ending in (".jsonl", ".ndjson"):
            data = _joined(_jsonl_texts(path))
        elif ending in (".parquet", ".pq"):
            data = _joined(_parquet_texts(path))
        else:
            with open(path, "rb") as file:
                data = _whole_characters(file.read(TEXT_LIMIT_BYTES), path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise BadInput(f"{path} holds no text; give a file with text, or leave --calibration out")
    return Text(os.path.basename(path), data)


def read_tokenizer(folder: str) -> "Tokenizer":
    """The tokenizer of a checkpoint folder, from its tokenizer.json, without truncation and padding.

    `BadInput` where the file is missing, larger than 256 MiB or not a tokenizer; `Unsupported` without `tokenizers`.
    """
    path = os.path.join(folder, "tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise Unsupported(f"calibration needs the package tokenizers: {install_hint('quant')}") from error
    try:
        size = os.stat(path).st_size if os.path.isfile(path) else None
        if size is None:
            raise BadInput(f"{path} is missing; copy it from the model's repository, or take --method rtn")
        if size > TOKENIZER_LIMIT_BYTES:
            raise BadInput(f"{path} has {size} bytes, more than the {TOKENIZER_LIMIT_BYTES} that qwenfit reads")
        with open(path, encoding="utf-8") as file:
            tokenizer = Tokenizer.from_str(file.read(TOKENIZER_LIMIT_BYTES))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except BadInput:
        raise
    except Exception as error:  # the package raises bare Exception for whatever it does not understand
        raise BadInput(f"{path} is not a tokenizer ({short(str(error))}); download it anew") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def choose_sequences(
    text: Text,
    tokenizer: "Tokenizer",
    tokens: int = DEFAULT_TOKENS,
    sequence_tokens: int = DEFAULT_SEQUENCE_TOKENS,
    seed: int = 0,
) -> Tensor:
    """`tokens` // `sequence_tokens` sequences spread over the text: int64 [n, L], one if there are fewer tokens.

    A sequence that reaches the end of the text goes on at its beginning. `BadInput` where the text has fewer tokens
    than are asked for.
    """
    if tokens < 1 or sequence_tokens < 1:
        raise ValueError(f"{tokens} tokens in sequences of {sequence_tokens}: give 1 or more of both")
    length = min(tokens, sequence_tokens)
    count = tokens // length
    data = _separated(text.data, tokenizer)
    draw, stretch, used_bytes = Random(seed), len(data) / count, 0
    rows = []
    for number in range(count):
        place = int((number + draw.random()) * stretch)
        line = data.find(b"\n", place) + 1  # none is left: 0, the beginning of the text
        row, row_bytes = _tokens_from(data, line, length, tokenizer)
        used_bytes += row_bytes
        if used_bytes > len(data):
            raise BadInput(
                f"{text.name} has fewer than {count * length} tokens; give a longer text, or fewer with --tokens"
            )
        rows.append(row)
    return torch.tensor(rows)


def consecutive_sequences(
    text: Text, tokenizer: "Tokenizer", sequence_tokens: int, tokens: int | None = None
) -> Tensor:
    """The text from its beginning, cut into sequences: int64 [n, L]; for perplexity. None: all of it.

    One sequence if fewer `tokens` are asked for than it holds; the last tokens that do not fill one are left out.
    `BadInput` where the text has too few, or where a sequence would have no token that follows another.
    """
    sequence_tokens = sequence_tokens if tokens is None else min(sequence_tokens, tokens)
    if sequence_tokens < 2:
        raise BadInput(
            f"a sequence of {sequence_tokens} tokens predicts nothing: give --tokens and --sequence 2 or more"
        )
    data = _separated(text.data, tokenizer)
    if tokens is None:
        ids = _encoded(data.decode("utf-8", "ignore"), tokenizer).ids
    else:
        ids, _ = _tokens_from(data, 0, tokens // sequence_tokens * sequence_tokens, tokenizer)
    count = len(ids) // sequence_tokens
    if count < 1 or (tokens is not None and count < tokens // sequence_tokens):
        raise BadInput(f"{text.name} has {len(ids)} tokens, fewer than asked for; give a longer text")
    return torch.tensor(ids[: count * sequence_tokens]).view(count, sequence_tokens)


def _tokens_from(data: bytes, start: int, length: int, tokenizer: "Tokenizer") -> tuple[list[int], int]:
    """`length` tokens from byte `start` on, around the end if need be, and the bytes they stand for.

    Fewer tokens than that where the whole text has no more; they count as one byte more than the text has.
    """
    window_bytes = 8 * length
    while True:
        window = (data[start : start + window_bytes] + data[: max(0, start + window_bytes - len(data))])[: len(data)]
        whole = window.decode("utf-8", "ignore")
        encoding = _encoded(whole, tokenizer)
        # The last token may be cut by the window's end, unless there is no more text to come.
        if len(encoding.ids) > length or len(window) == len(data):
            ids = encoding.ids[:length]
            if len(ids) < length:
                return ids, len(data) + 1
            return ids, len(whole[: encoding.offsets[length - 1][1]].encode())
        window_bytes *= 2


def _encoded(text: str, tokenizer: "Tokenizer") -> Any:
    return tokenizer.encode(text, add_special_tokens=False)


def _separated(data: bytes, tokenizer: "Tokenizer") -> bytes:
    """The text, with an empty line for `END_OF_TEXT` where the tokenizer does not know that as one token."""
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        return data
    return data.replace(END_OF_TEXT.encode(), b"\n")


def _joined(texts: Iterable[str]) -> bytes:
    """Documents up to the limit, `END_OF_TEXT` after each."""
    parts: list[bytes] = []
    total_bytes = 0
    for document in texts:
        part = document.encode("utf-8", "replace") + f"\n{END_OF_TEXT}\n".encode()
        parts.append(part)
        total_bytes += len(part)
        if total_bytes > TEXT_LIMIT_BYTES:
            break
    return b"".join(parts)[:TEXT_LIMIT_BYTES] if any(part.strip() for part in parts) else b""


def _jsonl_texts(path: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT_BYTES), b""), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f'{path}: line {number} is not JSON; a line is {{"text": "..."}}') from error
            document = value.get("text") if isinstance(value, dict) else None
            if not isinstance(document, str):
                raise BadInput(f'{path}: line {number} has no text; a line is {{"text": "..."}}')
            yield document


def _parquet_texts(path: str) -> Iterator[str]:
    try:
        arrow: Any = import_module("pyarrow")
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError as error:
        raise Unsupported(f"{path} is Parquet, which needs pyarrow: pip install pyarrow, or give JSONL") from error
    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise BadInput(f"{path} has no column text; its columns are {short(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for document in batch.column(0).to_pylist():
                    if not isinstance(document, str):
                        raise BadInput(f"{path}: a row of column text holds {short(document)}, not text")
                    yield document
    except arrow.ArrowException as error:
        raise BadInput(f"{path} is not readable as Parquet ({short(str(error))}); give another file") from error


def _whole_characters(data: bytes, path: str) -> bytes:
    """The bytes without a character that the limit cut; `BadInput` where they are not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if len(data) < TEXT_LIMIT_BYTES or error.start < len(data) - 3:
            raise BadInput(f"{path} is not UTF-8 (byte {error.start}); convert it, or give JSONL") from error
        data = data[: error.start]
    return data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
