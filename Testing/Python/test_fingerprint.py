"""The dry run's picture of a data set: voxel sizes in world axes, classes and HU of a sample of the cases."""

import numpy as np
import pytest

pytest.importorskip("monai")

from conftest import turned  # noqa: E402

from NMSWSegment.data.body_extent import BodyExtent  # noqa: E402
from NMSWSegment.data.prepared_case import PreparedCase  # noqa: E402
from NMSWSegment.protocol import UserError  # noqa: E402
from NMSWSegment.training.fingerprint import SAMPLED_CASES, fingerprint_lines, geometry_lines, read_fingerprint  # noqa: E402

EXTENT = BodyExtent(size_mm=(1, 1, 1), in_plane_mm=((0, 1), (0, 1)), is_cut=((False, False), (False, False)), landmarks_mm={})


def a_case(*, liver_hu: int | None = 100, slices: int = 4) -> PreparedCase:
    """10 x 10 voxels of 10 mm a slice, half of it liver (1) at one HU, one voxel unknown; no spleen (2)."""
    labels = np.zeros((slices, 10, 10), np.uint8)
    intensity = np.full(labels.shape, -80, np.int16)
    if liver_hu is not None:
        labels[:, :5], intensity[:, :5] = 1, liver_hu
    labels[0, 9, 9] = 255
    return PreparedCase(intensity=intensity, labels=labels, spacing_mm=(10.0, 10.0, 10.0), extent=EXTENT)


def cases_of(*cases: PreparedCase):
    return [(f"case{number}", lambda case=case: case) for number, case in enumerate(cases)]


def test_classes_have_their_cases_volume_and_hu():
    fingerprint = read_fingerprint(cases_of(a_case(liver_hu=50), a_case(liver_hu=150, slices=8), a_case(liver_hu=None)), num_classes=3)
    liver, spleen = fingerprint.classes
    assert liver.num_cases == 2 and liver.median_ml == (200 + 400) / 2  # 1 ml a voxel
    assert liver.percentiles_hu == (50, 100, 150)  # both cases weigh the same
    assert spleen.num_cases == 0 and np.isnan(spleen.median_ml)
    lines = list(fingerprint_lines(fingerprint, label_names=("liver", "spleen"), num_cases=3, anatomy_labels=set()))
    assert lines[0].startswith("Classes in 3 of 3 cases") and lines[1].split() == ["liver", "2", "300.0", "50", "/", "100", "/", "150"]
    assert lines[2].split() == ["spleen", "0"]
    assert lines[3:] == [
        "Warning     1 of 3 cases hold no class, only background: case2. Check that their labels are right.",
        "Warning     1 of 2 classes are in no case, so that the nets cannot learn them: spleen. Check the list of labels.",
    ]
    some = list(fingerprint_lines(fingerprint, label_names=("liver", "spleen"), num_cases=9, anatomy_labels={2}))
    assert some[0].startswith("Classes in 3 of 9 cases") and some[-1].endswith("(of those that were read)") and "spleen. " not in some[-1]


def test_sample_is_bounded_in_number_and_time_and_the_same_at_every_call():
    cases = cases_of(*[a_case()] * 50)
    first, again = (read_fingerprint(cases, num_classes=3) for _ in range(2))
    assert len(first.label_voxels) == SAMPLED_CASES and first == again
    ticks = iter(range(0, 1000, 20))
    assert len(read_fingerprint(cases, num_classes=3, clock=lambda: next(ticks)).label_voxels) == 2


def test_case_without_a_known_label_is_refused_in_the_dry_run_too():
    case = a_case()
    case.labels[:] = 255
    with pytest.raises(UserError, match="The label of case0 is 255"):
        list(fingerprint_lines(read_fingerprint(cases_of(case), num_classes=2), label_names=("liver",), num_cases=1, anatomy_labels=set()))


def test_geometry_is_along_superior_anterior_right_however_the_file_stores_it():
    upright = np.diag([0.5, 0.8, 3.0, 1.0])  # ijk = R, A, S
    sagittal = turned((0.5, 0.8, 3.0), (200, 300, 40), degrees=(5, 4, 3), permutation=(2, 1, 0), mirror=(-1, 1, 1))  # ijk = S, A, R, oblique
    lines = list(geometry_lines([((40, 300, 200), upright), ((200, 300, 40), sagittal)]))
    assert lines == [
        "Spacing     median 3 x 0.8 x 0.5 mm (S x A x R), from 3 x 0.8 x 0.5 to 3 x 0.8 x 0.5",
        "Size        median 40 x 300 x 200 voxels (S x A x R), from 40 x 300 x 200 to 40 x 300 x 200",
    ]
