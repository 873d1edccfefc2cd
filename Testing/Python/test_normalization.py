"""Volumes without absolute units: their own percentiles or z-scores, the same in training and inference, and a model of MR end to end."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import turned

pytest.importorskip("monai")

from test_train import LABELS, a_data_folder, manifest_of, step_options, tiny_options, write  # noqa: E402

import NMSWSegment  # noqa: E402
from NMSWSegment.__main__ import main  # noqa: E402
from NMSWSegment.command_line import _parser  # noqa: E402
from NMSWSegment.data.prepared_case import PreparedCase  # noqa: E402
from NMSWSegment.data.training_sample import TrainingSample  # noqa: E402
from NMSWSegment.engine.net_runtimes import probe_inputs  # noqa: E402
from NMSWSegment.engine.resampling import to_model_grid  # noqa: E402
from NMSWSegment.engine.segment import segment_volume  # noqa: E402
from NMSWSegment.files import normalization  # noqa: E402
from NMSWSegment.files.bundle import load_bundle  # noqa: E402
from NMSWSegment.files.normalization import IntensityScale, intensity_scale  # noqa: E402
from NMSWSegment.files.orientation import to_sar  # noqa: E402
from NMSWSegment.files.roi import voxels_in_roi  # noqa: E402
from NMSWSegment.files.run_checks import check_intensities, check_modality  # noqa: E402
from NMSWSegment.files.volume import Volume, VolumeFile, read_volume  # noqa: E402
from NMSWSegment.nets.nmsw_net import Architecture, NMSWNet  # noqa: E402
from NMSWSegment.protocol import SegmentOptions, UserError  # noqa: E402
from NMSWSegment.samples.case_memory import loaded_case  # noqa: E402
from NMSWSegment.samples.case_source import resampled, whole_warp  # noqa: E402
from NMSWSegment.training.datasets import find_data  # noqa: E402
from NMSWSegment.training.export import export_bundle  # noqa: E402
from NMSWSegment.training.options import INTENSITY_POINTS, options_from_arguments  # noqa: E402
from NMSWSegment.training.step import prepare  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402


def is_near(found: IntensityScale, expected: IntensityScale, *, within: float) -> bool:
    """Whether two scales differ by at most a share of their unit."""
    return max(abs(found.offset - expected.offset), abs(found.unit - expected.unit)) < within * expected.unit


OWN_UNITS = ("percentiles", "zscore")
SHAPE, FINE_MM = (40, 36, 50), (3.2, 3.0, 2.5)


def an_mr_array(shape=SHAPE, *, seed: int = 0) -> np.ndarray:
    """A body of 300, tissues 60 apart, in air with noise of 6, no voxel below 0."""
    rng = np.random.default_rng(seed)
    array = np.abs(rng.normal(0, 6, shape)).astype(np.float32)
    body = tuple(slice(length // 4, -length // 4) for length in shape)
    array[body] = rng.normal(300, 60, array[body].shape)
    return array


def mr_options(normalization: str, **changes):
    return step_options(modality="MR", normalization=normalization, augmentation="paper", intensity_points=INTENSITY_POINTS[normalization], **changes)


def test_fixed_changes_nothing_and_looks_at_no_voxel():
    intensity = torch.tensor([1.0, 2.0])
    assert intensity_scale(None, "fixed") == IntensityScale() and IntensityScale().normalized(intensity) is intensity


def test_percentiles_and_z_scores_are_those_of_the_body():
    array = an_mr_array()
    body = array[10:-10, 9:-9, 13:-13]
    low, high = np.percentile(body, (0.5, 99.5))
    scale = intensity_scale(array, "percentiles")
    assert scale.own(0) == pytest.approx(low, abs=8) and scale.own(1) == pytest.approx(high, abs=4)
    scale = intensity_scale(array, "zscore")
    assert scale.offset == pytest.approx(300, abs=3) and scale.unit == pytest.approx(60, abs=3)
    np.testing.assert_allclose(scale.normalized(array)[0, 0, 0], (array[0, 0, 0] - scale.offset) / scale.unit)


@pytest.mark.parametrize("name", OWN_UNITS)
def test_padding_and_marks_change_nothing_and_much_air_changes_little(name):
    array = an_mr_array()
    expected = intensity_scale(array, name)
    for padding in (array.min(), -1.0, -3.4028235e38):
        assert is_near(intensity_scale(np.pad(array, 20, constant_values=padding), name), expected, within=0.005)
    marked = array.copy()
    marked[0, 0, :3] = np.nan, np.inf, -np.inf
    assert is_near(intensity_scale(marked, name), expected, within=0.005)
    in_air = np.abs(np.random.default_rng(1).normal(0, 6, (80, 72, 100))).astype(np.float32)  # 98 % of the voxels
    in_air[20:60, 18:54, 25:75] = array
    assert is_near(intensity_scale(in_air, name), expected, within=0.03)


@pytest.mark.parametrize("name", OWN_UNITS)
def test_order_of_the_axes_and_number_of_voxels_change_nothing(name, monkeypatch):
    array = an_mr_array((41, 36, 50))
    for limit in (normalization.MAX_VOXELS, 9000):  # 9000: every third voxel
        monkeypatch.setattr(normalization, "MAX_VOXELS", limit)
        expected = intensity_scale(array, name)
        assert intensity_scale(array[::-1].transpose(2, 0, 1)[:, :, ::-1], name) == expected
    assert is_near(expected, intensity_scale(an_mr_array((41, 36, 50), seed=3), name), within=0.2)


@pytest.mark.parametrize("name", OWN_UNITS)
def test_volume_of_one_intensity_or_a_mask_is_refused(name):
    for array in (np.full(SHAPE, 7, np.int16), np.eye(5, dtype=np.uint8)[None], np.full(SHAPE, np.nan)):
        with pytest.raises(UserError, match="too few different intensities"):
            intensity_scale(array, name)


@pytest.mark.parametrize("name", OWN_UNITS)
@pytest.mark.parametrize("mirror", [(1, 1, 1), (-1, 1, -1)])
def test_training_sees_the_volume_that_inference_sees(name, mirror):
    array = an_mr_array()
    array[0, :, :] = -3.4e38
    volume = Volume(array, turned(FINE_MM, SHAPE, degrees=(0, 0, 0), mirror=mirror, permutation=(2, 0, 1)))
    options = mr_options(name)
    x, _, grid = to_model_grid(volume, replace(manifest_of(options, NMSWNet(Architecture(num_classes=4))), modality="MR", normalization=name))
    intensity, spacing_mm, direction = to_sar(volume)
    assert intensity_scale(intensity, name) == intensity_scale(volume.array, name)
    case = PreparedCase(intensity=intensity, labels=np.ones(intensity.shape, np.uint8), spacing_mm=spacing_mm, extent=None, direction=direction)
    bounds = (options.intensity_points[0][0], options.intensity_points[-1][0])
    loaded = loaded_case(case, spacing_mm=options.spacing_mm, bounds=bounds, normalization=name)
    sample = TrainingSample("one", *resampled(loaded, whole_warp(loaded, spacing_mm=options.spacing_mm)))
    found, labels, found_grid = prepare(sample, options)
    assert found_grid == grid and 0.2 < float(x.max()) <= 1 and float(x.min()) == 0
    inside = labels == 1
    assert inside.float().mean() > 0.3 and float((found - x)[0, 0][inside].abs().max()) < 2e-3  # positions of grid_sample are float32


def test_test_patch_of_a_runtime_is_normalized_too():
    manifest = manifest_of(step_options(), NMSWNet(Architecture(num_classes=4)))
    (patch,) = probe_inputs(replace(manifest, normalization="zscore", intensity_points=INTENSITY_POINTS["zscore"]))
    assert 0.3 < float(patch.std()) / float(probe_inputs(manifest)[0].std()) < 3


# Options and data.


def options_of(*words: str):
    arguments = ["train", "--data", "decathlon:x", "--output", "y", *words]
    return options_from_arguments(_parser(arguments).parse_args(arguments))


def test_modality_brings_its_normalization_and_augmentation():
    options = options_of("--modality", "MR")
    assert (options.normalization, options.intensity_points, options.augmentation) == ("percentiles", ((0.0, 0.0), (1.0, 1.0)), "paper")
    options = options_of("--modality", "MR", "--normalization", "zscore", "--recipe", "paper-word")
    assert options.intensity_points == ((-3.0, 0.0), (4.0, 1.0)) and options.patch_size == (128, 128, 128)
    assert options_of("--modality", "MR", "--normalization", "zscore", "--window", "-2", "5").intensity_points == ((-2.0, 0.0), (5.0, 1.0))
    assert options_of("--recipe", "paper-word").intensity_points == ((-250.0, 0.0), (500.0, 1.0)) and options_of().modality == "CT"
    for words in (("--modality", "MR", "--augmentation", "scan"), ("--normalization", "zscore")):
        with pytest.raises(UserError, match="changes Hounsfield units.*Use --augmentation paper"):
            options_of(*words)


def test_bundle_of_another_modality_gives_weights_but_no_intensities(a_tiny_bundle, tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in a_tiny_bundle.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    values |= {"modality": "MR", "normalization": "zscore", "intensity_points": [[-2, 0], [2, 1]], "architecture": {"preset": "compact"}}
    (folder / "manifest.json").write_text(json.dumps(values))
    options = options_of("--initial-bundle", str(folder))
    assert (options.modality, options.normalization, options.intensity_points) == ("MR", "zscore", ((-2.0, 0.0), (2.0, 1.0)))
    options = options_of("--initial-bundle", str(folder), "--modality", "CT")
    assert (options.modality, options.normalization, options.augmentation) == ("CT", "fixed", "scan") and options.intensity_points[0][0] == -1000


@pytest.mark.parametrize(("said", "modality"), [({"modality": {"0": "MRI"}}, "CT"), ({"channel_names": {"0": "CT"}}, "MR")])
def test_data_of_another_modality_is_refused(tmp_path, said, modality):
    folder = a_data_folder(tmp_path)
    values = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(values | said))
    with pytest.raises(UserError, match="one run learns one modality"):
        find_data(tiny_options(folder, modality=modality, augmentation="paper"))


def test_anatomies_are_no_mr(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "label_full.nii.gz").touch()
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    with pytest.raises(UserError, match="is CT, but the modality of the run is MR"):
        find_data(tiny_options(tmp_path, data=(f"anatomies:{tmp_path}",), modality="MR", augmentation="paper"))


def test_prepared_data_remembers_its_modality(tmp_path):
    folder = a_data_folder(tmp_path / "data")
    assert main(["prepare", "--data", f"decathlon:{folder}", "--modality", "MR", "--output", str(tmp_path / "prepared")]) == 0
    data = (f"prepared:{tmp_path / 'prepared'}",)
    assert len(find_data(tiny_options(folder, data=data, modality="MR", augmentation="paper")).prepared_cases) == 2
    with pytest.raises(UserError, match="is MR, but the modality of the run is CT"):
        find_data(tiny_options(folder, data=data))


# Before a run.


def test_ct_is_refused_by_an_mr_model_and_mr_by_a_ct_model(a_tiny_bundle, a_phantom):
    ct = load_bundle(str(a_tiny_bundle)).manifest
    mr = replace(ct, modality="MR")
    for modality, manifest in (("CT", mr), ("MR", ct)):
        file = VolumeFile(Path("series"), "series", SHAPE, np.eye(4), bytes_per_voxel=2, modality=modality, read_array=an_mr_array)
        with pytest.raises(UserError, match=f"'series' is {modality}, but model 'tiny' was trained on {manifest.modality}.*--force-modality"):
            check_modality(file, manifest)
    noisy = Volume(a_phantom[0].array + np.random.default_rng(0).normal(0, 20, a_phantom[0].shape).astype(np.float32), a_phantom[0].ijk_to_ras)
    with pytest.raises(UserError, match="looks like a CT in Hounsfield units.*--force-modality"):
        check_intensities(noisy, mr)
    padded = np.pad(an_mr_array(), 3, constant_values=-1000)  # a padding is no air
    for array in (an_mr_array(), padded):
        check_intensities(Volume(array, np.eye(4)), mr)
    with pytest.raises(UserError, match="hardly a CT"):
        check_intensities(Volume(an_mr_array(), np.eye(4)), ct)


# End to end.


@pytest.fixture(scope="module")
def mr_data(tmp_path_factory):
    """The tiny labelled cases as MR: the body bright, air dark, noise."""
    folder = a_data_folder(tmp_path_factory.mktemp("mr"))
    for seed, name in enumerate(("one", "two")):
        intensity = read_volume(folder / name / "ct.nii.gz")
        values = np.array(to_sar(intensity)[0], dtype=np.float32)
        values = np.interp(values, (-1000, -80, 110, 160, 500), (5, 200, 300, 400, 600))
        values += np.random.default_rng(seed).normal(0, 4, values.shape)
        write(folder / name / "ct.nii.gz", values.clip(0).astype(np.float32))
    values = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(values | {"modality": {"0": "MRI"}}))
    return folder


@pytest.mark.parametrize("name", OWN_UNITS)
def test_model_of_mr_segments_alike_whatever_the_unit_and_the_region_of_interest(mr_data, tmp_path, name, monkeypatch):
    options = tiny_options(
        mr_data, hold_out=("two",), iterations=2, modality="MR", normalization=name, intensity_points=INTENSITY_POINTS[name], augmentation="paper"
    )
    monkeypatch.setattr("NMSWSegment.samples.augment.SHIFT_VOXELS", 2)  # the volumes have 26 voxels
    train(options, output=tmp_path / "run", num_workers=0)
    bundle = export_bundle(tmp_path / "run", tmp_path / "mr-net")
    manifest = load_bundle(str(bundle)).manifest
    assert (manifest.modality, manifest.normalization) == ("MR", name) and manifest.training["options"]["normalization"] == name
    assert "- Modality: MR; intensities: " in (bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["network_data_format"]["inputs"]["image"]["format"] == "magnitude"

    volume = read_volume(mr_data / "two" / "ct.nii.gz")
    scaled = Volume(volume.array * 7 + 100, volume.ijk_to_ras)
    marked = volume.array.copy()
    marked[:, 0] = -3.4e38
    results = [NMSWSegment.segment(one, model=bundle, k=3, device="cpu", threads=1) for one in (volume, scaled, Volume(marked, volume.ijk_to_ras))]
    assert all(len(np.unique(result.labelmap.array)) > 1 for result in results)
    np.testing.assert_array_equal(results[1].labelmap.array, results[0].labelmap.array)

    # a region of interest is seen with the numbers of the whole volume: the coarse result inside is the same
    roi_to_ras = tuple(map(tuple, np.diag([60.0, 60.0, 60.0, 1.0]).tolist()))
    options = SegmentOptions(num_patches=0, device="cpu", threads=1)
    whole, part = (segment_volume(volume, load_bundle(str(bundle)), options=replace(options, roi_to_ras=roi)).labelmap.array for roi in (None, roi_to_ras))
    inside = voxels_in_roi(volume.shape, ijk_to_ras=volume.ijk_to_ras, roi_to_ras=roi_to_ras)
    assert 0 < inside.mean() < 0.5 and (part[~inside] == 0).all()
    np.testing.assert_array_equal(part[inside], whole[inside])
