"""The tokenizer of a checkpoint as metadata of a GGUF file.

A BPE over bytes, as all Qwen models have it: tokens, their types, merges, special tokens, chat template. How text is
split before the BPE is a name in GGUF, and llama.cpp knows the regular expression behind it (`llama-vocab.cpp`,
b11434): a tokenizer that splits otherwise is refused, since its tokens would silently be others.
"""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..profiles.errors import BadInput, Unsupported
from ..profiles.json_file import read_json_object, short

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LIMIT_BYTES = 256 << 20
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen35",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>", re.DOTALL)


def add_vocabulary(writer: "GGUFWriter", folder: str, vocab_size: int) -> None:
    """Writes tokens 0 ... vocab_size - 1 and what belongs to them; ids that tokenizer.json lacks become unused ones.

    `BadInput` where tokenizer.json is missing or wrong, `Unsupported` where llama.cpp has no such tokenizer.
    """
    from gguf import SpecialVocab

    path = os.path.join(folder, "tokenizer.json")
    if not os.path.exists(path):
        raise BadInput(f"{folder} has no tokenizer.json, which a GGUF file needs; finish the download")
    tokenizer = read_json_object(path, _LIMIT_BYTES)
    tokens, types = _tokens(tokenizer, vocab_size, path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(tokenizer, path))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
    if not special.merges:
        raise Unsupported(f"{path} has no merges, without which llama.cpp loads no tokenizer")
    special.add_to_gguf(writer, quiet=True)


def _tokens(tokenizer: Mapping[str, Any], vocab_size: int, path: str) -> tuple[list[str], list[int]]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        raise Unsupported(f"{path} is no BPE; GGUF files of Qwen3.5 have one")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for token, number in vocabulary.items():
        _place(tokens, types, token, number, _NORMAL, path)
    for added in tokenizer.get("added_tokens") or ():
        if not isinstance(added, dict) or not isinstance(added.get("content"), str):
            raise BadInput(f"{path}: added_tokens holds {short(added)}, which is no token")
        is_special = bool(added.get("special")) or _LOOKS_SPECIAL.fullmatch(added["content"]) is not None
        _place(tokens, types, added["content"], added.get("id"), _CONTROL if is_special else _USER_DEFINED, path)
    return tokens, types


def _place(tokens: list[str], types: list[int], token: str, number: object, kind: int, path: str) -> None:
    if type(number) is not int or not 0 <= number < len(tokens):
        raise BadInput(f"{path}: token {short(token)} has the id {short(number)}, outside vocab_size {len(tokens)}")
    tokens[number], types[number] = token, kind


def _split_name(tokenizer: Mapping[str, Any], path: str) -> str:
    """llama.cpp's name for how text is split before the BPE."""
    outer = tokenizer.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer]) if isinstance(outer, dict) else []
    patterns = [part["pattern"].get("Regex") for part in parts if isinstance(part.get("pattern"), dict)]
    if len(patterns) == 1 and patterns[0] in _PATTERNS:
        return _PATTERNS[patterns[0]]
    # The byte-level splitter's own expression is GPT-2's.
    if not patterns and any(part.get("type") == "ByteLevel" and part.get("use_regex", True) for part in parts):
        return "gpt-2"
    raise Unsupported(f"{path} splits text as no model of llama.cpp's does ({short(patterns)}); take another format")
