"""A file of known size that is written in any order: its room is taken on the disk first, its header comes last.

So a full disk is noticed before any work is done, a killed run goes on in the same file, and what is half done does not
load: until `finish` the file begins with zeros.
"""

import errno
import os
from typing import NoReturn

from ..profiles.errors import BadInput
from .positioned import BINARY, free_bytes, sync, take_room, taken_bytes, write_at


class PlacedFile:
    """`size_bytes` bytes at `path`, of which the first `header_bytes` are written by `finish`."""

    def __init__(self, path: str, size_bytes: int, header_bytes: int, resume: bool = False) -> None:
        """resume: a file that is there is gone on with. `BadInput` where it has another size, or cannot be written."""
        self.path, self.size_bytes, self.header_bytes = path, size_bytes, header_bytes
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | BINARY | (0 if resume else os.O_EXCL), 0o666)
            found_bytes = os.fstat(self._file).st_size
            if found_bytes not in (0, size_bytes):
                os.close(self._file)
                raise BadInput(f"{path} has {found_bytes} bytes where this run writes {size_bytes}; start anew")
            self._take_room()
        except OSError as error:
            refuse(path, error)

    def write(self, offset_bytes: int, data: memoryview | bytes) -> None:
        """Those bytes from that offset on. Several threads may write at once."""
        view = memoryview(data).cast("B")
        if offset_bytes < self.header_bytes or offset_bytes + len(view) > self.size_bytes:
            raise ValueError(f"{len(view)} bytes at {offset_bytes} are outside the data of {self.path}")
        self._write(offset_bytes, view)

    def sync(self) -> None:
        """Waits until what was written would survive a power cut."""
        try:
            sync(self._file)
        except OSError as error:
            refuse(self.path, error)

    def finish(self, header: bytes) -> None:
        """Writes the header, syncs and closes."""
        if len(header) != self.header_bytes:
            raise ValueError(f"a header of {len(header)} bytes where {self.header_bytes} were kept")
        self._write(0, memoryview(header))
        self.sync()
        self.close()

    def close(self) -> None:
        """Closes the file as it is; `finish` has done so already."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take_room(self) -> None:
        """Has the disk keep all bytes for this file. Asks first: a disk that is filled to the brim harms others."""
        taken = taken_bytes(self._file)
        try:
            if free_bytes(self.path) < self.size_bytes - taken:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.size_bytes:
                take_room(self._file, self.size_bytes)
        except OSError:
            if not taken:
                os.ftruncate(self._file, 0)  # what was taken before the disk was full
            self.close()
            raise

    def _write(self, offset_bytes: int, view: memoryview) -> None:
        try:
            write_at(self._file, view, offset_bytes)
        except OSError as error:
            refuse(self.path, error)


def refuse(path: str, error: OSError) -> NoReturn:
    """`BadInput` in one sentence for what the disk says no to."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and start again with --resume",
        errno.EDQUOT: "the disk quota is used up; free some space and start again with --resume",
        errno.EROFS: "the file system is read-only; give another target",
        errno.EACCES: "writing there is not permitted; give another target",
        errno.EPERM: "writing there is not permitted; give another target",
        errno.EFBIG: "the file system takes no files of that size; give another target",
    }
    reason = reasons.get(error.errno or 0, error.strerror)
    raise BadInput(f"{path} cannot be written: {reason}") from error
