"""Statistics of structures: against hand-computed values, SimpleITK's own filters and plain loops over the voxels."""

import csv
import json
import math

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import turned

from NMSWSegment.files import phantoms
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.files.statistics import STATISTICS_COLUMNS, structure_statistics, write_statistics
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import PatchBox, UserError

LABELS = coded_labels(["liver", "spleen", "kidney_left"])
# Columns are the steps of i, j, k: i runs to the left, j down, k forwards.
IJK_TO_RAS = np.array([[-2.0, 0, 0, 50.0], [0, 0, 4.0, 40.0], [0, -3.0, 0, -70.0], [0, 0, 0, 1.0]])


def a_case() -> tuple[Volume, Volume]:
    """Three liver voxels of known intensity, one of the kidney in a corner, none of the spleen: labelmap and volume."""
    intensities = np.full((4, 5, 6), -1000, dtype=np.int16)
    labels = np.zeros((4, 5, 6), dtype=np.uint8)
    for kji, intensity in (((1, 2, 3), 40), ((1, 2, 4), 60), ((2, 2, 3), 110)):
        intensities[kji], labels[kji] = intensity, 1
    intensities[3, 0, 5], labels[3, 0, 5] = 200, 3
    return Volume(labels, IJK_TO_RAS), Volume(intensities, IJK_TO_RAS)


def phantom_case(ijk_to_ras, shape) -> tuple[Volume, Volume]:
    """Labels and noisy intensities of the phantom on any grid."""
    volume, labels = phantoms.phantom(shape, ijk_to_ras=ijk_to_ras)
    noisy = np.rint(volume.array + np.random.default_rng(0).normal(0, 20, shape)).astype(np.int16)
    return Volume(labels, ijk_to_ras), Volume(noisy, ijk_to_ras)


def patch(low, high, rank=1) -> PatchBox:
    """The patch between two corners in RAS mm."""
    low, high = np.array(low, float), np.array(high, float)
    return PatchBox(rank=rank, candidate=rank, importance=0.5, center_ras=tuple((low + high) / 2), size_mm=tuple(high - low))


def test_statistics_of_three_voxels_are_the_hand_computed_ones():
    liver = structure_statistics(*a_case(), labels=LABELS)[0]
    assert (liver.structure, liver.label, liver.voxels) == ("liver", 1, 3)
    assert liver.volume_ml == pytest.approx(3 * 24 / 1000)
    assert (liver.mean, liver.min, liver.max) == (70, 40, 110)
    assert liver.sd == pytest.approx(math.sqrt((30**2 + 10**2 + 40**2) / 2))
    # i: (3 + 4 + 3) / 3, j: 2, k: (1 + 1 + 2) / 3
    assert (liver.center_r_mm, liver.center_a_mm, liver.center_s_mm) == pytest.approx((50 - 2 * 10 / 3, 40 + 4 * 4 / 3, -70 - 3 * 2))
    assert (liver.min_r_mm, liver.max_r_mm) == (50 - 2 * 4.5, 50 - 2 * 2.5)
    assert (liver.min_a_mm, liver.max_a_mm) == (40 + 4 * 0.5, 40 + 4 * 2.5)
    assert (liver.min_s_mm, liver.max_s_mm) == (-70 - 3 * 2.5, -70 - 3 * 1.5)
    assert not liver.at_border and liver.border_faces == ""


def test_structure_at_the_edge_of_the_volume_names_the_faces_of_the_patient():
    kidney = structure_statistics(*a_case(), labels=LABELS)[2]
    assert kidney.at_border and kidney.border_faces == "anterior left superior"  # k last, i last, j first
    assert (kidney.voxels, kidney.mean) == (1, 200) and math.isnan(kidney.sd)


def test_structure_without_a_voxel_has_zero_volume_and_no_other_number():
    spleen = structure_statistics(*a_case(), labels=LABELS, patches=[patch((0, 0, 0), (1, 1, 1))])[1]
    assert (spleen.voxels, spleen.volume_ml, spleen.patches, spleen.patches_percent, spleen.at_border) == (0, 0.0, 0, 0.0, False)
    assert all(math.isnan(getattr(spleen, name)) for name in ("mean", "sd", "min", "max", "surface_cm2", "center_r_mm", "min_s_mm", "refined_percent"))
    assert structure_statistics(Volume(np.zeros((2, 2, 2), np.uint8), np.eye(4)), Volume(np.zeros((2, 2, 2)), np.eye(4)), labels=LABELS)[0].voxels == 0


