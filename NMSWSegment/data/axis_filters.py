"""Linear filters of single axes: a matrix for each axis of a volume."""

import torch
from torch import Tensor

Matrices = tuple[Tensor, Tensor, Tensor]


def averaging_matrix(size: int, *, width_voxels: float) -> Tensor:
    """Mean over `width_voxels` (at least 1) around every voxel of an axis, (size, size); width 1 is the identity."""
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    weights = (width_voxels / 2 + 0.5 - distance).clamp(0, 1)
    return weights / weights.sum(dim=1, keepdim=True)


def apply_along_axes(values: Tensor, matrices: Matrices) -> Tensor:
    """Multiply each axis of (a, b, c) by its matrix: (A, a), (B, b), (C, c) give (A, B, C)."""
    values = torch.matmul(values, matrices[2].T)  # (a, b, C)
    values = torch.matmul(matrices[1], values)  # (a, B, C)
    return torch.tensordot(matrices[0], values, dims=1)  # (A, B, C)
