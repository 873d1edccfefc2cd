"""The paper's augmentation: image and labels move together, nothing is mirrored, the same seed gives the same sample."""

import pytest
import torch

pytest.importorskip("monai")

from NMSWSegment.data.prepared_case import PreparedCase  # noqa: E402
from NMSWSegment.data.training_sample import UNKNOWN_LABEL, TrainingSample  # noqa: E402
from NMSWSegment.samples.acquisition import HU_RANGE  # noqa: E402
from NMSWSegment.samples.augment import PaperIntensity, distortion, paper_warp  # noqa: E402
from NMSWSegment.samples.case_memory import CaseMemory, loaded_case  # noqa: E402
from NMSWSegment.samples.case_source import CaseSource, resampled, whole_warp  # noqa: E402
from NMSWSegment.samples.synthesis import SynthesisOptions  # noqa: E402
from NMSWSegment.samples.warp import Warp  # noqa: E402

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
def source() -> CaseSource:
    intensity, labels = a_pair()
    case = PreparedCase(intensity=intensity.numpy(), labels=labels.numpy(), spacing_mm=(3.0, 3.0, 3.0), extent=None)
    return CaseSource("pair", lambda: case, memory=CaseMemory(spacing_mm=case.spacing_mm, bounds=WINDOW), paper_intensity=PaperIntensity(window=WINDOW))


@pytest.fixture(scope="module")
def samples(source) -> list[TrainingSample]:
    return [source.draw(generator(seed), SynthesisOptions(spacing_mm=(3.0, 3.0, 3.0))) for seed in range(8)]


def test_image_and_labels_move_together_and_sides_stay(samples):
    num_both, places = 0, set()
    for sample in samples:
        intensity, labels = sample.intensity, sample.labels
        assert intensity.shape == labels.shape == (80, 70, 120) and labels.dtype == torch.uint8 and intensity.dtype == torch.float32
        assert set(labels.unique().tolist()) <= {0, 1, 2, UNKNOWN_LABEL}
        assert intensity.min() >= WINDOW[0] - 1e-3 and intensity.max() <= WINDOW[1] + 1e-3
        bright, dark = labels == 1, labels == 2
        if bright.sum() > 2000 and dark.sum() > 2000:
            num_both += 1
            assert intensity[bright].median() > intensity[dark].median() + 100
            assert bright.nonzero().float().mean(0)[2] > dark.nonzero().float().mean(0)[2] + 30
            places.add(round(float(bright.nonzero().float().mean(0)[0])))
    assert num_both >= 2 and len(places) == num_both


def test_same_generator_same_sample(source, samples):
    again = source.draw(generator(3), SynthesisOptions(spacing_mm=(3.0, 3.0, 3.0)))
    assert torch.equal(again.intensity, samples[3].intensity) and torch.equal(again.labels, samples[3].labels)
    assert not torch.equal(again.labels, samples[4].labels)


def test_geometry_is_as_strong_as_the_papers_and_never_mirrors():
    whole = Warp(shape=(80, 70, 120), spacing_mm=(3.0, 2.0, 1.0), matrix=torch.eye(3), center_mm=torch.zeros(3), control_mm=torch.zeros(3, 4, 4, 4))
    warps = [paper_warp(whole, generator=generator(seed)) for seed in range(300)]
    shifts = torch.stack([warp.center_mm for warp in warps]) / torch.tensor(whole.spacing_mm)
    assert 55 < float(shifts[:, 0].abs().max()) <= 100 and 50 < float(shifts[:, 1:].abs().max()) <= 60 and float(shifts.mean(0).abs().max()) < 6
    turned = [warp.matrix for warp in warps if not torch.equal(warp.matrix, torch.eye(3))]
    assert abs(len(turned) / 300 - 0.3) < 0.08 and all(0.7 * 0.8 * 0.8 <= float(torch.linalg.det(matrix)) <= 1.3 * 1.2 * 1.2 for matrix in turned)
    assert abs(sum(warp.axis_shifts_mm is not None for warp in warps) / 300 - 0.3) < 0.08


def test_distortion_ends_its_cells_where_monai_ends_them():
    from monai.transforms import GridDistortion

    shift = distortion(50, generator=generator(1))
    steps = (1 + torch.diff(shift)[5::10]).tolist()  # voxels per voxel in each of the five cells
    ramp = torch.arange(50.0)[None, :, None, None].repeat(1, 1, 10, 10)
    found = torch.as_tensor(GridDistortion(num_cells=5, distort_steps=[[*steps, 1.0], [1.0] * 6, [1.0] * 6], padding_mode="border")(ramp))[0, :, 4, 4]
    torch.testing.assert_close((torch.arange(50) + shift - shift[0])[10::10], found[10::10], atol=1e-3, rtol=0)
    assert 0.95 <= min(steps) < max(steps) <= 1.05 and float(shift[25]) == 0


def test_whole_case_at_its_own_spacing_comes_back_exactly():
    intensity, labels = a_pair()
    case = PreparedCase(intensity=intensity.numpy(), labels=labels.numpy(), spacing_mm=(3.0, 2.0, 1.5), extent=None)
    loaded = loaded_case(case, spacing_mm=case.spacing_mm, bounds=HU_RANGE)
    same, same_labels = resampled(loaded, whole_warp(loaded, spacing_mm=case.spacing_mm))
    torch.testing.assert_close(same, intensity, rtol=0, atol=1e-2)  # grid_sample's float32 coordinates
    assert torch.equal(same_labels, labels)
    loaded = loaded_case(case, spacing_mm=(6.0, 4.0, 3.0), bounds=HU_RANGE)
    coarse = whole_warp(loaded, spacing_mm=(6.0, 4.0, 3.0))
    half, half_labels = resampled(loaded, coarse)
    assert coarse.shape == (40, 35, 60) and torch.equal(half_labels, labels[1::2, 1::2, 1::2]) | torch.equal(half_labels, labels[::2, ::2, ::2])
