"""From the volume to the model grid and back.

The model grid is upright in the world: array axes grow to superior, anterior, right (S-A-R, so that index order ijk
is RAS), at the manifest's spacing, intensity normalized and mapped to [0, 1], padded at the far ends to the candidate grid. Oblique,
mirrored and permuted volumes become the same picture as an upright one, and the nets never see the scanner's frame.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.engine.aggregation import uniform_cells
from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.model_grid import GRID_TOLERANCE, ModelGrid, model_grid_around, moves_with
from NMSWSegment.files.normalization import IntensityScale, intensity_scale
from NMSWSegment.files.padding import Padding, find_padding
from NMSWSegment.files.volume import Volume

VOXELS_AT_ONCE = 1 << 21  # bounds the working memory of one slab: about 60 MB, 250 of an oblique volume


def to_model_grid(volume: Volume, manifest: BundleManifest, *, padding: Padding | None = None) -> tuple[Tensor, ModelGrid, CandidateGrid]:
    """The net's view of a volume.

    Args:
        padding: of the volume; taken for air.

    Returns:
        x (1, 1, D, H, W) float32 in [0, 1], padded; the model grid; the grid of all candidates of x.

    Raises:
        UserError: the volume is too large for the model spacing, or has no range of intensities that can be normalized.
    """
    model_grid = model_grid_around(volume.shape, volume.ijk_to_ras, spacing_mm=manifest.spacing_mm)
    grid = CandidateGrid.covering(model_grid.shape, patch_size=manifest.patch_size, overlap=manifest.overlap, coarse_factor=manifest.coarse_factor)
    x = torch.zeros(1, 1, *grid.padded_shape)
    inside = tuple(slice(0, length) for length in model_grid.shape[1:])
    darkest, brightest = manifest.intensity_points[0][0], manifest.intensity_points[-1][0]
    scale = intensity_scale(volume.array, manifest.normalization)
    for slab, intensity in _resampled_slabs(volume, model_grid=model_grid, outside=darkest, bounds=(darkest, brightest), scale=scale, padding=padding):
        x[(0, 0, slab, *inside)] = normalize_intensity(intensity, manifest.intensity_points)
    return x, model_grid, grid


def padding_of(volume: Volume, manifest: BundleManifest) -> Padding | None:
    """What the volume does not show, as the model sees it."""
    return find_padding(volume.array, normalization=manifest.normalization, darkest=manifest.intensity_points[0][0])


def resample_to_model_grid(
    volume: Volume, *, spacing_mm: Sequence[float], outside: float, bounds: tuple[float, float] | None = None
) -> tuple[Tensor, ModelGrid]:
    """The volume's intensity on the model grid without padding, (D, H, W) float32.

    Finer volumes are averaged before they are interpolated, so that noise and thin structures do not alias.

    Args:
        spacing_mm: model spacing, KJI.
        outside: intensity of voxels of the model grid that the volume does not reach.
        bounds: intensities below and above become these before anything is averaged, so that a padding of -3e38 or a spike of 1e39 stays
            in its own voxel; None changes nothing.
    """
    model_grid = model_grid_around(volume.shape, volume.ijk_to_ras, spacing_mm=spacing_mm)
    result = torch.empty(model_grid.shape)
    for slab, intensity in _resampled_slabs(volume, model_grid=model_grid, outside=outside, bounds=bounds):
        result[slab] = intensity
    return result, model_grid


def normalize_intensity(intensity: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """Map intensity to [0, 1] along straight lines through `points` (intensity, value), constant outside; two points are the paper's window."""
    result = torch.full_like(intensity, points[0][1])
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:]):
        result += (intensity - x0).clamp_(0, x1 - x0).mul_((y1 - y0) / (x1 - x0))
    return result


def pad_to_grid(tensor: Tensor, *, grid: CandidateGrid, value: float) -> Tensor:
    """Pad (D, H, W) at the far ends to the grid's volume."""
    missing = [full - length for full, length in zip(grid.padded_shape, tensor.shape)]
    return torch.nn.functional.pad(tensor, [0, missing[2], 0, missing[1], 0, missing[0]], value=value)


