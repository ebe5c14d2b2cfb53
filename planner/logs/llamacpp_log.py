"""What llama.cpp prints at boot: builds of 2025 to b11434, its programs and what wraps them (LM Studio, Ollama).

Every buffer is one line with the name of its backend: `load_tensors: CUDA0 model buffer size = 14032.23 MiB`. A draft
model or the context of multi-token prediction prints its own, which are added. Since the summer of 2026 llama-server
prints them from `-lv 4` on only. Where no accelerator has a buffer, the CPU is the device. The table at exit, "memory
breakdown", says what is left unaccounted for on a device: driver context, pools and other processes together.
"""

import re

from .dialect import MIB, NUMBER, Dialect, LoggedPart, PartFormat, WordFormat, integer, no_rank, text_of, words

_NAME = r"(?P<place>[A-Za-z][\w:.\[\]()/-]{0,60})"
_SIZE = rf"(?P<a>{NUMBER}) MiB"
_HOST = re.compile(r"^(?:CPU|BLAS|AMX|Host|KleidiAI|ACCEL|.{0,40}_(?:Host|Mapped|REPACK)$)", re.IGNORECASE)
_NUMBERED = re.compile(r"^[A-Za-z]+?(\d{1,3})(?:_Split|_Private)?$")


def place(name: str | None, number: int, names: frozenset[str]) -> str:
    """`device` and its number; `host` for a CPU's buffers beside an accelerator's."""
    accelerators = sorted(known for known in names if not _is_host(known))
    if name is None:  # the vision tower, which goes to the first device
        return "device0"
    if _is_host(name):
        return "host" if accelerators else "device0"
    numbered = _NUMBERED.match(name)
    return f"device{int(numbered[1]) if numbered else accelerators.index(name)}"


def _is_host(name: str) -> bool:
    return not name.startswith(("CUDA_Split", "Metal_Mapped", "MTL0_Mapped")) and bool(_HOST.match(name))


