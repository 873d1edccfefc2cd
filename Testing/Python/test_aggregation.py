import pytest
import torch

from NMSWSegment.engine import aggregation
from NMSWSegment.engine.aggregation import CoarseUpsampler, StreamingAggregator, aggregate, mixing_weights, patch_upsamplers, patch_window
from NMSWSegment.files.grid import CandidateGrid

CLASSES = 5


def a_case(seed, *, shape=(24, 16, 40), coarse_factor=2, overlap=0.5):
    """Random coarse and local logits with smooth parts, so that uniform and mixed cells both occur."""
    generator = torch.Generator().manual_seed(seed)
    grid = CandidateGrid.covering(shape, patch_size=(8, 8, 8), overlap=overlap, coarse_factor=(coarse_factor,) * 3)
    coarse = torch.nn.functional.interpolate(torch.randn(1, CLASSES, 3, 3, 4, generator=generator) * 5, size=grid.coarse_shape, mode="trilinear")[0]
    indices = torch.randperm(grid.num_candidates, generator=generator)[: grid.num_candidates // 2].tolist()
    patches = [torch.randn(CLASSES, 8, 8, 8, generator=generator) for _ in indices]
    class_weights = torch.randn(CLASSES, generator=generator) * 3
    return grid, coarse, indices, patches, class_weights


def a_streaming(coarse, indices, *, grid, class_weights) -> StreamingAggregator:
    """What `aggregate` is compared with."""
    labels = CoarseUpsampler(coarse, grid=grid).labels()
    return StreamingAggregator(patch_upsamplers(coarse, indices=indices, grid=grid), grid=grid, class_weights=class_weights, coarse_labels=labels)


@pytest.mark.parametrize(("threads", "likely_logits"), [(1, aggregation.LIKELY_LOGITS), (2, aggregation.LIKELY_LOGITS), (2, 0.0), (1, 1.0)])
@pytest.mark.parametrize(
    ("seed", "shape", "overlap", "coarse_factor"),
    [
        (0, (24, 16, 40), 0.5, 2),
        (1, (24, 16, 40), 0.5, 4),
        (2, (24, 16, 40), 0.75, 2),
        (3, (24, 16, 40), 0.0, 1),
        (4, (17, 9, 21), 0.5, 2),  # padded to 20, 12, 24: the coarse volume ends before the padding does
        (5, (17, 9, 25), 0.5, 3),  # r divides neither volume nor padding
        (6, (5, 8, 11), 0.5, 5),
    ],
)
def test_streaming_equals_reference_bit_for_bit(seed, shape, overlap, coarse_factor, threads, likely_logits, monkeypatch):
    monkeypatch.setattr(aggregation, "LIKELY_LOGITS", likely_logits)  # 0: often too few classes are looked at first
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    grid, coarse, indices, patches, class_weights = a_case(seed, shape=shape, overlap=overlap, coarse_factor=coarse_factor)
    expected, _ = aggregate(coarse, patches, indices=indices, grid=grid, class_weights=class_weights)
    streaming = a_streaming(coarse, indices, grid=grid, class_weights=class_weights)
    for index, logits in zip(indices, patches):
        streaming.add(index, logits)
    assert torch.equal(streaming.finish(), expected.argmax(0).to(torch.uint8))
    assert not streaming.sums


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_streaming_without_patches_equals_upsampled_coarse(scale):
    grid, coarse, _, _, class_weights = a_case(7)
    coarse = (coarse * scale).round(decimals=7)  # rounding makes ties, which the fast path must not decide
    expected = CoarseUpsampler(coarse, grid=grid).region([slice(0, n) for n in grid.padded_shape]).argmax(0)
    assert torch.equal(a_streaming(coarse, [], grid=grid, class_weights=class_weights).finish().long(), expected)


def test_upsampling_is_trilinear():
    grid, coarse, _, _, _ = a_case(3)
    shape = (24, 16, 40)
    expected = torch.nn.functional.interpolate(coarse[None], size=shape, mode="trilinear", align_corners=False)[0]
    box = (slice(3, 17), slice(0, 16), slice(21, 40))
    found = CoarseUpsampler(coarse, grid=grid).region(box)
    torch.testing.assert_close(found, expected[(slice(None), *box)], rtol=1e-5, atol=1e-5)  # other order of the three axes


def test_region_is_the_same_numbers_as_everywhere():
    grid, coarse, _, _, _ = a_case(5)
    upsampler = CoarseUpsampler(coarse, grid=grid)
    box = (slice(5, 6), slice(2, 13), slice(39, 40))
    everywhere = upsampler.region([slice(0, 24), slice(0, 16), slice(0, 40)])
    assert torch.equal(upsampler.region(box), everywhere[(slice(None), *box)])


def test_classes_that_cannot_win_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(aggregation, "LIKELY_LOGITS", 60.0)
    grid, coarse, indices, _, class_weights = a_case(0)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(CLASSES, 8, 8, 8, generator=generator)
    logits[[0, 3]] -= 1000.0
    coarse = coarse.clamp(-20, 20)
    looked_at = []
    best = aggregation.BestClass.__call__
    monkeypatch.setattr(aggregation.BestClass, "__call__", lambda self, values: (looked_at.append(len(values)), best(self, values))[1])
    streaming = a_streaming(coarse, indices, grid=grid, class_weights=class_weights)
    looked_at.clear()
    for index in indices:
        streaming.add(index, logits)
    expected, _ = aggregate(coarse, [logits] * len(indices), indices=indices, grid=grid, class_weights=class_weights)
    assert torch.equal(streaming.finish(), expected.argmax(0).to(torch.uint8))
    assert looked_at and max(looked_at) <= CLASSES - 2


def test_class_that_is_no_number_somewhere_gives_background_there():
    grid, coarse, indices, patches, class_weights = a_case(0)
    patches[0][2, 3, 4, 5] = float("nan")
    streaming = a_streaming(coarse, indices, grid=grid, class_weights=class_weights)
    for index, logits in zip(indices, patches):
        streaming.add(index, logits)
    z, y, x = (int(start) + inside for start, inside in zip(grid.starts[indices[0]], (3, 4, 5)))
    assert int(streaming.finish()[z, y, x]) == 0


def test_constant_patches_come_out_constant():
    grid, coarse, _, _, _ = a_case(0)
    indices = list(range(grid.num_candidates))
    constant = torch.arange(CLASSES).float()
    patches = [constant[:, None, None, None].expand(-1, 8, 8, 8)] * len(indices)
    high, is_covered = aggregate(coarse, patches, indices=indices, grid=grid, class_weights=torch.full((CLASSES,), 10.0))
    assert is_covered.all()
    upsampled = CoarseUpsampler(coarse, grid=grid).region([slice(0, n) for n in grid.padded_shape])
    a = mixing_weights(torch.tensor(10.0))
    torch.testing.assert_close(high, a * constant[:, None, None, None] + (1 - a) * upsampled, rtol=1e-5, atol=1e-5)


def test_two_patches_mix_by_hand():
    grid = CandidateGrid.covering((2, 2, 3), patch_size=(2, 2, 2), overlap=0.5)
    coarse = torch.zeros(1, 2, 2, 3)
    patches = [torch.full((1, 2, 2, 2), 1.0), torch.full((1, 2, 2, 2), 3.0)]
    high, _ = aggregate(coarse, patches, indices=[0, 1], grid=grid, class_weights=torch.zeros(1))
    torch.testing.assert_close(high[0, 0, 0], 0.5 * torch.tensor([1.0, 2.0, 3.0]))  # a = sigmoid(0); equal weights in the middle


def test_window_is_made_once_and_one_of_inference_serves_training():
    patch_window.cache_clear()
    with torch.inference_mode():
        window = patch_window((4, 6, 8))
    assert patch_window((4, 6, 8)) is window and patch_window((4, 8, 6)) is not window
    gate = torch.ones((), requires_grad=True)
    (window * gate).sum().backward()
    torch.testing.assert_close(gate.grad, window.sum())


def test_gate_gradient_is_the_benefit_of_its_patch():
    grid, coarse, indices, patches, class_weights = a_case(1)
    gates = torch.ones(len(indices), requires_grad=True)
    high, _ = aggregate(coarse, patches, indices=indices, grid=grid, class_weights=class_weights, gates=gates)
    plain, _ = aggregate(coarse, patches, indices=indices, grid=grid, class_weights=class_weights)
    assert torch.equal(high, plain)
    direction = torch.randn(high.shape, generator=torch.Generator().manual_seed(9))
    (high * direction).sum().backward()
    window, a = patch_window(grid.patch_size), mixing_weights(class_weights)[:, None, None, None]
    weight_sum = torch.zeros(grid.padded_shape)
    for index in indices:
        weight_sum[grid.slices(index)] += window
    upsampled = CoarseUpsampler(coarse, grid=grid).region([slice(0, n) for n in grid.padded_shape])
    for gradient, index, logits in zip(gates.grad, indices, patches):
        box = grid.slices(index)
        benefit = a * window / weight_sum[box] * (logits - upsampled[(slice(None), *box)])
        torch.testing.assert_close(gradient, (direction[(slice(None), *box)] * benefit).sum(), rtol=1e-3, atol=1e-3)  # sums of 2560 terms


@pytest.mark.parametrize(("shape", "coarse_factor"), [((24, 16, 40), 2), ((17, 9, 25), 3), ((48, 48, 48), 4)])
def test_few_patches_need_a_part_of_the_coarse_logits_and_give_the_same_labels(shape, coarse_factor):
    grid, coarse, indices, patches, class_weights = a_case(11, shape=shape, coarse_factor=coarse_factor)
    whole = CoarseUpsampler(coarse, grid=grid)
    for few in (indices[:1], indices[:2], indices):
        upsamplers = patch_upsamplers(coarse, indices=few, grid=grid)
        held = {upsampler.coarse_logits.data_ptr(): upsampler.coarse_logits.numel() for upsampler in upsamplers.values()}
        assert sum(held.values()) <= coarse.numel() and (few is indices or sum(held.values()) < 0.8 * coarse.numel())
        for index in few:
            assert torch.equal(upsamplers[index].region(grid.slices(index)), whole.region(grid.slices(index)))
        streaming = StreamingAggregator(upsamplers, grid=grid, class_weights=class_weights, coarse_labels=whole.labels())
        for index, logits in zip(few, patches):
            streaming.add(index, logits)
        expected, _ = aggregate(coarse, patches[: len(few)], indices=few, grid=grid, class_weights=class_weights)
        assert torch.equal(streaming.finish(), expected.argmax(0).to(torch.uint8)) and not upsamplers


def test_finish_without_an_announced_patch_is_refused():
    grid, coarse, indices, patches, class_weights = a_case(0)
    streaming = a_streaming(coarse, indices, grid=grid, class_weights=class_weights)
    with pytest.raises(ValueError, match="announced but not added"):
        streaming.finish()