def coarse_input(x: Tensor, *, grid: CandidateGrid) -> Tensor:
    """x_low: the mean over the r voxels of each coarse voxel along each axis, (B, 1, D, H, W) -> (B, 1, d, h, w).

    Only the volume's own extent is looked at, not the padding to whole patches; beyond it a coarse voxel averages the lower bound, 0.
    The paper takes single voxels instead of means (docs/deviations.md, D26).
    """
    needed = [length * r for length, r in zip(grid.coarse_shape, grid.coarse_factor)]
    x = x[(..., *(slice(0, length) for length in needed))]
    missing = [full - length for full, length in zip(needed, x.shape[2:])]
    if any(missing):
        x = torch.nn.functional.pad(x, [0, missing[2], 0, missing[1], 0, missing[0]])
    return torch.nn.functional.avg_pool3d(x, grid.coarse_factor)


def coarse_ijk_to_ras(model_grid: ModelGrid, *, grid: CandidateGrid) -> np.ndarray:
    """Where the coarse voxels lie, 4 x 4."""
    factor_ijk = np.array(grid.coarse_factor[::-1], dtype=float)
    coarse_to_ijk = np.diag([*factor_ijk, 1.0])
    coarse_to_ijk[:3, 3] = (factor_ijk - 1) / 2
    return model_grid.ijk_to_ras @ coarse_to_ijk


def run_coarse(net: Callable[[Tensor], tuple[Tensor, Tensor]], x_low: Tensor, *, multiple: int) -> tuple[Tensor, Tensor]:
    """Coarse logits (B, C, d, h, w) and importance map (B, 1, d, h, w) of x_low (B, 1, d, h, w) of any size.

    Args:
        multiple: sizes that the net takes; x_low is padded at the far ends with 0, the lower bound, and the answer cropped.
    """
    d, h, w = x_low.shape[2:]
    logits, importance_map = net(torch.nn.functional.pad(x_low, [0, -w % multiple, 0, -h % multiple, 0, -d % multiple]))
    return logits[:, :, :d, :h, :w], importance_map[:, :, :d, :h, :w]