def derive(
    settings: dict[str, object], facts: dict[str, object], parts: tuple[LoggedPart, ...]
) -> tuple[LoggedPart, ...]:
    """Tokens per sequence, and one cache type where K and V are alike."""
    total, seqs = integer(facts, "n_ctx"), integer(settings, "seqs") or 1
    if total and not integer(settings, "ctx_tokens"):
        settings["ctx_tokens"] = max(1, total // seqs)
    if settings.get("kv_unified") and total:  # all sequences share the cells
        settings["ctx_tokens"] = max(1, total // seqs)
    k_type, v_type = text_of(facts, "k_type"), text_of(facts, "v_type")
    if k_type:
        settings["kv_dtype"] = k_type if v_type in (None, k_type) else f"{k_type}/{v_type}"
    build = settings.pop("build", None)
    if build and build != "0":
        settings["version"] = f"b{build}"
    return parts


def _buffer(needle: str, part: str, versions: str, source: str, again: str = "replace") -> PartFormat:
    """`function: NAME needle 12.34 MiB`, the vision tower's apart, which are reserved anew for other images."""
    function = r"\b(?!alloc_compute_meta|reserve_compute_meta)\w{1,40}:"
    pattern = re.compile(rf"{function}\s{{1,40}}{_NAME}\s{{1,20}}{re.escape(needle)}\s{{1,8}}{_SIZE}")
    return PartFormat(needle, pattern, part, versions, source, unit=MIB, decimals=2, again=again)


PARTS = (
    _buffer("model buffer size =", "weights", "b4500 (2025) to b11434", "llama-model.cpp load_tensors", "add"),
    PartFormat(
        needle="buffer size =",
        pattern=re.compile(rf"llm_load_tensors:\s{{1,40}}{_NAME} buffer size =\s{{1,8}}{_SIZE}"),
        part="weights",
        versions="until January 2025, and ik_llama.cpp",
        source="llama.cpp llm_load_tensors",
        unit=MIB,
        decimals=2,
        again="add",
    ),
    _buffer("KV buffer size =", "kv_cache", "2025 to b11434", "llama-kv-cache.cpp", "add"),
    _buffer("RS buffer size =", "recurrent_state", "b5900 (July 2025) to b11434", "llama-memory-recurrent.cpp", "add"),
    _buffer("compute buffer size =", "activation", "2025 to b11434", "llama-context.cpp sched_reserve"),
    _buffer("output buffer size =", "activation", "2025 to b11434", "llama-context.cpp output_reserve"),
    PartFormat(
        needle="compute buffer total size =",
        pattern=re.compile(rf"[:=]\s{{1,40}}{_NAME} compute buffer total size =\s{{1,8}}{_SIZE}"),
        part="activation",
        versions="LM Studio's and other wrappers' wording",
        source="ggml",
        unit=MIB,
        decimals=2,
    ),
    PartFormat(
        needle="_compute_meta:",
        pattern=re.compile(rf"(?:alloc|reserve)_compute_meta:\s{{1,40}}{_NAME} compute buffer size =\s{{1,8}}{_SIZE}"),
        part="activation",
        versions="the vision tower, b5700 (2025) to b11434",
        source="tools/mtmd/clip.cpp",
        unit=MIB,
        decimals=2,
    ),
    PartFormat(
        needle="model size:",
        pattern=re.compile(rf"(?:clip_model_loader|load_hparams|clip_init): model size:\s{{1,20}}{_SIZE}"),
        part="weights",
        versions="the vision tower, 2025 to b11434",
        source="tools/mtmd/clip.cpp",
        unit=MIB,
        decimals=2,
        again="add",
    ),
    PartFormat(
        needle="|   - ",
        pattern=re.compile(
            rf"\|   - (?P<place>\w{{1,20}}) \([^|]{{0,80}}\)\s{{1,20}}\|\s{{0,9}}\d{{1,12}} =\s{{1,9}}\d{{1,12}} \+ "
            rf"\(\s{{0,12}}\d{{1,12}} =[\d +]{{1,60}}\) \+\s{{0,12}}(?P<a>{NUMBER}) \|"
        ),
        part="runtime",
        versions="October 2025 to b11434, when the server ends",
        source="common/fit.cpp common_memory_breakdown_print",
        unit=MIB,
        after_ready=True,
    ),
)
WORDS = (
    WordFormat("build", re.compile(r"build(?:_info)?: b?(?P<value>\d{1,6})[ -]"), "build", kind="text"),
    WordFormat("print_info: build ", re.compile(r"print_info: build (?P<value>\d{1,6}) "), "build", kind="text"),
    words("general.name", "model", r"\s{1,40}(?:str\s{1,40})?=\s{1,4}(?P<value>[^\n]{1,120})", kind="text", first=True),
    words("loading model '", "file", r"(?P<value>[^']{1,400})'", kind="text", first=True),
    WordFormat(
        "loaded meta data with",
        re.compile(r"loaded meta data with .{1,60} from (?P<value>.{1,400}) \(version"),
        "file",
        kind="text",
        first=True,
    ),
    WordFormat(
        "Device ",
        re.compile(r"Device \d{1,2}: (?P<value>[A-Z][\w .()-]{2,60}), (?:compute capability|gfx|VMM)"),
        "devices",
        kind="list",
    ),
    words("file type   = ", "file_type", r"(?P<value>[\w() .-]{1,60})", kind="text", first=True),
    words("model ftype      = ", "file_type", r"(?P<value>[\w() .-]{1,60})", kind="text", first=True),
    WordFormat("n_ctx ", re.compile(r": n_ctx\s{1,20}= (?P<value>\d{1,9})"), "n_ctx", setting=False, first=True),
    WordFormat("n_ctx_seq ", re.compile(r": n_ctx_seq\s{1,20}= (?P<value>\d{1,9})"), "ctx_tokens", first=True),
    WordFormat("n_ctx_per_seq", re.compile(r": n_ctx_per_seq\s{1,20}= (?P<value>\d{1,9})"), "ctx_tokens", first=True),
    WordFormat("n_seq_max", re.compile(r": n_seq_max\s{1,20}= (?P<value>\d{1,6})"), "seqs", first=True),
    WordFormat("n_ubatch", re.compile(r": n_ubatch\s{1,20}= (?P<value>\d{1,9})"), "ubatch_tokens", first=True),
    WordFormat("n_batch", re.compile(r": n_batch\s{1,20}= (?P<value>\d{1,9})"), "batch_tokens", first=True),
    WordFormat(
        "kv_unified", re.compile(r": kv_unified\s{1,20}= (?P<value>true|false)"), "kv_unified", kind="bool", first=True
    ),
    WordFormat(
        "flash_attn", re.compile(r": flash_attn\s{1,20}= (?P<value>\w{1,10})"), "flash_attn", kind="text", first=True
    ),
    WordFormat("n_rs_seq", re.compile(r": n_rs_seq\s{1,20}= (?P<value>\d{1,3})"), "mtp", first=True),
    WordFormat(
        "K (", re.compile(r"\bK \((?P<value>[a-z][a-z0-9_]{1,8})\):"), "k_type", kind="text", setting=False, first=True
    ),
    WordFormat(
        "V (", re.compile(r"\bV \((?P<value>[a-z][a-z0-9_]{1,8})\):"), "v_type", kind="text", setting=False, first=True
    ),
    WordFormat(
        "offloaded ",
        re.compile(r"offloaded (?P<value>\d{1,4}/\d{1,4}) layers to GPU"),
        "offloaded_layers",
        kind="text",
        setting=False,
    ),
    WordFormat("cells", re.compile(r"\(\s{0,12}(?P<value>\d{1,9}) cells"), "cells", setting=False, first=True),
    WordFormat(
        "size limit: ",
        re.compile(r"prompt cache is enabled, size limit: (?P<value>\d{1,9}) MiB"),
        "prompt_cache_limit_bytes",
        kind="bytes",
        setting=False,
        unit=MIB,
    ),
)
DEATH_WORDS = ("out of memory", "allocate", "allocation of size", "OutOfMemory")
DEATHS = (
    re.compile(r"allocating [\d.]{1,20} MiB on device \d{1,3}: cudaMalloc failed: out of memory"),
    re.compile(r"(?:unable to allocate|failed to allocate) [\w.]{1,40} buffer(?: of size \d{1,20})?"),
    re.compile(r"failed to allocate buffer for (?:kv|rs) cache"),
    re.compile(r"failed to allocate compute (?:pp|tg) buffers"),
    re.compile(r"Device memory allocation of size \d{1,20} failed"),
    re.compile(r"kIOGPUCommandBufferCallbackErrorOutOfMemory"),
)
DIALECT = Dialect(
    engine="llama.cpp",
    marks=(
        "llama_context:",
        "load_tensors:",
        "llama_kv_cache",
        "llama_model_loader:",
        "llama_memory_recurrent",
        "llm_load_tensors:",
        "llama_server:",
        "sched_reserve:",
        "common_params_fit_impl",
        "srv    load_model",
    ),
    starts=("print_info: build ", "build: ", "build_info: ", "llama_server: initializing", "main: loading model"),
    contexts=("llama_context: constructing", "llama_new_context_with_model: n_ctx "),
    ready=("model loaded", "server is listening", "llama_server: listening", "warming up the model"),
    death_words=DEATH_WORDS,
    deaths=DEATHS,
    parts=PARTS,
    words=WORDS,
    rank=no_rank,
    place=place,
    derive=derive,
)
