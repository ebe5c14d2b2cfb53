"""Counts of tokens as people write them: 262144, 256K, 256k, 1M.

The rule is vLLM's (`human_readable_int` behind `--max-model-len`): capital K and M are powers of two, small k and m are
powers of ten and may carry a decimal point.
"""

from ..profiles.errors import BadInput

BINARY = {"K": 1 << 10, "M": 1 << 20}
DECIMAL = {"k": 1_000, "m": 1_000_000}
MAX_DIGITS = 18


def parse_tokens(text: str) -> int:
    """Tokens. Whether so many make sense is the planner's to say; raises BadInput where `text` is no count at all."""
    number, unit = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    scale = 1 if not unit else BINARY.get(unit) or DECIMAL.get(unit) or 0
    whole, point, fraction = number.partition(".")
    if not scale or not _digits(whole) or (point and not _digits(fraction)) or len(number) > MAX_DIGITS:
        raise BadInput(
            f"{shown(text)} is no number of tokens: write it like 262144, 256K (K = 1024) or 256k (k = 1000)"
        )
    if point and unit not in DECIMAL:
        raise BadInput(f"{shown(text)} has a decimal point: only k (1000) and m (1,000,000) take one, as in 1.5k")
    tokens, rest = divmod(int(whole + fraction) * scale, 10 ** len(fraction))
    if rest:
        raise BadInput(f"{shown(text)} is not a whole number of tokens")
    return tokens


def decimal_note(text: str) -> str | None:
    """What to tell someone who wrote a small k or m and may have meant the capital; None where nothing is unclear."""
    unit = text[-1:]
    if unit not in DECIMAL:
        return None
    number = text[:-1]
    note = f"{text} is {parse_tokens(text):,} tokens (k = 1000, m = 1,000,000)"
    if "." in number:
        return note
    return f"{note}; {number}{unit.upper()} would be {parse_tokens(number + unit.upper()):,}"


def shown(text: str, limit: int = 40) -> str:
    """`text` between quotes, cut to a length that a sentence can bear."""
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")


def _digits(text: str) -> bool:
    return text.isascii() and text.isdigit()
