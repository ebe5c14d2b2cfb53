"""A checkpoint that is not there yet, as the planner reads it: headers and sizes without the data.

What a run will make is known to the byte beforehand (`entries` of a result), so its files can be laid out with holes
in place of weights. Whoever reads headers only (`profiles/checkpoint.py`, `profiles/gguf_model.py`) sees the result
itself: the plan of a draft is the plan of the finished checkpoint.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from .folder_result import FolderResult
from .gguf_file import draft_gguf
from .gguf_result import GgufResult
from .output import copy_beside
from .shards import draft_shards, write_text


@contextmanager
def drafted(result: FolderResult | GgufResult) -> Iterator[str]:
    """The path that stands for the model: a folder, or a GGUF file. It is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="qwenfit-draft-") as folder:
        if isinstance(result, GgufResult):
            path = os.path.join(folder, "draft.gguf")
            draft_gguf(path, result.source, result.tensors)
            yield path
            return
        copy_beside(result.source.folder, folder)
        config = copy.deepcopy(dict(result.source.config))
        config["quantization_config"] = result.quantization_config()
        write_text(os.path.join(folder, "config.json"), json.dumps(config))
        draft_shards(folder, result.entries())
        yield folder
