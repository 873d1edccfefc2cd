"""How much of an answer changes when a volume is stored on an oblique or shifted grid, and why: `python oblique_copies.py CT [MODEL [K [DEGREES ...]]]`.

An oblique copy shows the same body at the same place, so that the answer should be the same. On the model's grid, which is upright, the copy
differs in several ways, which are measured one by one, each against the answer of the volume itself:

    padded     the volume itself with as much air around it as the upright box of the oblique copy has: nothing is interpolated or moved
    blur       interpolated to the oblique grid and back to its own: the same grid for the nets, only the interpolation is left
    shift      half a model voxel away, and cropped by half a model voxel at every end, which moves the model's grid without interpolation
    copy       the oblique copy: blur, shift, and a larger frame with air around the oblique box

Labels are carried over class by class, linearly (sitkLabelLinear): with the nearest neighbor half a voxel of shift moves every surface by half a voxel, which
would be counted against the nets. What remains with a better interpolation (`spline` instead of `linear`) is not blur. Dice of the structures above 100 ml, weighted alike.
"""

import sys

import numpy as np
import SimpleITK as sitk

from NMSWSegment.engine.runtime import open_nets
from NMSWSegment.engine.segment import RunCache, segment_volume
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.volume import Volume, read_volume
from NMSWSegment.protocol import SegmentOptions

