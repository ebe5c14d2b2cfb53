"""What of a log may be quoted: without paths, hosts, addresses, names of people and keys."""

import re

_RULES = (
    (
        re.compile(
            r"(?i)((?:api[-_]?key|token|password|secret|authorization)['\"]?\s{0,3}[:=]?\s{0,3}(?:bearer\s)?)[^\s,;]{4,200}"
        ),
        r"\1***",
    ),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|xox[bp]-|AKIA)[A-Za-z0-9_-]{8,200}"), "***"),
    (re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9.-]{1,64}\.[a-z]{2,12}\b"), "***"),
    (re.compile(r"\b[a-z][a-z0-9+.-]{1,10}://[^\s'\"<>)]{1,300}"), "URL"),
    (re.compile(r"\b(?:\d{1,3}\.){3}\d{1,3}(?::\d{1,5})?\b"), "ADDRESS"),
    (re.compile(r"\[?(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{1,4}\]?(?::\d{1,5})?"), "ADDRESS"),
    (re.compile(r"(?<![\w.])(?:[A-Za-z]:\\|~/|\.{1,2}/|/)(?:[^\s'\",:;()<>|]{1,200})"), "PATH"),
    (re.compile(r"\bGPU-[0-9a-fA-F-]{8,40}\b"), "GPU-ID"),
)
_CACHED = re.compile(r"models--([\w.-]{1,96})--([\w.-]{1,96})")
MAX_QUOTED = 400


def redact(text: str) -> str:
    """A sentence of the log without what is nobody's business."""
    text = " ".join(text.split())[: 4 * MAX_QUOTED]
    for pattern, instead in _RULES:
        text = pattern.sub(instead, text)
    text = "".join(char for char in text if char.isprintable())
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def file_name(text: str) -> str | None:
    """The last part of a path."""
    name = text.strip().strip("'\"").replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(char for char in name if char.isalnum() or char in "._-+")[:120] or None


def model_name(text: str) -> str | None:
    """A repository as it stands, of a path its last part: what names the model, and not whose it is."""
    cached = _CACHED.search(text)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    text = text.strip().strip("'\"").replace("\\", "/").rstrip("/")
    parts = [part for part in text.split("/") if part]
    if not parts:
        return None
    own = len(parts) == 2 and not text.startswith(("/", "~", ".")) and not parts[0].endswith(":")
    name = "/".join(parts) if own and not parts[1].endswith(".gguf") else parts[-1]
    name = "".join(char for char in name if char.isalnum() or char in "._-/:+")[:120]
    return name or None
