"""Files read and written by position, by several threads at once: by the system's own calls, or where it has none
(Windows), one at a time behind a lock. Nor does that claim files. macOS has neither fdatasync nor posix_fallocate."""

import errno
import os
import shutil
from importlib import import_module
from io import FileIO
from threading import Lock
from typing import Any

BINARY = getattr(os, "O_BINARY", 0)
_alone = Lock()
_pread: Any = getattr(os, "preadv", None)
_pwrite: Any = getattr(os, "pwrite", None)
_fallocate: Any = getattr(os, "posix_fallocate", None)
_fsync: Any = getattr(os, "fdatasync", os.fsync)
_locks: Any = import_module("fcntl") if os.name == "posix" else None


def read_at(file: int, buffer: memoryview, offset_bytes: int) -> int:
    """Fills the beginning of `buffer`; how many bytes, 0 at the end of the file. OSError as of the system."""
    if _pread:
        return _pread(file, [buffer], offset_bytes)
    with _alone:
        os.lseek(file, offset_bytes, os.SEEK_SET)
        part = os.read(file, min(len(buffer), 1 << 26))
    buffer[: len(part)] = part
    return len(part)


def write_at(file: int, data: memoryview, offset_bytes: int) -> None:
    """All of `data`. OSError as of the system."""
    while data:  # Linux writes at most 2 GiB at once
        if _pwrite:
            count = _pwrite(file, data, offset_bytes)
        else:
            with _alone:
                os.lseek(file, offset_bytes, os.SEEK_SET)
                count = os.write(file, data[: 1 << 26])
        data, offset_bytes = data[count:], offset_bytes + count


def sync(file: int) -> None:
    """Waits until what was written would survive a power cut."""
    _fsync(file)


def claim(path: str) -> FileIO | None:
    """An open file that says to other processes that `path` is in use, until it is closed or this process ends in
    whatever way. None where another one says so. A file system without such locks claims nothing. OSError as of the
    system."""
    file = FileIO(path, "ab")
    try:
        if _locks:
            _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            return None
    return file


def free_bytes(path: str) -> int:
    """What this process may still write on the disk of an existing file."""
    return shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free


def taken_bytes(file: int) -> int:
    """What the disk keeps for an open file already."""
    status = os.fstat(file)
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else 512 * blocks


def take_room(file: int, size_bytes: int) -> None:
    """Has the disk keep so many bytes; where it cannot promise that, the file has the size at least."""
    if _fallocate:
        _fallocate(file, 0, size_bytes)
    else:
        os.ftruncate(file, size_bytes)
