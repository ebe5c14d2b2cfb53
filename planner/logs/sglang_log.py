"""What SGLang prints at boot, 0.4 (2025) to 0.5.23, and KTransformers, which is a fork of it.

Its GB are 2^30 bytes. The figures of a draft model are printed by the same lines a second time and are added. Ranks
stand behind the time: [2026-02-27 17:10:27 TP1], with DP, PP and EP where there are several.
"""

import re

from .dialect import GIB, NUMBER, Dialect, LoggedPart, PartFormat, Rank, WordFormat, device_place, words

_STAMP = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d([A-Z0-9 ]{0,40})\]")
_AXES = {axis: re.compile(rf"\b{axis}(\d{{1,4}})\b") for axis in ("DP", "PP", "TP")}
_MEM = rf"mem usage ?= ?(?P<a>{NUMBER}) ?GB"


def _rank(line: str) -> Rank:
    stamp = _STAMP.search(line[:2000])
    head = stamp[1] if stamp else ""
    data, pipeline, tensor = (int(found[1]) if (found := axis.search(head)) else 0 for axis in _AXES.values())
    return data, pipeline, tensor


def _derive(
    settings: dict[str, object], facts: dict[str, object], parts: tuple[LoggedPart, ...]
) -> tuple[LoggedPart, ...]:
    if settings.get("kv_dtype") in ("auto", "bfloat16"):
        settings["kv_dtype"] = "bf16"
    radix_is_off = settings.pop("no_prefix_caching", None)
    if radix_is_off is not None:
        settings["prefix_caching"] = not radix_is_off
    return parts


