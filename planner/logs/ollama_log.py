"""What Ollama prints when it loads a model, 0.11 (2025) to 0.33.

Its own engine and its scheduler say sizes per device in lines of slog (`msg="kv cache" device=CUDA0 size="1.1 GiB"`),
to a tenth; a cache of its own engine holds recurrent states too. What it wraps of llama.cpp prints llama.cpp's lines,
which are finer and count where they stand.
"""

import re

from .dialect import NUMBER, Dialect, PartFormat, WordFormat, no_rank, words
from .llamacpp_log import DEATH_WORDS, DEATHS, PARTS, WORDS, derive, place
from .llamacpp_log import DIALECT as LLAMACPP

_AT = r"(?:device|buffer|backend)=(?P<place>\w{1,24})(?: buffer_type=\w{1,24})?"
_SIZE = rf"size=\"(?P<a>{NUMBER}) (?P<unit>B|KiB|MiB|GiB|TiB)\""
SOURCE = "ml/device.go DeviceMemory.Log"


def _sized(message: str, part: str, covers: tuple[str, ...] = ()) -> PartFormat:
    pattern = re.compile(rf"msg=\"{message}\" {_AT} {_SIZE}")
    return PartFormat(
        f'msg="{message}"', pattern, part, "0.11 to 0.32", SOURCE, decimals=1, covers=covers, again="replace"
    )


OWN_PARTS = (
    _sized("model weights", "weights"),
    _sized("kv cache", "kv_cache", ("recurrent_state",)),
    _sized("compute graph", "activation"),
)

DIALECT = Dialect(
    engine="ollama",
    marks=(
        'msg="starting runner"',
        'msg="starting llama server"',
        'msg="model weights"',
        'msg="kv cache"',
        "source=server.go",
        "source=sched.go",
        "source=runner.go",
        "OLLAMA_",
        "ollama[",
    ),
    starts=('msg="starting runner"', 'msg="starting llama server"', "Operation:commit", *LLAMACPP.starts),
    contexts=LLAMACPP.contexts,
    ready=("llama runner started in", 'msg="llama runner started', *LLAMACPP.ready),
    death_words=("requires more system memory", "memory layout", *DEATH_WORDS),
    deaths=(
        re.compile(r"model requires more system memory \([^)]{1,40}\) than is available \([^)]{1,40}\)"),
        re.compile(r"memory layout cannot be allocated.{0,160}"),
        *DEATHS,
    ),
    parts=(*OWN_PARTS, *PARTS),
    words=(
        WordFormat(
            "(version ",
            re.compile(r"Listening on [^(]{1,60}\(version (?P<value>\d[\w.+-]{0,40})\)"),
            "version",
            kind="text",
        ),
        words("KvSize:", "n_ctx", r"(?P<value>\d{1,9})", setting=False),
        words("Parallel:", "seqs", r"(?P<value>\d{1,4}) "),
        words("BatchSize:", "ubatch_tokens", r"(?P<value>\d{1,6})"),
        words("KvCacheType:", "k_type", r"(?P<value>[a-z]\w{1,8})", kind="text", setting=False),
        words("--ctx-size ", "n_ctx", r"(?P<value>\d{1,9})", setting=False),
        words(" -np ", "seqs", r"(?P<value>\d{1,4})"),
        words("general.name ", "model", r"(?:str )?= ?\"?(?P<value>[^\"\n]{1,120})", kind="text", first=True),
        *WORDS,
    ),
    rank=no_rank,
    place=place,
    derive=derive,
)
