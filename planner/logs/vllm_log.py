"""What vLLM prints at boot, 0.8 (spring of 2025) to 0.32, on GPUs and on the CPU backend.

"Available KV cache memory" is the whole pool, of which recurrent states take blocks too. What is left of the budget
(requested less weights, pool and graphs) is the profile: activations, encoder cache, workspaces; vLLM says it in parts
in the line "Free memory on device". Ranks say their names before the level: (Worker_TP1 pid=...), earlier (VllmWorker
rank=1 pid=...); lines that are printed once come from the first.
"""

import re

from .dialect import GIB, NUMBER, Dialect, LoggedPart, PartFormat, Rank, WordFormat, device_place, integer, words

_WORKER = re.compile(r"Worker(?:_DP(\d{1,4}))?(?:_PP(\d{1,4}))?(?:_PCP\d{1,4})?(?:_TP(\d{1,4}))?")
_OLD_WORKER = re.compile(r"VllmWorker(?:Process)? rank=(\d{1,4})")


def _rank(line: str) -> Rank:
    if "Worker" not in line:
        return 0, 0, 0
    old = _OLD_WORKER.search(line)
    if old:
        return 0, 0, int(old[1])
    found = _WORKER.search(line)
    data, pipeline, tensor = found.groups() if found else (None, None, None)
    return int(data or 0), int(pipeline or 0), int(tensor or 0)


def _derive(
    settings: dict[str, object], facts: dict[str, object], parts: tuple[LoggedPart, ...]
) -> tuple[LoggedPart, ...]:
    """Adds the activations that the profile found: what the budget holds beside weights, pool and graphs."""
    if settings.get("kv_dtype") in ("auto", "bfloat16"):
        settings["kv_dtype"] = "bf16"
    captures = [integer(facts, key) for key in ("graphs_piecewise", "graphs_full")]
    if any(captures):
        facts["graph_captures"] = sum(filter(None, captures))
    budget, graphs = integer(facts, "requested_bytes"), integer(facts, "graph_estimate_bytes") or 0
    if facts.get("graph_estimate_is_off"):
        graphs = 0
    if budget is None:
        return parts
    profiled: list[LoggedPart] = []
    for place in dict.fromkeys(part.place for part in parts):
        known = {part.part: part for part in parts if part.place == place}
        taken = [known[name] for name in ("weights", "kv_cache") if name in known]
        left = budget - graphs - sum(part.bytes for part in taken)
        if "kv_cache" in known and left > 0:  # a cache of a size that was asked for does not come from the budget
            doubt = GIB // 100 + sum(part.resolution_bytes for part in taken)
            line = f"requested memory less {', '.join(part.part for part in taken)} and estimated graphs"
            covers = () if "weights" in known else ("weights",)
            profiled.append(LoggedPart("activation", place, left, doubt, line, covers))
    return (*parts, *profiled)


