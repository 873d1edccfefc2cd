"""What the panel may do and show: input checks in their order, patches, memory and time of a run."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, turned

from NMSWSegment.engine.resampling import to_model_grid
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.rates import Rate
from NMSWSegment.files.volume import Volume
from NMSWSegment.panel.checks import CheckKind, Geometry, Inputs, RunEstimate, Severity, estimate_run, estimate_seconds, input_checks
from NMSWSegment.protocol import UserError

SHAPE = (30, 70, 100)
OBLIQUE = turned((5.0, 1.5, 2.0), SHAPE, mirror=(1, -1, 1), permutation=(2, 0, 1))


@pytest.fixture(scope="module")
def manifest(a_tiny_bundle):
    """6 mm, patches of 16 voxels, four classes."""
    return load_bundle(a_tiny_bundle).manifest


@pytest.fixture
def inputs(manifest):
    """Everything in order: an oblique volume about the origin, spread over 200 x 105 x 150 mm."""
    geometry = Geometry(shape=SHAPE, ijk_to_ras=OBLIQUE)
    return Inputs(geometry=geometry, manifest=manifest, num_patches=5, intensity_range=(-1000.0, 800.0), available_bytes=8 << 30)


def box(center_ras, size_mm) -> np.ndarray:
    """roi_to_ras of an upright box."""
    roi_to_ras = np.diag([*size_mm, 1.0])
    roi_to_ras[:3, 3] = center_ras
    return roi_to_ras


def found(inputs) -> list[CheckKind]:
    return [check.kind for check in input_checks(inputs)]


def is_blocked(found_checks) -> bool:
    return any(check.severity is Severity.ERROR for check in found_checks)


def test_problems_of_good_inputs_are_none(inputs):
    assert input_checks(inputs) == ()
    assert input_checks(replace(inputs, intensity_range=None, available_bytes=None, num_patches="auto")) == ()


def with_geometry(inputs, **changes) -> Inputs:
    return replace(inputs, geometry=replace(inputs.geometry, **changes))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda inputs: replace(inputs, geometry=None), CheckKind.NO_VOLUME),
        (lambda inputs: replace(inputs, is_labelmap=True), CheckKind.NOT_A_VOLUME),
        (lambda inputs: replace(inputs, is_importance_map=True), CheckKind.IMPORTANCE_MAP),
        (lambda inputs: replace(inputs, components=3), CheckKind.COLOR_VOLUME),
        (lambda inputs: replace(inputs, is_transform_linear=False), CheckKind.NONLINEAR_TRANSFORM),
        (lambda inputs: replace(inputs, intensity_range=(7.0, 7.0)), CheckKind.UNIFORM_VOLUME),
        (lambda inputs: replace(inputs, manifest=None), CheckKind.NO_MODEL),
        (lambda inputs: with_geometry(inputs, shape=(0, 0, 0)), CheckKind.EMPTY_VOLUME),
        (lambda inputs: with_geometry(inputs, shape=(30, 1, 100)), CheckKind.ONE_SLICE),
        (lambda inputs: with_geometry(inputs, ijk_to_ras=np.diag([1.0, 2.0, 0.0, 1.0])), CheckKind.BROKEN_GEOMETRY),
        (lambda inputs: with_geometry(inputs, ijk_to_ras=np.full((4, 4), np.nan)), CheckKind.BROKEN_GEOMETRY),
        (lambda inputs: with_geometry(inputs, ijk_to_ras=np.array([[1.0, 2, 0, 0], [2, 4, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])), CheckKind.BROKEN_GEOMETRY),
        (lambda inputs: with_geometry(inputs, ijk_to_ras=np.diag([500.0, 500.0, 500.0, 1.0])), CheckKind.VOLUME_TOO_LARGE),
        (lambda inputs: replace(inputs, roi_to_ras=box((0, 0, 0), (20, 0, 30))), CheckKind.ROI_EMPTY),
        (lambda inputs: replace(inputs, roi_to_ras=np.full((4, 4), np.nan)), CheckKind.ROI_EMPTY),
        (lambda inputs: replace(inputs, roi_to_ras=box((0, 0, 400), (20, 30, 40))), CheckKind.ROI_OUTSIDE),
    ],
)
def test_problems_that_block_are_found_one_at_a_time(inputs, change, problem):
    assert found(change(inputs)) == [problem]
    assert is_blocked(input_checks(change(inputs)))


def test_problems_of_an_empty_panel_name_volume_then_model():
    assert found(Inputs(geometry=None, manifest=None)) == [CheckKind.NO_VOLUME, CheckKind.NO_MODEL]


def test_problems_carry_the_values_of_their_sentence(inputs):
    assert input_checks(replace(inputs, components=4))[0].values == {"components": 4}
    assert input_checks(replace(inputs, intensity_range=(7.0, 7.0)))[0].values == {"intensity": 7.0}
    too_large = input_checks(with_geometry(inputs, ijk_to_ras=np.diag([500.0, 500.0, 500.0, 1.0])))[0]
    assert "Crop it, or check its spacing" in too_large.values["message"]


def test_problem_memory_short_is_advice_with_both_numbers(inputs):
    needed = estimate_run(inputs.geometry, inputs.manifest, num_patches=5, available_bytes=100 << 20).memory_bytes
    (check,) = input_checks(replace(inputs, available_bytes=100 << 20))
    assert check.kind is CheckKind.MEMORY_SHORT and not is_blocked([check])
    assert check.values == {"needed_bytes": needed, "available_bytes": 100 << 20}
    assert input_checks(replace(inputs, available_bytes=2 * needed)) == ()


def test_problem_unlike_ct_is_advice_for_ct_models_and_unlike_mr_for_mr_models(inputs):
    (check,) = input_checks(replace(inputs, intensity_range=(0.0, 4095.0)))
    assert check.kind is CheckKind.UNLIKE_CT and check.values == {"lowest": 0.0} and not is_blocked([check])
    mr = replace(inputs, manifest=replace(inputs.manifest, modality="MR"))
    assert input_checks(replace(mr, intensity_range=(0.0, 4095.0))) == () == input_checks(replace(mr, intensity_range=(-3.4e38, 900.0)))
    (check,) = input_checks(replace(mr, intensity_range=(-1024.0, 3071.0)))
    assert check.kind is CheckKind.UNLIKE_MR and check.values == {"lowest": -1024.0} and not is_blocked([check])


def test_roi_that_touches_a_corner_of_the_volume_is_accepted(inputs):
    corner_ras = (OBLIQUE @ [99.5, 69.5, 29.5, 1])[:3]
    assert input_checks(replace(inputs, roi_to_ras=box(corner_ras, (2, 3, 4)))) == ()
    # the same box, oblique, and as the tuples of SegmentOptions
    turned_roi = turned((4.0, 3.0, 2.0), (1, 1, 1))
    turned_roi[:3, 3] = corner_ras
    assert input_checks(replace(inputs, roi_to_ras=tuple(map(tuple, turned_roi)))) == ()


def test_work_counts_what_the_engine_counts(manifest):
    _, model_grid, grid = to_model_grid(Volume(array=np.zeros(SHAPE, np.int16), ijk_to_ras=OBLIQUE), manifest)
    found = estimate_run(Geometry(shape=SHAPE, ijk_to_ras=OBLIQUE), manifest, num_patches=5)
    assert (found.candidates, found.patches) == (grid.num_candidates, 5)
    assert found.model_voxels == np.prod(model_grid.shape) and found.source_voxels == 30 * 70 * 100
    assert found.share == pytest.approx(5 / grid.num_candidates)


def test_work_clips_k_and_takes_none_for_all(manifest):
    geometry = Geometry(shape=SHAPE, ijk_to_ras=OBLIQUE)
    candidates = estimate_run(geometry, manifest, num_patches=0).candidates
    assert [estimate_run(geometry, manifest, num_patches=k).patches for k in (0, 3, None, 10_000)] == [0, 3, candidates, candidates]
    assert estimate_run(geometry, manifest, num_patches=None).share == 1


def test_work_of_auto_is_unknown_until_a_run_has_told(manifest):
    geometry = Geometry(shape=SHAPE, ijk_to_ras=OBLIQUE)
    unknown = estimate_run(geometry, manifest, num_patches="auto")
    assert unknown.patches is None and unknown.share is None
    assert unknown.memory_bytes == estimate_run(geometry, manifest, num_patches=None).memory_bytes
    assert estimate_run(geometry, manifest, num_patches="auto", expected_patches=4).patches == 4


def test_work_in_a_roi_counts_the_candidates_that_meet_it(manifest):
    # 48 x 32 x 64 voxels of the model grid of 6 mm, index (0, 0, 0) centered on (3, 3, 3) mm: starts every 8 voxels
    shape = (48, 32, 64)
    ijk_to_ras = np.diag([6.0, 6.0, 6.0, 1.0])
    ijk_to_ras[:3, 3] = 3.0
    geometry = Geometry(shape=shape, ijk_to_ras=ijk_to_ras)
    assert estimate_run(geometry, manifest, num_patches=None).candidates == 5 * 3 * 7
    # R 12 to 60 mm = voxels 2 to 10: starts 0 and 8; A 108 to 180 = 18 to 30: 8 and 16; S 276 to 288 = 46 to 48: 32
    roi_to_ras = box((36, 144, 282), (48, 72, 12))
    in_roi = estimate_run(geometry, manifest, num_patches=None, roi_to_ras=roi_to_ras)
    assert (in_roi.patches, in_roi.candidates) == (2 * 2 * 1, 105)
    assert estimate_run(geometry, manifest, num_patches=3, roi_to_ras=roi_to_ras).patches == 3


def test_work_of_a_volume_that_is_too_large_says_the_way_out(manifest):
    with pytest.raises(UserError, match="Crop it"):
        estimate_run(Geometry(shape=SHAPE, ijk_to_ras=np.diag([500.0, 500.0, 500.0, 1.0])), manifest, num_patches=1)


def test_seconds_adds_patches_voxels_and_restoring():
    ten = RunEstimate(candidates=40, patches=10, model_voxels=1_000_000, source_voxels=8_000_000, memory_bytes=0)
    rate = Rate(patch_s=0.5, voxel_s=2e-6, source_voxel_s=1e-7)
    assert estimate_seconds(ten, rate) == pytest.approx(5 + 2 + 0.8)
    assert estimate_seconds(replace(ten, patches=None), rate) is None


def test_panel_needs_neither_torch_nor_qt_nor_slicer():
    code = "import sys, NMSWSegment.panel.checks, NMSWSegment.panel.run_state; print([name for name in ('torch', 'qt', 'slicer', 'SimpleITK') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert told.stdout.strip() == "[]"
