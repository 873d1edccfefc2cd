"""The paper's augmentation: image and labels move together, nothing is mirrored, the same seed gives the same sample."""

import pytest
import torch

pytest.importorskip("monai")

from NMSWSegment.data.prepared_case import PreparedCase  # noqa: E402
from NMSWSegment.samples.acquisition import HU_RANGE  # noqa: E402
from NMSWSegment.samples.augment import PaperAugmentation  # noqa: E402
from NMSWSegment.samples.case_memory import loaded_case  # noqa: E402
from NMSWSegment.samples.case_source import resampled, whole_warp  # noqa: E402

WINDOW = (-250.0, 500.0)


def a_pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Soft tissue with a bright block (1) at the right and a dark one (2) at the left, large against the shifts."""
    labels = torch.zeros(80, 70, 120, dtype=torch.uint8)
    labels[20:60, 20:50, 80:110] = 1
    labels[20:60, 20:50, 10:40] = 2
    intensity = torch.full(labels.shape, 40.0)
    intensity[labels == 1] = 300.0
    intensity[labels == 2] = -150.0
    return intensity, labels


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
    augmentation = PaperAugmentation(window=WINDOW)
    return [augmentation(*a_pair(), generator=generator(seed)) for seed in range(8)]


def test_image_and_labels_move_together_and_sides_stay(samples):
    num_both, places = 0, set()
    for intensity, labels in samples:
        assert intensity.shape == labels.shape == (80, 70, 120) and labels.dtype == torch.uint8 and intensity.dtype == torch.float32
        assert set(labels.unique().tolist()) <= {0, 1, 2}
        assert intensity.min() >= WINDOW[0] - 1e-3 and intensity.max() <= WINDOW[1] + 1e-3
        bright, dark = labels == 1, labels == 2
        if bright.sum() > 2000 and dark.sum() > 2000:
            num_both += 1
            assert intensity[bright].median() > intensity[dark].median() + 100
            assert bright.nonzero().float().mean(0)[2] > dark.nonzero().float().mean(0)[2] + 30
            places.add(round(float(bright.nonzero().float().mean(0)[0])))
    assert num_both >= 2 and len(places) == num_both


def test_same_generator_same_sample(samples):
    intensity, labels = PaperAugmentation(window=WINDOW)(*a_pair(), generator=generator(3))
    assert torch.equal(intensity, samples[3][0]) and torch.equal(labels, samples[3][1])
    assert not torch.equal(labels, samples[4][1])


def test_whole_case_at_its_own_spacing_comes_back_exactly():
    intensity, labels = a_pair()
    case = PreparedCase(intensity=intensity.numpy(), labels=labels.numpy(), spacing_mm=(3.0, 2.0, 1.5), extent=None)
    same, same_labels = resampled(loaded_case(case, spacing_mm=case.spacing_mm, bounds=HU_RANGE), whole_warp(case, spacing_mm=case.spacing_mm))
    torch.testing.assert_close(same, intensity, rtol=0, atol=1e-2)  # grid_sample's float32 coordinates
    assert torch.equal(same_labels, labels)
    coarse = whole_warp(case, spacing_mm=(6.0, 4.0, 3.0))
    half, half_labels = resampled(loaded_case(case, spacing_mm=(6.0, 4.0, 3.0), bounds=HU_RANGE), coarse)
    assert coarse.shape == (40, 35, 60) and torch.equal(half_labels, labels[1::2, 1::2, 1::2]) | torch.equal(half_labels, labels[::2, ::2, ::2])