DIALECT = Dialect(
    engine="vllm",
    marks=(
        "vLLM API server version",
        "Initializing a V1 LLM engine",
        "Initializing a V0 LLM engine",
        "Model loading took",
        "KV cache size: ",
        "Available KV cache memory",
        "(EngineCore",
        "vllm.entrypoints",
        "GiB for KV cache on node",
        "gpu_worker.py",
        "gpu_model_runner.py",
        "kv_cache_utils.py",
    ),
    starts=("vLLM API server version", "non-default args:", "Initializing a V1 LLM engine", "Initializing a V0 LLM"),
    contexts=(),
    ready=("Application startup complete", "init engine (profile, create kv cache", "Starting vLLM API server"),
    death_words=(
        "out of memory",
        "No available memory",
        "max seq len",
        "is less than",
        "exceeds available",
        "less than",
    ),
    deaths=(
        re.compile(r"(?:torch\.)?(?:cuda\.)?OutOfMemoryError: (?:CUDA|HIP|XPU) out of memory.{0,300}"),
        re.compile(r"CUDA error: out of memory"),
        re.compile(r"No available memory for the cache blocks.{0,120}"),
        re.compile(r"To serve at least one request with the model'?s'?s? max seq len.{0,320}"),
        re.compile(r"Free memory on device .{0,200} is less than desired GPU memory utilization.{0,160}"),
        re.compile(r"The model's max seq len \(\d{1,12}\) is larger than the maximum number of tokens.{0,160}"),
        re.compile(r"max_num_seqs .{0,80}exceeds available Mamba cache blocks.{0,200}"),
        re.compile(r"Available memory on node .{0,240}less than requested memory for kv.{0,160}"),
    ),
    parts=(
        PartFormat(
            needle="Model loading took",
            pattern=re.compile(
                rf"Model loading took (?P<a>{NUMBER}) (?P<unit>GiB|GB)(?: memory)? and {NUMBER} seconds"
            ),
            part="weights",
            versions="0.8 to 0.32; four decimals up to 0.12, then two of which zeros are left out",
            source="v1/worker/gpu_model_runner.py load_model",
            unit=GIB,
            decimals=2,
            group="weights",
        ),
        PartFormat(
            needle="GiB for weight,",
            pattern=re.compile(rf"Actual usage is (?P<a>{NUMBER}) GiB for weight,"),
            part="weights",
            versions="0.10 to 0.26; later lines sum weights with what torch does not know of",
            source="v1/worker/gpu_worker.py compile_or_warm_up_model",
            unit=GIB,
            decimals=2,
            group="weights",
        ),
        PartFormat(
            needle="Current kv cache memory in use",
            pattern=re.compile(rf"Current kv cache memory in use is (?P<a>{NUMBER}) (?P<unit>GiB|bytes)"),
            part="kv_cache",
            versions="0.10 (bytes) to 0.32",
            source="v1/worker/gpu_worker.py compile_or_warm_up_model",
            unit=GIB,
            decimals=2,
            covers=("recurrent_state",),
            group="pool",
        ),
        PartFormat(
            needle="Available KV cache memory",
            pattern=re.compile(rf"Available KV cache memory: (?P<a>{NUMBER}) GiB"),
            part="kv_cache",
            versions="0.9 to 0.32",
            source="v1/worker/gpu_worker.py determine_available_memory",
            unit=GIB,
            decimals=2,
            covers=("recurrent_state",),
            group="pool",
        ),
        PartFormat(
            needle="GiB for KV cache on node",
            pattern=re.compile(rf"(?:Explicitly|Auto) set \((?P<a>{NUMBER})/{NUMBER}\) GiB for KV cache on node"),
            part="kv_cache",
            versions="CPU backend, 0.31 and 0.32",
            source="v1/worker/cpu_worker.py determine_available_memory",
            unit=GIB,
            decimals=2,
            covers=("recurrent_state",),
            group="pool",
        ),
        PartFormat(
            needle="Graph capturing finished",
            pattern=re.compile(rf"Graph capturing finished in {NUMBER} secs, took (?P<a>{NUMBER}) GiB"),
            part="graph",
            versions="0.8 to 0.32",
            source="v1/worker/gpu_model_runner.py capture_model",
            unit=GIB,
            decimals=2,
            group="graphs",
        ),
        PartFormat(
            needle="GiB for CUDAGraph memory",
            pattern=re.compile(rf"(?P<a>{NUMBER}) GiB for CUDAGraph memory"),
            part="graph",
            versions="0.10 to 0.32",
            source="v1/worker/gpu_worker.py compile_or_warm_up_model",
            unit=GIB,
            decimals=2,
            group="graphs",
        ),
    ),
    words=(
        words("vLLM API server version ", "version", r"v?(?P<value>\d[\w.+]{0,40})", kind="text"),
        WordFormat("engine (v", re.compile(r"LLM engine \(v(?P<value>\d[\w.+]{0,40})\)"), "version", kind="text"),
        WordFormat("version ", re.compile(r"█  version (?P<value>\d[\w.+]{0,40})"), "version", kind="text"),
        words("'model': '", "model", r"(?P<value>[^']{1,300})'", kind="text"),
        words("config: model='", "model", r"(?P<value>[^']{1,300})'", kind="text"),
        words("max_seq_len=", "ctx_tokens", r"(?P<value>\d{1,9})"),
        words("'max_model_len': ", "ctx_tokens", r"(?P<value>\d{1,9})"),
        words("Using max model len ", "ctx_tokens", r"(?P<value>\d{1,9})"),
        words("'max_num_seqs': ", "seqs", r"(?P<value>\d{1,6})"),
        words("Defaulting max_num_seqs to ", "seqs", r"(?P<value>\d{1,6})"),
        words("'kv_cache_dtype': ", "kv_dtype", r"'(?P<value>\w{1,40})'", kind="text"),
        words(" kv_cache_dtype=", "kv_dtype", r"'?(?P<value>\w{1,40})", kind="text"),
        words("'mamba_ssm_cache_dtype': ", "state_dtype", r"'(?P<value>\w{1,40})'", kind="text"),
        words("tensor_parallel_size=", "tp", r"(?P<value>\d{1,4})"),
        words("'tensor_parallel_size': ", "tp", r"(?P<value>\d{1,4})"),
        words("pipeline_parallel_size=", "pp", r"(?P<value>\d{1,4})"),
        words("'pipeline_parallel_size': ", "pp", r"(?P<value>\d{1,4})"),
        words("'gpu_memory_utilization': ", "gpu_memory_utilization", r"(?P<value>\d\.\d{1,6})", kind="float"),
        words("utilization is (", "gpu_memory_utilization", r"(?P<value>\d\.\d{1,6}),", kind="float"),
        words(
            "gpu-memory-utilization=", "gpu_memory_utilization", r"(?P<value>0\.\d{1,6}) is equivalent", kind="float"
        ),
        words("'max_num_batched_tokens': ", "max_num_batched_tokens", r"(?P<value>\d{1,9})"),
        words("max_num_batched_tokens=", "max_num_batched_tokens", r"(?P<value>\d{1,9})"),
        words("Defaulting max_num_batched_tokens to ", "max_num_batched_tokens", r"(?P<value>\d{1,9})"),
        words("enable_prefix_caching=", "prefix_caching", r"(?P<value>True|False)", kind="bool"),
        words("'enable_prefix_caching': ", "prefix_caching", r"(?P<value>True|False)", kind="bool"),
        words("enforce_eager=", "eager", r"(?P<value>True|False)", kind="bool"),
        words("'enforce_eager': ", "eager", r"(?P<value>True|False)", kind="bool"),
        words("'language_model_only': ", "text_only", r"(?P<value>True|False)", kind="bool"),
        words("language_model_only=", "text_only", r"(?P<value>True|False)", kind="bool"),
        words("'num_speculative_tokens': ", "mtp", r"(?P<value>\d{1,3})"),
        words("num_spec_tokens=", "mtp", r"(?P<value>\d{1,3})"),
        words("Resolved architecture: ", "architecture", r"(?P<value>\w{1,80})", kind="text"),
        words("quantization=", "quantization", r"'?(?P<value>[\w-]{1,40})", kind="text"),
        words("device_config=", "device_kind", r"(?P<value>cuda|cpu|xpu|rocm|hip)", kind="text"),
        WordFormat(
            "KV cache size: ",
            re.compile(r"KV cache size: (?P<value>[\d,]{1,20}) tokens"),
            "kv_cache_tokens",
            setting=False,
        ),
        WordFormat(
            "Maximum concurrency for ",
            re.compile(r"Maximum concurrency for [\d,]{1,20} tokens per request: (?P<value>\d{1,9}\.\d{1,4})x"),
            "max_concurrency",
            kind="float",
            setting=False,
        ),
        words("attention block size to ", "block_tokens", r"(?P<value>\d{1,7}) tokens", setting=False),
        words("num_gpu_blocks is: ", "num_gpu_blocks", r"(?P<value>\d{1,9})", setting=False),
        WordFormat(
            "Model loading took",
            re.compile(rf"Model loading took .{{1,40}} and (?P<value>{NUMBER}) seconds"),
            "load_s",
            kind="float",
            setting=False,
        ),
        WordFormat(
            "Estimated CUDA graph memory",
            re.compile(rf"Estimated CUDA graph memory: (?P<value>{NUMBER}) GiB"),
            "graph_estimate_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        WordFormat(
            "CUDA graph pool memory",
            re.compile(rf"CUDA graph pool memory: {NUMBER} GiB \(actual\), (?P<value>{NUMBER}) GiB \(estimated\)"),
            "graph_estimate_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        words("Profiling CUDA graph memory: PIECEWISE=", "graphs_piecewise", r"(?P<value>\d{1,4})", setting=False),
        WordFormat(
            "Profiling CUDA graph memory",
            re.compile(r"Profiling CUDA graph memory: .{0,60}FULL=(?P<value>\d{1,4})"),
            "graphs_full",
            setting=False,
        ),
        WordFormat(
            "raph memory profiling ",
            re.compile(r"raph memory profiling (?P<value>will be enabled by default|is disabled)"),
            "graph_estimate_is_off",
            kind="text",
            setting=False,
        ),
        WordFormat(
            "Free memory on device",
            re.compile(rf"Free memory on device (?:cuda:\d{{1,3}} )?\((?P<value>{NUMBER})/{NUMBER} GiB\) on startup"),
            "free_at_start_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        WordFormat(
            "Free memory on device",
            re.compile(rf"Free memory on device (?:cuda:\d{{1,3}} )?\({NUMBER}/(?P<value>{NUMBER}) GiB\) on startup"),
            "device_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        WordFormat(
            "utilization is (",
            re.compile(rf"utilization is \({NUMBER}, (?P<value>{NUMBER}) GiB\)"),
            "requested_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        WordFormat(
            "Actual usage is",
            re.compile(rf"Actual usage is (?P<value>{NUMBER}) GiB for (?:weight|consumed memory)"),
            "consumed_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        WordFormat(
            "GiB for peak activation",
            re.compile(rf"(?P<value>{NUMBER}) GiB for peak activation"),
            "peak_activation_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        WordFormat(
            "GiB for non-torch memory",
            re.compile(rf"(?P<value>{NUMBER}) GiB for non-torch memory"),
            "non_torch_bytes",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
        words(
            "torch peak memory increase: ",
            "torch_peak_bytes",
            rf"(?P<value>{NUMBER})GiB",
            kind="bytes",
            setting=False,
            unit=GIB,
        ),
    ),
    rank=_rank,
    place=device_place,
    derive=_derive,
)