DIALECT = Dialect(
    engine="sglang",
    marks=(
        "server_args=",
        "Load weight end",
        "Load weight begin",
        "Mamba Cache is allocated",
        "KV Cache is allocated",
        "sglang",
    ),
    starts=("server_args=",),
    contexts=(),
    ready=("The server is fired up and ready to roll", "max_total_num_tokens="),
    death_words=("out of memory", "Not enough memory", "graph failed", "weights failed"),
    deaths=(
        re.compile(r"(?:torch\.)?(?:cuda\.)?OutOfMemoryError: (?:CUDA|HIP) out of memory.{0,300}"),
        re.compile(r"Not enough memory[.;] [Pp]lease try.{0,200}"),
        re.compile(r"Capture cuda graph failed: .{0,200}"),
        re.compile(r"CUDA error: out of memory"),
        re.compile(r"Loading the model weights failed.{0,160}memory.{0,160}"),
    ),
    parts=(
        PartFormat(
            needle="Load weight end",
            pattern=re.compile(rf"Load weight end\..{{0,300}}?{_MEM}"),
            part="weights",
            versions="0.4.4 to 0.5.23",
            source="model_executor/model_runner.py load_model",
            unit=GIB,
            decimals=2,
            again="add",
        ),
        PartFormat(
            needle="Mamba Cache is allocated",
            pattern=re.compile(
                rf"Mamba Cache is allocated\. .{{0,60}}?conv_state size: (?P<a>{NUMBER}) ?GB,? ssm_state size: "
                rf"(?P<b>{NUMBER}) ?GB(?: ?,? ?intermediate_ssm_state_cache size: (?P<c>{NUMBER}) ?GB)?"
                rf"(?: ?,? ?intermediate_conv_window_cache size: (?P<d>{NUMBER}) ?GB)?"
            ),
            part="recurrent_state",
            versions="0.5.4 to 0.5.23",
            source="mem_cache/memory_pool.py MambaPool",
            unit=GIB,
            decimals=2,
            again="add",
        ),
        PartFormat(
            needle="KV Cache is allocated",
            pattern=re.compile(
                rf"KV Cache is allocated\..{{0,120}}?K size: (?P<a>{NUMBER}) ?GB, V size: (?P<b>{NUMBER}) ?GB"
            ),
            part="kv_cache",
            versions="0.4 to 0.5.23",
            source="mem_cache/memory_pool.py",
            unit=GIB,
            decimals=2,
            again="add",
        ),
        PartFormat(
            needle=" graph end",
            pattern=re.compile(rf"Capture (?:[\w -]{{0,40}} )?(?i:cuda) graph end\..{{0,4000}}?{_MEM}"),
            part="graph",
            versions="0.4.4 to 0.5.23; prefill and draft graphs are lines of their own",
            source="model_executor/model_runner_components/cuda_graph_setup.py",
            unit=GIB,
            decimals=2,
            again="add",
        ),
    ),
    words=(
        words("model_path='", "model", r"(?P<value>[^']{1,300})'", kind="text"),
        words("'model_path': '", "model", r"(?P<value>[^']{1,300})'", kind="text"),
        words("sglang version ", "version", r"v?(?P<value>\d[\w.+]{0,40})", kind="text"),
        words("sglang==", "version", r"(?P<value>\d[\w.+]{0,40})", kind="text"),
        words("context_len=", "ctx_tokens", r"(?P<value>\d{1,9})"),
        words("max_running_requests=", "seqs", r"(?P<value>\d{1,6})"),
        words(" kv_cache_dtype=", "kv_dtype", r"'(?P<value>\w{1,40})'", kind="text"),
        words("'kv_cache_dtype': ", "kv_dtype", r"'(?P<value>\w{1,40})'", kind="text"),
        words("mamba_ssm_dtype=", "state_dtype", r"'(?P<value>\w{1,40})'", kind="text"),
        words("'mamba_ssm_dtype': ", "state_dtype", r"'(?P<value>\w{1,40})'", kind="text"),
        words(" tp_size=", "tp", r"(?P<value>\d{1,4})"),
        words("'tp_size': ", "tp", r"(?P<value>\d{1,4})"),
        words(" pp_size=", "pp", r"(?P<value>\d{1,4})"),
        words("'pp_size': ", "pp", r"(?P<value>\d{1,4})"),
        words("mem_fraction_static=", "gpu_memory_utilization", r"(?P<value>0?\.\d{1,18})", kind="float"),
        words("'mem_fraction_static': ", "gpu_memory_utilization", r"(?P<value>0?\.\d{1,18})", kind="float"),
        words("chunked_prefill_size=", "max_num_batched_tokens", r"(?P<value>\d{1,9})"),
        words("disable_radix_cache=", "no_prefix_caching", r"(?P<value>True|False)", kind="bool"),
        words("'disable_radix_cache': ", "no_prefix_caching", r"(?P<value>True|False)", kind="bool"),
        words("disable_cuda_graph=", "eager", r"(?P<value>True|False)", kind="bool"),
        words("'disable_cuda_graph': ", "eager", r"(?P<value>True|False)", kind="bool"),
        words("speculative_num_steps=", "mtp", r"(?P<value>\d{1,3})"),
        words("'speculative_num_steps': ", "mtp", r"(?P<value>\d{1,3})"),
        words("max_mamba_cache_size: ", "state_slots", r"(?P<value>\d{1,7})", setting=False),
        words("max_total_num_tokens=", "kv_cache_tokens", r"(?P<value>\d{1,12})", setting=False),
        words("available_gpu_mem=", "free_bytes", rf"(?P<value>{NUMBER}) GB", kind="bytes", setting=False, unit=GIB),
        WordFormat(
            "Load weight begin",
            re.compile(rf"Load weight begin\. avail mem=(?P<value>{NUMBER}) GB"),
            "free_at_start_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
            first=True,
        ),
        WordFormat(
            "Load weight end",
            re.compile(rf"Load weight end\. elapsed=(?P<value>{NUMBER}) s"),
            "load_s",
            kind="float",
            setting=False,
            first=True,
        ),
    ),
    rank=_rank,
    place=device_place,
    derive=_derive,
)
