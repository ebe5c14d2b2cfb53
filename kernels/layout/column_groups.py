"""Which group a column belongs to: group sizes from shapes, and GPTQ's act-order as an order of columns."""

import torch
from torch import Tensor


def group_size_of(columns: int, groups: int, hint: int | None, what: str) -> int:
    """Columns per scale of a matrix with so many columns and groups; -1 for one group.

    hint: what the configuration says, believed where it gives that number of groups (the last may be shorter). Else
    groups are equal, for mixed checkpoints have several sizes and name one. ValueError, naming `what`, otherwise.
    """
    if groups == 1:
        return -1
    if hint is not None and hint > 0 and -(-columns // hint) == groups:
        return hint
    if groups < 1 or columns % groups:
        raise ValueError(f"{what}: {columns} columns do not fall into {groups} equal groups; the shapes disagree")
    return columns // groups


def order_of(g_idx: Tensor, columns: int, groups: int, group_size: int, what: str) -> tuple[Tensor | None, int]:
    """The order of columns that puts each group together, None where they are; and the group size.

    g_idx: int32 [columns], the group of every column. All -1 means the same as none at all (compressed-tensors before
    it is filled in). The order is stable, so `group_index` gives g_idx back. ValueError, naming `what`, where groups
    are missing or uneven: then columns have no layout of equal groups.
    """
    if g_idx.dtype not in (torch.int32, torch.int64) or g_idx.shape != (columns,):
        found = f"{str(g_idx.dtype).removeprefix('torch.')} {list(g_idx.shape)}"
        raise ValueError(f"{what}: g_idx is {found}, not int32 [{columns}]; the file is damaged")
    if bool((g_idx == -1).all()):
        return None, group_size
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ValueError(
            f"{what}: g_idx names groups {int(g_idx.min())} to {int(g_idx.max())}, but {groups} have scales"
        )
    counts = torch.bincount(g_idx, minlength=groups)
    size = int(counts[0])
    if not bool((counts[:-1] == size).all()) or not 0 < int(counts[-1]) <= size:
        raise ValueError(f"{what}: g_idx makes groups of different sizes, which no layout has; quantize anew")
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None, size
    return g_idx.argsort(stable=True).to(torch.int32), size


def group_index(columns: int, group_size: int, order: Tensor | None, device: torch.device) -> Tensor:
    """g_idx int32 [columns]: the inverse of `order_of`."""
    groups = torch.arange(columns, dtype=torch.int32, device=device) // group_size
    if order is None:
        return groups
    g_idx = torch.empty_like(groups)
    g_idx[order.long()] = groups
    return g_idx
