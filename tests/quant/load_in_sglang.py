"""Run by an interpreter that has SGLang: the model and its draft are built as SGLang builds them, on a CPU, and given
the files of a folder. Prints FOUND and, as JSON, {class: {"without": parameters that no file filled, "unknown": what
its log says of tensors that it has no parameter for}}, or {class: {"error": ...}}.

No kernel is run: what is checked is which parameters the quantization config makes, and that the files fill them all.
Kernels for CUDA are taken to be there, or the formats that need them would be refused.
"""

# pyright: reportMissingImports=false
import glob
import json
import logging
import sys

import torch

torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
FOLDER, DTYPE = sys.argv[1:]


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def start():
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.quantization import marlin_utils
    from sglang.srt.layers.quantization.awq import awq
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    marlin_utils.get_device_capability = lambda *_: (9, 0)
    awq._is_cuda = True
    settings = ServerArgs(
        model_path=FOLDER, device="cpu", skip_tokenizer_init=True, disable_cuda_graph=True, dtype=DTYPE,
        mem_fraction_static=0.5, attention_backend="torch_native", disable_radix_cache=True,
    )  # fmt: skip
    publish(settings, role="scheduler", ranks=SpawnRanks(world_rank=0))
    method = f"file://{FOLDER}/.rendezvous"
    init_distributed_environment(backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=method)
    initialize_model_parallel(backend="gloo")
    return settings


def weights():
    from safetensors import safe_open

    for path in sorted(glob.glob(f"{FOLDER}/*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def load(settings, is_draft, log):
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    config, how = ModelConfig.from_server_args(settings, is_draft_model=is_draft), LoadConfig()
    with set_default_torch_dtype(config.dtype):
        model = _initialize_model(config, how, _get_quantization_config(config, how))
    parameters = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    for value in parameters.values():
        value.data.fill_(float("nan"))
    log.lines.clear()
    loaded = model.load_weights(weights())
    without = {name for name, value in parameters.items() if bool(value.float().isnan().any())}
    if loaded:  # codes, which are integers
        without |= {name for name, _ in model.named_parameters()} - set(loaded)
    return type(model).__name__, {"without": sorted(without), "unknown": [x for x in log.lines if "not found" in x]}


if __name__ == "__main__":
    log, found = Log(), {}
    logging.getLogger("sglang").addHandler(log)
    settings = start()
    for is_draft in (False, True):
        try:
            name, what = load(settings, is_draft, log)
        except Exception as error:  # what SGLang says is the answer
            name, what = "draft" if is_draft else "model", {"error": f"{type(error).__name__}: {error}"}
        found[name] = what
    print("FOUND" + json.dumps(found))