LARGE_ML = 100.0
INTERPOLATORS = {"linear": sitk.sitkLinear, "spline": sitk.sitkBSpline}
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def as_image(volume: Volume, *, dtype=np.float32) -> sitk.Image:
    """A SimpleITK image of a volume."""
    ijk_to_lps = _LPS_TO_RAS @ volume.ijk_to_ras
    spacing = np.linalg.norm(ijk_to_lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(volume.array.astype(dtype))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((ijk_to_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(ijk_to_lps[:3, 3].tolist())
    return image


def sampled(volume: Volume, *, shape: tuple[int, int, int], ijk_to_ras: np.ndarray, interpolator: int, outside: float, dtype=np.float32) -> Volume:
    """A volume on another grid."""
    grid = as_image(Volume(np.zeros(shape, np.uint8), ijk_to_ras), dtype=np.uint8)
    image = sitk.Resample(as_image(volume, dtype=dtype), grid, sitk.Transform(), interpolator, outside)
    return Volume(sitk.GetArrayFromImage(image), ijk_to_ras, volume.name)


def oblique_grid(volume: Volume, degrees: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """A grid of the same spacing turned about all three axes of the middle, large enough for the whole volume."""
    angle = np.deg2rad(degrees)
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    spacing = np.array(volume.spacing_mm[::-1])
    directions = turn @ (volume.ijk_to_ras[:3, :3] / spacing)
    ends = np.array(volume.shape[::-1]) - 1.0
    corners = np.array([[i, j, k] for i in (0, ends[0]) for j in (0, ends[1]) for k in (0, ends[2])])
    corners_ras = corners @ volume.ijk_to_ras[:3, :3].T + volume.ijk_to_ras[:3, 3]
    along = corners_ras @ directions  # coordinates along the new axes
    low, high = along.min(0), along.max(0)
    counts = np.ceil((high - low) / spacing).astype(int) + 1
    matrix = np.eye(4)
    matrix[:3, :3] = directions * spacing
    matrix[:3, 3] = directions @ low
    return tuple(int(count) for count in counts[::-1]), matrix


def bounds(ijk_to_ras: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Lowest and highest RAS coordinates of the voxel centers of a grid, (2, 3)."""
    ends = np.array(shape[::-1]) - 1.0
    corners = np.array([[i, j, k] for i in (0, ends[0]) for j in (0, ends[1]) for k in (0, ends[2])]) @ ijk_to_ras[:3, :3].T + ijk_to_ras[:3, 3]
    return np.stack([corners.min(0), corners.max(0)])


def main(arguments: list[str]) -> None:
    """Print one line for each change."""
    volume = read_volume(arguments[0])
    bundle = load_bundle(arguments[1] if len(arguments) > 1 else "torso-unet")
    num_patches = int(arguments[2]) if len(arguments) > 2 else 10
    volume = Volume(np.clip(volume.array, -1024, 3071).astype(np.float32), volume.ijk_to_ras, volume.name)
    options = SegmentOptions(num_patches=num_patches, device="cpu", threads=1)
    nets = open_nets(bundle, device="cpu")

    def labels_of(other: Volume) -> Volume:
        return segment_volume(other, bundle, options=options, run_cache=RunCache(nets=nets)).labelmap

    upright = labels_of(volume)
    voxel_ml = float(np.prod(volume.spacing_mm)) / 1000
    counts = np.bincount(upright.array.ravel(), minlength=bundle.manifest.num_classes)
    large = [label.value for label in bundle.manifest.labels if counts[label.value] * voxel_ml > LARGE_ML]
    print(f"{volume.name}: {' x '.join(f'{step:g}' for step in volume.spacing_mm)} mm, {len(large)} structures above {LARGE_ML:g} ml, k = {num_patches}")

    def report(what: str, found: np.ndarray, expected: np.ndarray) -> None:
        scores = [2.0 * ((found == value) & (expected == value)).sum() / max(1, (found == value).sum() + (expected == value).sum()) for value in large]
        print(f"{what:24s} {np.mean(scores):.3f} (lowest {np.min(scores):.3f}, median {np.median(scores):.3f})", flush=True)

    # Without its outermost voxels a volume keeps its middle; where that takes half a model voxel at each end, the model's grid moves by half a voxel.
    ends = [max(1, round(model / 2 / own)) for model, own in zip(bundle.manifest.spacing_mm, volume.spacing_mm)]
    inner = tuple(slice(end, length - end) for end, length in zip(ends, volume.shape))
    matrix = volume.ijk_to_ras.copy()
    matrix[:3, 3] += matrix[:3, :3] @ np.array(ends[::-1])
    report("without its ends", labels_of(Volume(np.ascontiguousarray(volume.array[inner]), matrix, volume.name)).array, upright.array[inner])
    half = volume.ijk_to_ras.copy()
    half[:3, 3] += np.array(bundle.manifest.spacing_mm[::-1]) / 2
    expected = sampled(upright, shape=volume.shape, ijk_to_ras=half, interpolator=sitk.sitkLabelLinear, outside=0, dtype=np.uint8)
    for name, interpolator in INTERPOLATORS.items():
        moved = sampled(volume, shape=volume.shape, ijk_to_ras=half, interpolator=interpolator, outside=-1024)
        report(f"half a voxel, {name}", labels_of(moved).array, expected.array)
    for degrees in map(float, arguments[3:] or (10, 30, 45)):
        shape, matrix = oblique_grid(volume, degrees)
        expected = sampled(upright, shape=shape, ijk_to_ras=matrix, interpolator=sitk.sitkLabelLinear, outside=0, dtype=np.uint8)
        back = sampled(expected, shape=volume.shape, ijk_to_ras=volume.ijk_to_ras, interpolator=sitk.sitkLabelLinear, outside=0, dtype=np.uint8)
        report(f"{degrees:g} degrees, labels only", back.array, upright.array)
        low, high = (bounds(matrix, shape)[side] - bounds(volume.ijk_to_ras, volume.shape)[side] for side in (0, 1))
        wider = [max(0, round(float(max(-low[2 - axis], high[2 - axis])) / volume.spacing_mm[axis])) for axis in range(3)]
        padded = Volume(np.pad(volume.array, [(n, n) for n in wider], constant_values=-1024), volume.ijk_to_ras.copy(), volume.name)
        padded.ijk_to_ras[:3, 3] -= volume.ijk_to_ras[:3, :3] @ np.array(wider[::-1])
        inner = tuple(slice(n, n + length) for n, length in zip(wider, volume.shape))
        report(f"{degrees:g} degrees, padded", labels_of(padded).array[inner], upright.array)
        for name, interpolator in INTERPOLATORS.items():
            copy = sampled(volume, shape=shape, ijk_to_ras=matrix, interpolator=interpolator, outside=-1024)
            blurred = sampled(copy, shape=volume.shape, ijk_to_ras=volume.ijk_to_ras, interpolator=interpolator, outside=-1024)
            report(f"{degrees:g} degrees, blur, {name}", labels_of(blurred).array, upright.array)
            report(f"{degrees:g} degrees, copy, {name}", labels_of(copy).array, expected.array)


if __name__ == "__main__":
    main(sys.argv[1:])
