"""importance_display: smooth, and nothing in the air."""

import numpy as np

from NMSWSegment.files.importance_display import body_mask, importance_for_display
from NMSWSegment.files.volume import Volume

COARSE = np.diag([4.0, 4.0, 4.0, 1.0])


def a_body() -> Volume:
    """A cylinder of soft tissue with air in it (a lung), a thin table under it, at 2 mm; RAS axes."""
    array = np.full((20, 40, 40), -1000, dtype=np.int16)
    j, i = np.indices((40, 40))
    array[:, (j - 18) ** 2 + (i - 20) ** 2 < 14**2] = 30
    array[:, (j - 18) ** 2 + (i - 14) ** 2 < 5**2] = -850
    array[:, 36:38, 5:35] = 100
    return Volume(array=array, ijk_to_ras=np.diag([2.0, 2.0, 2.0, 1.0]))


def test_body_mask_holds_the_lung_and_neither_air_nor_table():
    mask = body_mask((10, 20, 20), ijk_to_ras=COARSE, volume=a_body())
    assert mask[:, 9, 7].all(), "lung"
    assert mask[:, 9, 12].all(), "soft tissue"
    assert not mask[:, 18].any(), "table"
    assert not mask[:, 0].any()


def test_importance_for_display_is_smooth_in_the_body_and_zero_outside():
    speckled = np.random.default_rng(0).random((10, 20, 20)).astype(np.float32)
    shown = importance_for_display(Volume(array=speckled, ijk_to_ras=COARSE), a_body())
    mask = body_mask(speckled.shape, ijk_to_ras=COARSE, volume=a_body())
    assert (shown.array[~mask] == 0).all()
    assert shown.array.max() == 1
    assert shown.array.dtype == np.float32
    inside = mask[:, :, 1:] & mask[:, :, :-1]
    steps = np.abs(np.diff(shown.array, axis=2))[inside].mean()
    assert steps < 0.25 * np.abs(np.diff(speckled, axis=2))[inside].mean()


def test_importance_for_display_constant_stays_constant_to_the_skin():
    shown = importance_for_display(Volume(array=np.full((10, 20, 20), 0.3, dtype=np.float32), ijk_to_ras=COARSE), a_body())
    mask = body_mask(shown.array.shape, ijk_to_ras=COARSE, volume=a_body())
    np.testing.assert_allclose(shown.array[mask], 1, rtol=1e-4)


def test_importance_for_display_without_a_body_clips_nothing():
    air = Volume(array=np.full((20, 40, 40), -1000, dtype=np.int16), ijk_to_ras=np.diag([2.0, 2.0, 2.0, 1.0]))
    shown = importance_for_display(Volume(array=np.ones((10, 20, 20), dtype=np.float32), ijk_to_ras=COARSE), air)
    np.testing.assert_allclose(shown.array, 1, rtol=1e-5)