@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (20.0, -15.0, 10.0)])
def test_statistics_equal_those_of_simpleitk(degrees):
    spacing_mm, shape = (5.0, 3.0, 2.5), (62, 70, 100)
    labelmap, volume = phantom_case(turned(spacing_mm, shape, degrees=degrees, mirror=(1, -1, 1)), shape)
    rows = structure_statistics(labelmap, volume, labels=coded_labels(list(phantoms.ORGANS)))

    image, labels = sitk.GetImageFromArray(volume.array), sitk.GetImageFromArray(labelmap.array)
    ijk_to_lps = np.diag([-1, -1, 1, 1]) @ labelmap.ijk_to_ras
    for item in (image, labels):
        item.SetSpacing(spacing_mm[::-1])
        item.SetDirection((ijk_to_lps[:3, :3] / spacing_mm[::-1]).ravel())
        item.SetOrigin(ijk_to_lps[:3, 3])
    shapes, intensities = sitk.LabelShapeStatisticsImageFilter(), sitk.LabelIntensityStatisticsImageFilter()
    shapes.SetComputePerimeter(True)
    shapes.Execute(labels)
    intensities.Execute(labels, image)
    for row in rows:
        assert row.voxels == shapes.GetNumberOfPixels(row.label) > 1000
        assert row.volume_ml == pytest.approx(shapes.GetPhysicalSize(row.label) / 1000, rel=1e-9)
        assert row.surface_cm2 == pytest.approx(shapes.GetPerimeter(row.label) / 100, rel=1e-9)
        assert row.mean == pytest.approx(intensities.GetMean(row.label), rel=1e-9)
        assert row.sd == pytest.approx(intensities.GetStandardDeviation(row.label), rel=1e-9)
        assert (row.min, row.max) == (intensities.GetMinimum(row.label), intensities.GetMaximum(row.label))
        centroid_lps = np.array(shapes.GetCentroid(row.label))
        np.testing.assert_allclose((row.center_r_mm, row.center_a_mm, row.center_s_mm), centroid_lps * (-1, -1, 1), atol=1e-6)
        assert row.at_border == (shapes.GetNumberOfPixelsOnBorder(row.label) > 0)


def test_surface_of_an_ellipsoid_is_that_of_the_formula_on_uneven_voxels():
    shape, spacing_mm = (40, 90, 90), (3.0, 1.0, 1.0)
    center = np.indices(shape).astype(float) - (np.array(shape)[:, None, None, None] - 1) / 2
    inside = ((center * np.array(spacing_mm)[:, None, None, None]) ** 2).sum(0) <= 40.0**2
    row = structure_statistics(Volume(inside.astype(np.uint8), np.diag([1.0, 1.0, 3.0, 1.0])), Volume(inside.astype(float), np.eye(4)), labels=LABELS[:1])[0]
    assert row.surface_cm2 == pytest.approx(4 * np.pi * 40**2 / 100, rel=0.01)


@pytest.mark.parametrize("degrees", [(0.0, 0.0, 0.0), (20.0, -15.0, 10.0)])
def test_bounding_box_and_patches_equal_a_loop_over_all_voxels(degrees):
    shape = (24, 30, 36)
    labelmap, volume = phantom_case(turned((12.0, 8.0, 9.0), shape, degrees=degrees), shape)
    patches = [
        patch((-20.3, -40.3, -30.3), (100.3, 60.3, 60.3)),
        patch((40.3, -40.3, -30.3), (160, 60.3, 60.3), rank=2),
        patch((-150, -90, 100.3), (-10.3, -10.3, 160), rank=3),
    ]
    rows = structure_statistics(labelmap, volume, labels=coded_labels(list(phantoms.ORGANS)), patches=patches)

    index_ijk = np.indices(shape)[::-1].reshape(3, -1)
    points = (labelmap.ijk_to_ras[:3, :3] @ index_ijk + labelmap.ijk_to_ras[:3, 3:]).T
    values = labelmap.array.ravel()
    in_patch = np.array([(np.abs(points - box.center_ras) < np.array(box.size_mm) / 2).all(1) for box in patches])
    half = np.abs(labelmap.ijk_to_ras[:3, :3]).sum(1) / 2
    for row in rows:
        own = values == row.label
        np.testing.assert_allclose((row.min_r_mm, row.min_a_mm, row.min_s_mm), points[own].min(0) - half)
        np.testing.assert_allclose((row.max_r_mm, row.max_a_mm, row.max_s_mm), points[own].max(0) + half)
        assert row.patches == in_patch[:, own].any(1).sum()
        assert row.patches_percent == pytest.approx(100 * row.patches / 3)
        assert row.refined_percent == pytest.approx(100 * in_patch[:, own].any(0).mean())
    assert len({row.refined_percent for row in rows}) == 3


def test_statistics_files_have_one_row_per_structure_and_nothing_for_nan(tmp_path):
    rows = structure_statistics(*a_case(), labels=LABELS)
    write_statistics(rows, tmp_path / "a.csv")
    write_statistics(rows, tmp_path / "a.json")
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    objects = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert tuple(table[0]) == tuple(objects[0]) == STATISTICS_COLUMNS
    assert [row["structure"] for row in table] == [row["structure"] for row in objects] == ["liver", "spleen", "kidney_left"]
    assert (table[0]["volume_ml"], table[0]["mean"], table[0]["at_border"]) == ("0.072", "70", "0")
    assert (table[1]["voxels"], table[1]["mean"], objects[1]["mean"], table[2]["at_border"], objects[2]["at_border"]) == ("0", "", None, "1", True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]
    with pytest.raises(UserError, match="Use '.csv' or '.json'"):
        write_statistics(rows, tmp_path / "a.txt")
