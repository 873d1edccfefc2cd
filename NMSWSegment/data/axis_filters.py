"""Linear filters of single axes: a matrix for each axis of a volume."""

import torch
from torch import Tensor

Matrices = tuple[Tensor, Tensor, Tensor]


def apply_along_axes(values: Tensor, matrices: Matrices) -> Tensor:
    """Multiply each axis of (a, b, c) by its matrix: (A, a), (B, b), (C, c) give (A, B, C)."""
    matrices = [matrix.to(values.device, non_blocking=True) for matrix in matrices]
    values = torch.matmul(values, matrices[2].T)  # (a, b, C)
    values = torch.matmul(matrices[1], values)  # (a, B, C)
    return torch.tensordot(matrices[0], values, dims=1)  # (A, B, C)
