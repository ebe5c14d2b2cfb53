"""The calibration tokens between two stages: float32 rows, in memory or, where memory is short, in a file."""

import os

import torch
from torch import Tensor

from .placed_file import refuse
from .positioned import BINARY, read_at, write_at


class Activations:
    """[rows, columns] float32; `x[at]` reads the rows of a slice, `x[at] = part` writes them.

    path: None keeps them in memory on `device`; else a file that is read and written by position, never mapped (mapped
    pages would count as memory of the process), and removed by `close`. Threads may work on different rows at once.
    """

    def __init__(self, rows: int, columns: int, device: torch.device | str = "cpu", path: str | None = None) -> None:
        self.rows, self.columns, self.device, self.path = rows, columns, torch.device(device), path
        self._tensor = None if path else torch.empty(rows, columns, device=device)
        self._file = -1
        if path:
            try:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | BINARY, 0o600)
            except OSError as error:
                refuse(path, error)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, at: slice) -> Tensor:
        if self._tensor is not None:
            return self._tensor[at]
        start, stop, _ = at.indices(self.rows)
        part = torch.empty(stop - start, self.columns)
        buffer, offset = part.view(-1).view(torch.uint8).numpy().data, 4 * self.columns * start
        while buffer:
            count = read_at(self._file, buffer, offset)
            if count == 0:
                raise ValueError(f"{self.path} is shorter than what was written to it")
            buffer, offset = buffer[count:], offset + count
        return part.to(self.device)

    def __setitem__(self, at: slice, part: Tensor) -> None:
        if self._tensor is not None:
            self._tensor[at] = part
            return
        start, stop, _ = at.indices(self.rows)
        if part.shape != (stop - start, self.columns):
            raise ValueError(f"{list(part.shape)} for rows {start} to {stop} of {self.columns} columns")
        rows = part.detach().float().cpu().contiguous()
        buffer, offset = rows.view(-1).view(torch.uint8).numpy().data, 4 * self.columns * start
        try:
            write_at(self._file, buffer, offset)
        except OSError as error:
            refuse(str(self.path), error)

    def close(self) -> None:
        """Frees what it holds."""
        self._tensor = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            os.unlink(str(self.path))
