"""Where a repository of the hub lies on this disk: in huggingface_hub's cache, downloaded into it where it is not.

Only what a checkpoint of weights needs is asked for: no pickles, no code. The package is optional; without it, or
without a network, the answer is a sentence.
"""

import os

from ..profiles.checkpoint import stored_tensors
from ..profiles.errors import BadInput, QwenfitError, UnknownName, Unsupported
from ..profiles.json_file import short
from ..profiles.model_catalog import model as catalog_model

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*"]


def hub_folder(text: str, revision: str | None = None) -> str:
    """The folder with a repository's files. `text`: `owner/name`, or a name of the catalog (`9b`, `qwen3.5-9b`).

    `UnknownName` where there is no such repository; `BadInput` where it cannot be had now (offline, no access, disk
    full); `Unsupported` where huggingface_hub is missing.
    """
    repo = _repository(text)
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise Unsupported(
            f"{repo} is on the hub, and huggingface_hub is not installed: pip install huggingface_hub, or give a folder"
        ) from error
    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=WANTED)
        if _is_complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    if constants.HF_HUB_OFFLINE:
        raise BadInput(f"{repo} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it")
    try:
        return snapshot_download(repo, revision=revision, allow_patterns=WANTED)
    except GatedRepoError as error:
        raise BadInput(f"{repo} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UnknownName(f"{repo} has no revision {short(revision)}") from error
    except RepositoryNotFoundError as error:
        raise UnknownName(f"{short(text)} is neither a folder here nor a repository on the hub") from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise BadInput(f"{repo} cannot be downloaded into {constants.HF_HUB_CACHE}: {error.strerror}") from error
        raise _unreachable(repo, constants.ENDPOINT) from error
    except Exception as error:
        # What a lost connection raises is the HTTP library's own: httpx from huggingface_hub 1 on, requests before.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub"):
            raise
        raise _unreachable(repo, constants.ENDPOINT) from error


def _unreachable(repo: str, endpoint: str) -> QwenfitError:
    return BadInput(f"{repo} is not in the cache, and {endpoint} cannot be reached: go online, or give a folder")


def _repository(text: str) -> str:
    """`owner/name`. `UnknownName` for what looks like a path, or is in no catalog."""
    looks_like_path = text.startswith((".", "/", "~")) or os.path.sep * 2 in text or os.path.exists(text)
    if looks_like_path or text.count("/") > 1:
        raise UnknownName(f"{short(text)} is not a folder; give a checkpoint's folder or a repository on the hub")
    return text if "/" in text else catalog_model(text).repo


def _is_complete(folder: str) -> bool:
    """Whether config.json and every shard of the index are there, and none is cut short."""
    try:
        return os.path.exists(os.path.join(folder, "config.json")) and bool(stored_tensors(folder))
    except BadInput:
        return False
