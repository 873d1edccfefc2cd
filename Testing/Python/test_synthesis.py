"""AnatomySource and its parts: values and sides on a tiny anatomy made here, 255 beyond the map, no mirroring, no folds."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from NMSWSegment.data.axis_filters import apply_along_axes
from NMSWSegment.data.body_extent import measure_body
from NMSWSegment.files.orientation import to_sar
from NMSWSegment.files.volume import Volume
from NMSWSegment.protocol import UserError
from NMSWSegment.samples import acquisition, synthesis
from NMSWSegment.samples.scan_range import random_box
from NMSWSegment.samples.synthesis import AnatomySource, SynthesisOptions, prepare_anatomy
from NMSWSegment.samples.tissues import draw_table, read_tissues, split_shells
from NMSWSegment.samples.warp import WarpLimits, bspline_matrix, gaussian_matrix, random_warp, slice_matrix, smooth_noise

STILL = WarpLimits(rotation_rad=(0.0, 0.0, 0.0), scale=(1.0, 1.0), shear=0.0, elastic_mm=0.0)
# id: name, class, kind, HU without contrast, arterial, portal venous, sd
TISSUES = {
    0: ("air outside the body", 0, "air", -1000, -1000, -1000, 3),
    1: ("fat", 0, "fat", -105, -103, -100, 12),
    2: ("liver", 1, "liver", 56, 68, 108, 10),
    3: ("spleen", 2, "spleen", 48, 115, 122, 10),
    4: ("lung", 3, "lung", -830, -820, -820, 45),
    5: ("spine", 4, "cortical", 850, 850, 850, 220),
    6: ("colon", 5, "colon", 30, 38, 42, 45),
    7: ("unsure", 255, "soft", 42, 52, 60, 16),
}  # fmt: skip


def tissues_json(tissues=TISSUES) -> str:
    entries = {
        str(index): {"name": name, "unified": label, "kind": kind, "hu": {"noncontrast": plain, "arterial": arterial, "portal_venous": portal, "sd": sd}}
        for index, (name, label, kind, plain, arterial, portal, sd) in tissues.items()
    }
    return json.dumps({"tissues": entries})


def tissue_map() -> np.ndarray:
    """S-A-R, 6 mm voxels: liver on the right, spleen left, spine at the back, lungs on top."""
    array = np.zeros((50, 32, 44), np.uint8)
    array[:, 4:28, 4:40] = 1
    array[5:25, 8:24, 24:38] = 2
    array[8:20, 10:20, 7:15] = 3
    array[30:48, 8:24, 8:36] = 4
    array[:, 5:9, 19:24] = 5
    array[2:26, 12:22, 16:23] = 6
    array[26:29, 10:20, 10:30] = 7
    return array


def write_map(path: Path, array_sar: np.ndarray, spacing=6.0) -> None:
    image = sitk.GetImageFromArray(array_sar)
    image.SetSpacing([spacing] * 3)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # RAS axes written in LPS
    sitk.WriteImage(image, str(path))


@pytest.fixture
def an_anatomy(tmp_path) -> Path:
    folder = tmp_path / "body"
    folder.mkdir()
    write_map(folder / "label_full.nii.gz", tissue_map())
    (folder / "tissues.json").write_text(tissues_json())
    return folder


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def centroid(labels: torch.Tensor, value: int) -> torch.Tensor:
    return (labels == value).nonzero().float().mean(dim=0)


def test_draw_same_generator_same_sample(an_anatomy):
    source = AnatomySource(prepare_anatomy(an_anatomy, num_labels=6))
    first, again, other = (source.draw(generator(seed), SynthesisOptions(spacing_mm=(6.0,) * 3)) for seed in (3, 3, 4))
    assert torch.equal(first.intensity, again.intensity) and torch.equal(first.labels, again.labels)
    assert first.intensity.shape != other.intensity.shape or not torch.equal(first.intensity, other.intensity)


def test_draw_labels_and_hu_agree(an_anatomy):
    source = AnatomySource(prepare_anatomy(an_anatomy, num_labels=6))
    options = SynthesisOptions(spacing_mm=(6.0,) * 3, circular_share=0.0, turned_share=0.0)
    means = {value: [] for value in (1, 3, 4)}
    for seed in range(8):
        sample = source.draw(generator(seed), options)
        assert sample.name == "body"
        assert sample.intensity.dtype == torch.float32 and sample.labels.dtype == torch.uint8
        assert -1024 <= float(sample.intensity.min()) and float(sample.intensity.max()) <= 3071
        for value, found in means.items():
            if (sample.labels == value).sum() > 100:
                found.append(float(sample.intensity[sample.labels == value].median()))
    # a median is robust against borders and vessels; the ranges are those of draw_table with jitter
    assert all(-60 < value < 240 for value in means[1])
    assert all(-950 < value < -450 for value in means[3])
    assert all(value > 150 for value in means[4])
    assert all(means.values())


def test_draw_keeps_the_sides_of_the_body(an_anatomy):
    source = AnatomySource(prepare_anatomy(an_anatomy))
    checked = 0
    for seed in range(12):
        labels = source.draw(generator(seed), SynthesisOptions(spacing_mm=(6.0,) * 3)).labels
        if all((labels == value).sum() > 30 for value in (1, 2, 4)):
            checked += 1
            liver, spleen, spine = (centroid(labels, value) for value in (1, 2, 4))
            assert liver[2] > spleen[2]  # liver on the right, high index
            assert liver[1] > spine[1]  # spine at the back, low index
        if (labels == 3).sum() > 30 and (labels == 1).sum() > 30:
            assert centroid(labels, 3)[0] > centroid(labels, 1)[0]  # lungs above
    assert checked >= 4


def test_draw_without_deformation_reproduces_the_map(an_anatomy):
    source = AnatomySource(prepare_anatomy(an_anatomy))
    warp = synthesis.Warp(
        shape=(50, 32, 44), spacing_mm=(6.0,) * 3, matrix=torch.eye(3), center_mm=torch.tensor([49.0, 31.0, 43.0]) * 3, control_mm=torch.zeros(3, 4, 4, 4)
    )
    tissue = source._tissue_at(warp.source_index((6.0,) * 3), warp)
    expected = torch.tensor([TISSUES[index][1] for index in range(8)], dtype=torch.uint8)[torch.from_numpy(tissue_map()).int()]
    assert torch.equal(source._labels[tissue.int()], expected)


def test_draw_beyond_the_map_along_superior_is_unknown_not_air(an_anatomy):
    source = AnatomySource(prepare_anatomy(an_anatomy))
    limits = WarpLimits(rotation_rad=(0.3, 0.2, 0.2))
    found = 0
    for seed in range(10):
        sample = source.draw(generator(seed), SynthesisOptions(spacing_mm=(6.0,) * 3, warp=limits, circular_share=0.0, turned_share=0.0))
        unknown = sample.labels == 255
        found += int(unknown[[0, -1]].sum())
        assert unknown.float().mean() < 0.25
        # the fat of the map's last slice goes on, so that no slab of air appears above the body
        assert (sample.intensity[0] > -400).float().mean() > 0.15 and (sample.intensity[-1] > -400).float().mean() > 0.15
    assert found > 0


def turned(seed: int, *, shape=(60, 50, 70), spacing_mm=(3.0, 3.0, 3.0)) -> torch.Tensor:
    """What turn_field_of_view keeps of a body that fills the sample, (D, H, W) bool."""
    intensity, labels = torch.full(shape, 40.0), torch.full(shape, 5, dtype=torch.uint8)
    acquisition.turn_field_of_view(intensity, labels, spacing_mm=spacing_mm, generator=generator(seed))
    kept = labels == 5
    assert (intensity[kept] == 40).all() and (intensity[~kept] == -1024).all() and (labels[~kept] == 0).all()
    return kept


def test_turned_field_of_view_is_an_oblique_box_in_millimetres():
    for seed in range(6):
        kept, coarser = turned(seed), turned(seed, shape=(30, 50, 70), spacing_mm=(6.0, 3.0, 3.0))
        assert 0.3 < float(kept.float().mean()) < 1 and kept[25:35, 20:30, 30:40].all()
        assert float((kept[::2] == coarser).float().mean()) > 0.96


def test_field_of_view_that_is_not_turned_is_an_upright_box_with_air_around_it(monkeypatch):
    monkeypatch.setattr(acquisition, "TURNED_SHARE", 0.0)
    for seed in range(6):
        kept = turned(seed)
        counts = [int(kept.any(dim=other[0]).any(dim=other[1]).sum()) for other in ((1, 1), (0, 1), (0, 0))]
        assert int(kept.sum()) == counts[0] * counts[1] * counts[2] and all(0.7 * size < count <= size for count, size in zip(counts, kept.shape))


def test_draw_unknown_tissue_stays_unknown(an_anatomy):
    source = AnatomySource(prepare_anatomy(an_anatomy))
    options = SynthesisOptions(spacing_mm=(6.0,) * 3, warp=STILL, circular_share=0.0, turned_share=0.0, min_range_mm=294.0)
    labels = source.draw(generator(1), options).labels
    assert 0.5 < float((labels == 255).sum()) / (3 * 10 * 20) < 1.5


def test_draw_respects_max_voxels(an_anatomy):
    sample = AnatomySource(prepare_anatomy(an_anatomy)).draw(generator(0), SynthesisOptions(spacing_mm=(3.0,) * 3, max_voxels=20_000))
    assert sample.labels.numel() <= 20_000


def test_source_missing_tissues_says_where_to_put_them(an_anatomy):
    (an_anatomy / "tissues.json").unlink()
    with pytest.raises(UserError, match="Put it beside label_full.nii.gz"):
        AnatomySource(prepare_anatomy(an_anatomy))


def test_source_unlisted_tissue_says_to_add_it(an_anatomy):
    (an_anatomy / "tissues.json").write_text(tissues_json({index: TISSUES[index] for index in range(7)}))
    with pytest.raises(UserError, match=r"ids \[7\].*Add them there"):
        AnatomySource(prepare_anatomy(an_anatomy))


def test_source_label_outside_the_list_says_what_to_use(an_anatomy):
    with pytest.raises(UserError, match="labels end at 3. Use one of them, or 255"):
        AnatomySource(prepare_anatomy(an_anatomy, num_labels=4))


def test_tissues_malformed_lists_the_fields(tmp_path):
    (tmp_path / "tissues.json").write_text('{"tissues": {"1": {"name": "liver"}}}')
    with pytest.raises(UserError, match="needs name, unified, kind and hu"):
        read_tissues(tmp_path / "tissues.json")


def test_split_shells_gives_the_colon_a_wall_of_the_same_class(an_anatomy):
    tissues = read_tissues(an_anatomy / "tissues.json")
    split, more = split_shells(tissue_map(), tissues, spacing_mm=(2.0, 2.0, 2.0))
    wall = next(tissue for tissue in more if tissue.kind == "gutwall")
    assert wall.label == 5 and wall.index not in TISSUES
    box = split[2:26, 12:22, 16:23]
    assert set(np.unique(box).tolist()) == {6, wall.index}
    assert (box[1:-1, 1:-1, 1:-1] == 6).all() and (box[0] == wall.index).all() and (box[:, :, -1] == wall.index).all()
    assert np.array_equal(split[tissue_map() != 6], tissue_map()[tissue_map() != 6])


def test_draw_table_contrast_brightens_the_aorta_not_the_fat(tmp_path):
    (tmp_path / "tissues.json").write_text(tissues_json({1: TISSUES[1], 2: ("aorta", 1, "artery", 42, 320, 155, 15)}))
    tables = [draw_table(read_tissues(tmp_path / "tissues.json"), generator(seed)) for seed in range(60)]
    enhanced = [float(table.mean_hu[2]) for table in tables if table.enhancement > 0.6]
    plain = [float(table.mean_hu[2]) for table in tables if table.enhancement < 0.2]
    assert np.mean(enhanced) > np.mean(plain) + 60 and len(plain) > 5
    assert all(-145 < float(table.mean_hu[1]) < -60 for table in tables)
    assert all(float(table.mean_hu[9]) == -1000 for table in tables)  # an id without a tissue is air


@pytest.mark.parametrize("seed", range(4))
def test_warp_never_folds_or_mirrors(seed):
    warp = random_warp(
        torch.tensor([[0.0, 0, 0], [180.0, 150, 210]]), limits=WarpLimits(elastic_mm=18.0), spacing_mm=(3.0,) * 3, max_voxels=10**6, generator=generator(seed)
    )
    index = warp.source_index((1.0, 1.0, 1.0))
    steps = [index.diff(dim=axis + 1)[:, : -1 if axis != 0 else None, : -1 if axis != 1 else None, : -1 if axis != 2 else None] for axis in range(3)]
    determinant = torch.linalg.det(torch.stack(steps, dim=-1).permute(1, 2, 3, 0, 4))
    assert float(determinant.min()) > 0


def test_warp_limits_that_could_fold_are_refused():
    with pytest.raises(ValueError, match="keep it under"):
        WarpLimits(elastic_mm=30.0, control_spacing_mm=45.0)
    with pytest.raises(ValueError, match="mirror"):
        WarpLimits(scale=(-1.0, 1.2))


def test_filters_keep_a_constant_and_identity_is_exact():
    constant = torch.full((7, 5, 6), 40.0)
    for matrix in (gaussian_matrix, lambda n, **_: slice_matrix(n, thickness_voxels=2.6, phase=0.7)):
        torch.testing.assert_close(apply_along_axes(constant, tuple(matrix(size, sigma_voxels=0.8) for size in constant.shape)), constant)
    assert torch.equal(slice_matrix(5, thickness_voxels=1.0, phase=0.5), torch.eye(5))
    torch.testing.assert_close(bspline_matrix(9, num_controls=5).sum(dim=1), torch.ones(9))


def test_smooth_noise_has_unit_variance():
    noise = smooth_noise((40, 30, 50), length_mm=9.0, spacing_mm=(3.0,) * 3, generator=generator(0))
    assert abs(float(noise.std()) - 1) < 0.15 and abs(float(noise.mean())) < 0.15


def test_to_sar_turns_a_permuted_mirrored_volume_back():
    array = np.arange(24).reshape(2, 3, 4)  # S-A-R
    spacing = np.diag([4.0, 3.0, 2.0, 1.0])
    assert np.array_equal(to_sar(Volume(array=array, ijk_to_ras=spacing))[0], array)
    # i runs to posterior, j to superior, k to left
    turned = array.transpose(2, 0, 1)[::-1, :, ::-1]
    ijk_to_ras = np.zeros((4, 4))
    ijk_to_ras[1, 0], ijk_to_ras[2, 1], ijk_to_ras[0, 2], ijk_to_ras[3, 3] = -3.0, 2.0, -4.0, 1.0
    back, spacing_mm, direction = to_sar(Volume(array=turned, ijk_to_ras=ijk_to_ras))
    assert np.array_equal(back, array) and spacing_mm == (2.0, 3.0, 4.0)
    assert np.array_equal(direction, np.eye(3))


def test_random_box_shows_no_air_beyond_a_cut_face():
    body = torch.zeros(40, 20, 30, dtype=torch.bool)
    body[:, 4:16, :25] = True  # cut at the left face
    extent = measure_body(body, {"lung": torch.zeros(40, dtype=torch.bool)}, spacing_mm=(5.0, 5.0, 5.0))
    assert extent.is_cut == ((False, False), (True, False)) and extent.landmarks_mm == {}
    assert extent.in_plane_mm == ((20.0, 75.0), (0.0, 120.0))
    boxes = torch.stack([random_box(extent, min_range_mm=60.0, generator=generator(seed)) for seed in range(100)])
    assert float(boxes[:, 0, 2].min()) >= 5.0 and float(boxes[:, 1, 2].max()) > 120.0
    assert float(boxes[:, 0, 0].min()) >= 0.0 and float(boxes[:, 1, 0].max()) <= 195.0
    assert float((boxes[:, 1, 0] - boxes[:, 0, 0]).min()) >= 39.99  # slabs, else 60


def test_random_box_whole_source_when_shorter_than_the_shortest_range():
    extent = measure_body(torch.ones(4, 5, 6, dtype=torch.bool), {}, spacing_mm=(5.0, 5.0, 5.0))
    box = random_box(extent, min_range_mm=120.0, generator=generator(0))
    assert box[:, 0].tolist() == [0.0, 15.0]