def restore_labelmap(labels: Tensor, model_grid: ModelGrid, *, padding: Padding | None = None) -> Volume:
    """The labelmap on the volume's own grid, (K, J, I) uint8; the inverse of to_model_grid for labels.

    Every class is interpolated linearly as a 0/1 field and the largest wins, so that surfaces follow the anatomy instead of
    the model's voxels. A volume on the model's own grid comes back exactly.

    Args:
        labels: (D, H, W) uint8; what lies beyond model_grid.shape is ignored.
        padding: of the volume; background in the result.
    """
    labels = labels[tuple(slice(0, length) for length in model_grid.shape)].cpu()
    to_model_ijk = np.linalg.inv(model_grid.ijk_to_ras) @ model_grid.source_ijk_to_ras
    result = torch.empty(model_grid.source_shape, dtype=torch.uint8)
    uniform = uniform_cells(labels.to(torch.int16))
    for slab in _slabs(model_grid.source_shape):
        positions = _positions(to_model_ijk, shape=model_grid.source_shape, slab=slab)
        positions = [p.clamp(0, length - 1) for p, length in zip(positions, labels.shape)]
        lower = [p.floor().long() for p in positions]
        values = _looked_up(uniform, lower).expand(slab.stop - slab.start, *model_grid.source_shape[1:])
        result[slab] = values
        slab_labels = result[slab].view(-1)
        for voxels in torch.from_numpy(np.flatnonzero(values.numpy() < 0)).split(VOXELS_AT_ONCE // 32):
            at = tuple(map(torch.from_numpy, np.unravel_index(voxels.numpy(), tuple(values.shape))))  # torch's imports a compiler at its first call
            mixed = [p.expand(values.shape)[at] for p in positions]
            slab_labels[voxels] = _interpolated_labels(labels, mixed)
    if padding is not None:
        padding.clear(result.numpy())
    return Volume(array=result.numpy(), ijk_to_ras=model_grid.source_ijk_to_ras)


def _resampled_slabs(
    volume: Volume,
    *,
    model_grid: ModelGrid,
    outside: float,
    bounds: tuple[float, float] | None,
    scale: IntensityScale = IntensityScale(),
    padding: Padding | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the model grid and their intensity, (slices, H, W) float32; everything but the volume in units of the scale."""
    source, source_ijk_to_ras = block_averaged(volume, spacing_mm=model_grid.spacing_mm, bounds=bounds, scale=scale, padding=padding)
    to_source = np.linalg.inv(source_ijk_to_ras) @ model_grid.ijk_to_ras
    for slab in _slabs(model_grid.shape):
        positions = _positions(to_source, shape=model_grid.shape, slab=slab)
        intensity = _interpolated(source, positions)
        is_inside = [(p >= -0.5 - GRID_TOLERANCE) & (p <= length - 0.5 + GRID_TOLERANCE) for p, length in zip(positions, source.shape)]
        if not all(bool(inside.all()) for inside in is_inside):
            intensity.masked_fill_(~(is_inside[0] & is_inside[1] & is_inside[2]), float(outside))
        yield slab, intensity


def block_averaged(
    volume: Volume,
    *,
    spacing_mm: Sequence[float],
    bounds: tuple[float, float] | None = None,
    scale: IntensityScale = IntensityScale(),
    padding: Padding | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Mean over whole blocks of voxels that fit into one model voxel, in units of the scale: float32 array and its ijk_to_ras.

    Training averages its cases with it too, so that noise, thin structures, padding and spikes look the same to the nets in both.

    Args:
        spacing_mm: of the model, KJI.
        bounds: as in resample_to_model_grid, in units of the scale.
        padding: of the volume; needs bounds, and takes the lower one.
    """
    directions = volume.ijk_to_ras[:3, :3] / np.linalg.norm(volume.ijk_to_ras[:3, :3], axis=0)
    target_ijk = np.abs(directions).T @ np.array(spacing_mm[::-1], dtype=float) / np.abs(directions).sum(0)
    factors_ijk = np.maximum(np.floor(target_ijk / np.array(volume.spacing_mm[::-1]) + GRID_TOLERANCE), 1).astype(int)
    factors_ijk = np.minimum(factors_ijk, volume.shape[::-1])
    kernel = tuple(int(factor) for factor in factors_ijk[::-1])
    slab_size = kernel[0] * max(1, VOXELS_AT_ONCE // (kernel[0] * volume.shape[1] * volume.shape[2]))
    averaged = torch.empty([-(-length // factor) for length, factor in zip(volume.shape, kernel)])
    for start in range(0, volume.shape[0], slab_size):
        piece = _as_float32(volume.array[start : start + slab_size], bounds and tuple(scale.own(bound) for bound in bounds))
        if padding is not None and padding.share_of_zeros:  # of any other value it has been bounded
            piece[torch.from_numpy(padding.of_slices(slice(start, start + slab_size)))] = bounds[0]
        if max(kernel) > 1:
            piece = torch.nn.functional.avg_pool3d(piece[None, None], kernel, ceil_mode=True, count_include_pad=False)[0, 0]
        first = start // kernel[0]
        averaged[first : first + len(piece)] = scale.normalized(piece)
    to_first = np.diag([*factors_ijk.astype(float), 1.0])
    to_first[:3, 3] = (factors_ijk - 1) / 2
    return averaged, volume.ijk_to_ras @ to_first


def _as_float32(array: np.ndarray, bounds: tuple[float, float] | None) -> Tensor:
    """A copy as float32 within the bounds; float64 is bounded first, because it may be infinite in float32."""
    if bounds is not None and array.dtype.kind == "f":
        array = np.clip(array, *bounds)
    piece = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return piece.clamp_(*bounds) if bounds is not None and array.dtype.kind != "f" else piece


def _slabs(shape: Sequence[int]) -> Iterator[slice]:
    """Ranges of the first axis that hold at most VOXELS_AT_ONCE voxels."""
    step = max(1, VOXELS_AT_ONCE // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _positions(matrix: np.ndarray, *, shape: Sequence[int], slab: slice) -> list[Tensor]:
    """Where `matrix` (ijk to ijk) sends the voxels of a slab: three coordinates in array order KJI, float64.

    Each has shape 1 along the axes it does not depend on, so that an axis-aligned volume costs three vectors.
    """
    k = torch.arange(slab.start, slab.stop, dtype=torch.float64)[:, None, None]
    j = torch.arange(shape[1], dtype=torch.float64)[None, :, None]
    i = torch.arange(shape[2], dtype=torch.float64)[None, None, :]
    positions = []
    for row, matters in zip(matrix[:3], moves_with(matrix, shape=shape)):
        position = torch.full((1, 1, 1), float(row[3]), dtype=torch.float64)
        for coefficient, index, is_moved in zip(row[:3], (i, j, k), matters):
            if is_moved:
                position = position + float(coefficient) * index
        rounded = position.round()
        positions.append(torch.where((position - rounded).abs() < GRID_TOLERANCE, rounded, position))
    return positions[::-1]  # ijk -> KJI


def _corners(positions: list[Tensor], shape: Sequence[int]) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The eight voxels around every position (KJI), clamped to the array: index and trilinear weight, broadcastable."""
    positions = [p.clamp(0, length - 1) for p, length in zip(positions, shape)]
    lower = [p.floor().long() for p in positions]
    upper = [(low + 1).clamp_max(length - 1) for low, length in zip(lower, shape)]
    fraction = [(p - low).float() for p, low in zip(positions, lower)]
    for corner in np.ndindex(2, 2, 2):
        weight = torch.ones(())
        for axis in range(3):
            weight = weight * (fraction[axis] if corner[axis] else 1 - fraction[axis])
        yield tuple(upper[axis] if corner[axis] else lower[axis] for axis in range(3)), weight


def _interpolated(source: Tensor, positions: list[Tensor]) -> Tensor:
    """Trilinear values at the positions; exact where a position is a voxel."""
    order = _axis_order(positions)
    if order is None:
        return sum(weight * source[index] for index, weight in _corners(positions, source.shape))
    values = source.permute(order)
    for axis, d in enumerate(order):
        values = _interpolated_along(values, positions[d].flatten(), axis=axis)
    return values.contiguous()


def _looked_up(source: Tensor, index: list[Tensor]) -> Tensor:
    """source[index] for three index arrays that broadcast."""
    order = _axis_order(index)
    if order is None:
        return source[tuple(index)]
    values = source.permute(order)
    first, last = int(index[order[0]].min()), int(index[order[0]].max())
    values = values[first : last + 1]
    for axis in (2, 1, 0):  # the first axis last, because whole slices are copied fastest
        values = values.index_select(axis, index[order[axis]].flatten() - (first if axis == 0 else 0))
    return values


def _axis_order(coordinates: list[Tensor]) -> list[int] | None:
    """Which coordinate changes along each axis of the result where each changes along one at most of its own, as in a volume that is upright,
    whatever the order of its axes; None elsewhere."""
    follows = [[axis for axis in range(3) if coordinate.shape[axis] > 1] for coordinate in coordinates]
    alone = [axes[0] for axes in follows if len(axes) == 1]
    if any(len(axes) > 1 for axes in follows) or len(set(alone)) < len(alone):  # or two along the same axis, in an oblique volume of few voxels
        return None
    order = [next((d for d in range(3) if follows[d] == [axis]), None) for axis in range(3)]
    constant = iter(d for d in range(3) if d not in order)
    return [next(constant) if d is None else d for d in order]


def _interpolated_along(values: Tensor, positions: Tensor, *, axis: int) -> Tensor:
    """Linear interpolation at positions along one axis, clamped to it."""
    positions = positions.clamp(0, values.shape[axis] - 1)
    lower = positions.floor().long()
    weight = (positions - lower).float()
    low = values.index_select(axis, lower)
    if not weight.any():
        return low
    upper = values.index_select(axis, (lower + 1).clamp_max(values.shape[axis] - 1))
    return low.add_(upper.sub_(low).mul_(weight.reshape([-1 if other == axis else 1 for other in range(3)])))


def _interpolated_labels(labels: Tensor, positions: list[Tensor]) -> Tensor:
    """The label with the largest trilinear weight at every position, (n,) uint8; positions are KJI vectors. Equal weights go to
    the label of the first corner that has them."""
    corner_labels, corner_weights = zip(*[(labels[index], weight) for index, weight in _corners(positions, labels.shape)])
    corners, weights = torch.stack(corner_labels), torch.stack(corner_weights)  # (8, n)
    low, high = corners.amin(0), corners.amax(0)
    is_low, is_high = corners == low, corners == high
    low_weight, high_weight = (weights * is_low).sum(0), (weights * is_high).sum(0)
    result = torch.where(low_weight == high_weight, corners[0], torch.where(high_weight > low_weight, high, low))
    several = torch.nonzero(~(is_low | is_high).all(0))[:, 0]  # three labels or more: few, and eight times the work
    corners, weights = corners[:, several], weights[:, several]
    support = (weights[None] * (corners[:, None] == corners[None])).sum(1)
    result[several] = corners.gather(0, support.argmax(0, keepdim=True))[0]
    return result
