"""segment() from Python: three lines, the same answer as the command line, and a package that is cheap to import."""

import subprocess
import sys

import numpy as np
import pytest

import NMSWSegment
from NMSWSegment.__main__ import main
from NMSWSegment.engine import net_runtimes, segmentation
from NMSWSegment.files import phantoms
from NMSWSegment.files.bundle import load_bundle
from NMSWSegment.files.run_checks import check_intensities
from NMSWSegment.files.volume import Volume, read_volume, write_volume
from NMSWSegment.protocol import Cancelled, UserError


def test_three_lines_give_what_the_command_line_writes(tmp_path, a_phantom, a_tiny_bundle):
    write_volume(a_phantom[0], tmp_path / "ct.nii.gz")
    words = [str(tmp_path / "ct.nii.gz"), "-o", str(tmp_path / "expected.nii.gz"), "--bundle", str(a_tiny_bundle), "--k", "2", "--threads", "1"]
    assert main(["segment", *words, "--device", "cpu", "--min-island-ml", "0.1"]) == 0

    from NMSWSegment import segment

    result = segment(tmp_path / "ct.nii.gz", model=str(a_tiny_bundle), k=2, threads=1, device="cpu", min_island_ml=0.1)
    result.save(tmp_path / "found.nii.gz")

    np.testing.assert_array_equal(read_volume(tmp_path / "found.nii.gz").array, read_volume(tmp_path / "expected.nii.gz").array)
    assert [row.structure for row in result.statistics()] == ["liver", "spleen", "vertebrae"] and result.statistics()[0].volume_ml > 100
    assert len(result.patches) == 2 and result.run_info["options"]["min_island_ml"] == 0.1


def test_volume_object_structures_all_patches_and_progress(a_phantom, a_tiny_bundle):
    stages = []
    result = NMSWSegment.segment(
        a_phantom[0], model=a_tiny_bundle, k="all", structures=["spleen"], device="cpu", threads=1, on_progress=lambda progress: stages.append(progress.stage)
    )
    assert set(np.unique(result.labelmap.array)) == {0, 2} and [label.name for label in result.labels] == ["spleen"]
    assert len(result.patches) == result.run_info["candidates"] and stages[-1] == "done"
    with pytest.raises(UserError, match="Give segment\\(\\) the folder"):
        result.save("seg.dcm")

    def stop(progress):
        raise Cancelled

    with pytest.raises(Cancelled):
        NMSWSegment.segment(a_phantom[0], model=a_tiny_bundle, device="cpu", on_progress=stop)
    with pytest.raises(UserError, match="Did you mean 'spleen'"):
        NMSWSegment.segment(a_phantom[0], model=a_tiny_bundle, structures=["spleeen"])


def test_values_that_are_no_hounsfield_units_are_refused_unless_forced(a_phantom, a_tiny_bundle):
    shifted = Volume(a_phantom[0].array + 1024, a_phantom[0].ijk_to_ras)
    with pytest.raises(UserError, match="hardly a CT in Hounsfield units"):
        NMSWSegment.segment(shifted, model=a_tiny_bundle, device="cpu", threads=1)
    assert NMSWSegment.segment(shifted, model=a_tiny_bundle, k=0, device="cpu", threads=1, force_modality=True).patches == ()


@pytest.mark.parametrize("what", ["HU + 1024, padded with -1024", "rescaled twice", "one odd voxel"])
def test_values_that_are_shifted_are_refused_although_some_look_like_air(a_tiny_bundle, what):
    generator = np.random.default_rng(0)
    hu = np.rint(np.concatenate([np.full(9000, -1000.0), generator.normal(-850, 40, 4000), generator.normal(-100, 15, 4000), generator.normal(50, 30, 9000)]))
    hu = np.concatenate([hu, generator.normal(400, 100, 1000)]).reshape(27, 25, 40).astype(np.float32)
    shifted = hu + 1024 if what != "rescaled twice" else hu - 1024
    if what.startswith("HU"):
        shifted = np.pad(shifted, 4, constant_values=-1024)
    if what == "one odd voxel":
        shifted[0, 0, 0] = -500
    check_intensities(Volume(hu, np.eye(4)), load_bundle(a_tiny_bundle).manifest)
    with pytest.raises(UserError, match="hardly a CT in Hounsfield units"):
        check_intensities(Volume(shifted, np.eye(4)), load_bundle(a_tiny_bundle).manifest)


def test_crop_inside_of_a_body_is_a_ct_without_any_air(a_tiny_bundle):
    array = np.full((20, 24, 28), 45.0, np.float32)
    array[:, :4] = -105.0  # fat
    inside = Volume(array, np.diag([3.0, 3.0, 3.0, 1.0]))
    assert NMSWSegment.segment(inside, model=a_tiny_bundle, k=0, device="cpu", threads=1).patches == ()
    array[:, :4] = 0.0
    with pytest.raises(UserError, match="neither between -1100 and -200 .air, lung. nor between -150 and -50 .fat."):
        NMSWSegment.segment(inside, model=a_tiny_bundle, k=0, device="cpu", threads=1)


def test_second_call_finds_the_networks_loaded(a_phantom, a_tiny_bundle):
    for _ in range(2):
        timings = NMSWSegment.segment(a_phantom[0], model=a_tiny_bundle, k=0, device="cpu", threads=1).run_info["timings_s"]
    assert "load" not in timings


def test_networks_that_left_a_gpu_get_another_chance_even_after_a_run_that_ended_early(a_phantom, a_tiny_bundle):
    def stop_at_the_patches(progress):
        if progress.stage == "patches":
            segmentation._open_nets(load_bundle(a_tiny_bundle).folder, load_bundle(a_tiny_bundle).sha256, "cpu", "exact", 1).device_steps.append("a step")
            raise Cancelled

    options = {"model": a_tiny_bundle, "k": 1, "device": "cpu", "threads": 1}
    with pytest.raises(Cancelled):
        NMSWSegment.segment(a_phantom[0], on_progress=stop_at_the_patches, **options)
    assert NMSWSegment.segment(a_phantom[0], **options).run_info["device_steps"] == []


def test_voxels_that_are_no_number_are_told_of_a_volume_object_too(a_phantom, a_tiny_bundle):
    array = a_phantom[0].array.copy()
    array[3, 4, 5] = np.nan
    with pytest.raises(UserError, match="'holes' has 1 voxels that are no number.*Replace them"):
        NMSWSegment.segment(Volume(array, a_phantom[0].ijk_to_ras, "holes"), model=a_tiny_bundle, device="cpu", force_modality=True)


def test_importing_the_package_loads_no_library():
    code = "import sys, NMSWSegment; print(sorted({'torch', 'numpy', 'SimpleITK', 'highdicom', 'pydicom'} & set(sys.modules))); NMSWSegment.segment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[]", "True"]
    assert "highdicom" not in done.stdout


def test_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="sgment"):
        NMSWSegment.sgment  # noqa: B018
    assert "segment" in dir(NMSWSegment) and phantoms


def test_runtime_that_was_asked_for_computes_the_local_net(a_phantom, a_tiny_bundle, monkeypatch):
    monkeypatch.setattr(net_runtimes, "possible_runtimes", lambda: ["torch-bf16"])
    monkeypatch.setattr(net_runtimes, "_in_bfloat16", lambda net: lambda x: net(x) + 0.0)
    for runtime in ("exact", "torch-bf16"):
        result = NMSWSegment.segment(a_phantom[0], model=a_tiny_bundle, k=1, device="cpu", threads=1, runtime=runtime)
        assert result.run_info["runtime"]["name"] == runtime
