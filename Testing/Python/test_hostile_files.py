"""NIfTI, NRRD and MetaImage files as they should not be: the right volume, or one sentence that says what to do."""

import gzip
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from hostile import SHAPE, voxels

from NMSWSegment.files.volume import Volume, open_volume, read_volume, write_volume
from NMSWSegment.protocol import UserError

PLACE = np.array([[-1.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -50], [0, 0, 0, 1]])
"""ijk_to_ras; 1 x 2 x 3 mm along I, J, K."""


def a_volume(*, dtype=np.int16) -> Volume:
    """Asymmetric in voxels and place."""
    return Volume(array=voxels(dtype=dtype), ijk_to_ras=PLACE)


def nifti(path: Path, **fields) -> Path:
    """A NIfTI file with some fields of its header changed: name -> (offset, format, values)."""
    write_volume(a_volume(), path)
    data = path.read_bytes() if path.suffix == ".nii" else gzip.decompress(path.read_bytes())
    data = bytearray(data)
    for offset, code, values in fields.values():
        struct.pack_into("<" + code, data, offset, *values)
    path.write_bytes(data if path.suffix == ".nii" else gzip.compress(bytes(data)))
    return path


def rows(matrix: np.ndarray) -> tuple:
    """The field srow of a matrix."""
    return 280, "12f", tuple(matrix[:3].ravel())


NAN, INF = float("nan"), float("inf")
NO_QFORM, NO_SFORM = (252, "h", (0,)), (254, "h", (0,))
SHEARED = PLACE @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
TURNED = np.array([[0.0, -2, 0, 30], [1, 0, 0, 40], [0, 0, 3, -50], [0, 0, 0, 1]])
REFUSED = {
    "pixdim that disagrees with the sform": ({"pixdim": (80, "3f", (1, 1, 1)), "q": NO_QFORM}, r"two voxel sizes: 1 x 1 x 1 mm \(pixdim\) and 1 x 2 x 3 mm"),
    "pixdim a third of the sform": ({"s": rows(np.diag([3.0, 3, 3, 1])), "pixdim": (80, "3f", (1, 1, 1)), "q": NO_QFORM}, "two voxel sizes: 1 x 1 x 1"),
    "qoffset nan": ({"qoffset": (268, "f", (NAN,)), "s": NO_SFORM}, "place of.*is no number .qform"),
    "quatern nan": ({"quatern": (256, "f", (NAN,)), "s": NO_SFORM}, "place of.*is no number .qform"),
    "srow infinite": ({"srow": (292, "f", (INF,)), "q": NO_QFORM}, "place of.*is no number .sform"),
    "sform and qform at different places": ({"s": rows(PLACE + np.eye(4)[:, [1, 2, 3, 0]] * 40)}, "voxel sizes|right angles|two places"),
    "sform moved": ({"s": rows(PLACE + [[0, 0, 0, 25], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])}, r"two places.*25 mm apart.*30 x 40 x -50 mm or at 55 x 40"),
    "sform turned": ({"s": rows(TURNED)}, "two places for its voxels .qform and sform"),
    "sform mirrored": ({"s": rows(PLACE @ np.diag([-1, 1, 1, 1]))}, "two places"),
    "sheared sform": ({"s": rows(SHEARED)}, "right angles to each other .sform"),
    "sheared sform alone": ({"s": rows(SHEARED), "q": NO_QFORM}, "right angles to each other .sform"),
    "sform of zeros": ({"s": rows(np.zeros((4, 4))), "q": NO_QFORM}, "right angles to each other .sform"),
    "pixdim 0": ({"pixdim": (80, "3f", (0, 1, 1))}, "size 0 x 1 x 1 mm"),
    "pixdim below 0": ({"pixdim": (80, "3f", (1, -2, 3))}, "size 1 x -2 x 3 mm"),
    "pixdim nan": ({"pixdim": (88, "f", (NAN,))}, "size 1 x 2 x nan mm"),
    "vox_offset nan": ({"offset": (108, "f", (NAN,))}, "damaged"),
    "vox_offset infinite": ({"offset": (108, "f", (INF,))}, "damaged"),
    "vox_offset below 0": ({"offset": (108, "f", (-5,))}, "damaged"),
    "vox_offset behind the end": ({"offset": (108, "f", (1e6,))}, "end early"),
    "slope nan": ({"slope": (112, "f", (NAN,))}, "scaled by nan"),
    "slope infinite": ({"slope": (112, "f", (INF,))}, "scaled by inf"),
    "dim of eight axes": ({"dim": (40, "h", (8,))}, "damaged"),
    "dim below 0": ({"dim": (42, "h", (-8,))}, "damaged"),
    "dim 0": ({"dim": (44, "h", (0,))}, "damaged"),
    "dim of 60000 rows": ({"dim": (42, "3h", (32000, 32000, 32000))}, "end early"),
    "no magic": ({"magic": (344, "4s", (b"\0\0\0\0",))}, "damaged"),
    "half of a pair": ({"magic": (344, "4s", (b"ni1\0",))}, "damaged"),
    "unknown datatype": ({"datatype": (70, "h", (999,))}, "damaged"),
    "complex": ({"datatype": (70, "2h", (32, 64)), "dim": (42, "h", (2,))}, "complex|values per voxel"),
    "1e30 mm": ({"s": rows(PLACE + [[0, 0, 0, 1e30], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]), "q": NO_QFORM}, "lies at"),
    "voxels of 1e30 mm": ({"s": rows(PLACE * 1e30), "pixdim": (80, "3f", (1e30, 2e30, 3e30)), "q": NO_QFORM}, "mm large|lies at"),
    "voxels of 1e-30 mm": ({"s": rows(PLACE * 1e-20), "pixdim": (80, "3f", (1e-20, 2e-20, 3e-20)), "q": NO_QFORM}, "mm large|right angles"),
}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("symptom", REFUSED)
def test_nifti_is_refused_with(tmp_path, tally, capfd, symptom, ending):
    fields, sentence = REFUSED[symptom]
    path = nifti(tmp_path / f"ct{ending}", **fields)
    error = tally(lambda: read_volume(path))
    assert isinstance(error, UserError), f"it was read as {error.shape} with {error.ijk_to_ras}"
    with pytest.raises(UserError, match=sentence):
        raise error
    assert capfd.readouterr() == ("", "")


RIGHT = {
    "no transform but pixdim": {"q": NO_QFORM, "s": NO_SFORM},
    "qform alone": {"s": NO_SFORM},
    "sform alone": {"q": NO_QFORM},
    "nan in a qform that is not used": {"q": NO_QFORM, "qoffset": (268, "f", (NAN,))},
    "bitpix 0": {"bitpix": (72, "h", (0,))},
    "vox_offset 352 as usual": {"offset": (108, "f", (352,))},
    "slope 0 means none": {"slope": (112, "f", (0,))},
    "sform a hair apart from the qform": {"s": rows(PLACE + 1e-3 * np.array([[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]))},
}


@pytest.mark.parametrize("symptom", RIGHT)
def test_nifti_is_read_with(tmp_path, tally, symptom):
    found = tally(lambda: read_volume(nifti(tmp_path / "ct.nii", **RIGHT[symptom])))
    np.testing.assert_array_equal(found.array, a_volume().array)
    assert found.spacing_mm == pytest.approx((3, 2, 1))
    if "s" not in RIGHT[symptom] or "q" not in RIGHT[symptom]:
        np.testing.assert_allclose(found.ijk_to_ras, PLACE, atol=2e-3)


def test_nifti_2_is_no_damage(tmp_path, tally):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    nibabel.save(nibabel.Nifti2Image(a_volume().array.T, PLACE), tmp_path / "ct.nii.gz")
    assert "is NIfTI-2, which cannot be read here. Save it as NIfTI-1" in str(tally(lambda: read_volume(tmp_path / "ct.nii.gz")))


def test_nifti_scaled_beyond_float32_is_refused(tmp_path, tally):
    path = nifti(tmp_path / "ct.nii", slope=(112, "f", (3e38,)))
    assert isinstance(tally(lambda: read_volume(path)), UserError)


# --- damage -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, *, random: np.random.Generator, first: int = 0) -> bytes:
    """One to three bytes changed behind `first`."""
    damaged = bytearray(data)
    for at in random.integers(first, len(data), size=random.integers(1, 4)):
        damaged[at] ^= int(random.integers(1, 256))
    return bytes(damaged)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_compressed_file_with_one_changed_byte_is_right_or_refused(tmp_path, tally, capfd, ending):
    random = np.random.default_rng(1)
    array = random.integers(-1000, 1000, (20, 21, 22)).astype(np.int16)
    whole = tmp_path / f"whole{ending}"
    write_volume(Volume(array, PLACE), whole)
    data = whole.read_bytes()
    path = tmp_path / f"ct{ending}"
    for _ in range(60):
        damaged = bytearray(data)
        at = int(random.integers(len(data) // 2, len(data)))  # behind the header
        damaged[at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        found = tally(lambda: read_volume(path))
        if not isinstance(found, UserError):
            np.testing.assert_array_equal(found.array, array, err_msg=f"byte {at} of {len(data)}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha"])
def test_damaged_header_is_read_or_refused(tmp_path, tally, capfd, ending):
    random = np.random.default_rng(2)
    whole = tmp_path / f"whole{ending}"
    write_volume(a_volume(), whole)
    data = whole.read_bytes()
    header = 352 if ending == ".nii" else data.index(b"\n\n") if ending == ".nrrd" else data.index(b"LOCAL")
    path = tmp_path / f"ct{ending}"
    for _ in range(250):
        path.write_bytes(flipped(data[:header], random=random) + data[header:])
        found = tally(lambda: read_volume(path))
        if not isinstance(found, UserError):  # what the changed header says may differ, but is a volume
            assert np.isfinite(found.ijk_to_ras).all() and min(found.shape) > 1 and min(found.spacing_mm) > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_every_truncation_is_refused(tmp_path, tally, capfd, ending):
    whole = tmp_path / f"whole{ending}"
    write_volume(a_volume(), whole)
    data = whole.read_bytes()
    path = tmp_path / f"ct{ending}"
    for length in range(0, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:length])
        assert isinstance(tally(lambda: read_volume(path)), UserError), length
    assert capfd.readouterr() == ("", "")


def nrrd(folder: Path, *, fields: str) -> Path:
    """A raw NRRD with the given lines instead of the usual ones."""
    lines = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "8 7 6", "space directions": "(1,0,0) (0,2,0) (0,0,3)",
        "kinds": "domain domain domain", "endian": "little", "encoding": "raw", "space origin": "(1,2,3)",
    }  # fmt: skip
    for line in fields.split(";"):
        key, _, value = line.partition("=")
        lines[key] = value
    text = "NRRD0004\n" + "".join(f"{key}: {value}\n" for key, value in lines.items() if value) + "\n"
    (folder / "ct.nrrd").write_bytes(text.encode() + a_volume().array.tobytes())
    return folder / "ct.nrrd"


@pytest.mark.parametrize(
    "fields",
    [
        "space origin=(1e30,2,3)", "space origin=(nan,2,3)", "space origin=(inf,2,3)", "space directions=(1e30,0,0) (0,2,0) (0,0,3)",
        "space directions=(1e-30,0,0) (0,2,0) (0,0,3)", "space directions=(nan,0,0) (0,2,0) (0,0,3)", "space directions=(0,0,0) (0,2,0) (0,0,3)",
        "space directions=(1,0,0) (1,0,0) (0,0,3)", "sizes=60000 60000 60000", "sizes=60000 7 6", "sizes=8 7 0", "sizes=8 7 -6", "type=block;block size=8",
        "type=banana", "encoding=banana", "dimension=17", "encoding=gzip", "sizes=8 7 6000000000", "kinds=RGB-color domain domain",
    ],
)  # fmt: skip
def test_nrrd_is_refused_with(tmp_path, tally, capfd, fields):
    error = tally(lambda: read_volume(nrrd(tmp_path, fields=fields)))
    assert isinstance(error, UserError), f"it was read as {error.shape} with {error.ijk_to_ras}"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii.gz"])
def test_every_type_of_voxels_is_right(tmp_path, tally, dtype, ending):
    array = (voxels() % 100).astype(dtype)
    write_volume(Volume(array, PLACE), tmp_path / f"ct{ending}")
    np.testing.assert_array_equal(tally(lambda: read_volume(tmp_path / f"ct{ending}")).array, array)


# --- names and places ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CT.NII.GZ", "CT.NII", "CT.NRRD", "ct.Nii.Gz", "CT.MHA"])
def test_upper_case_ending_is_read_or_named(tmp_path, tally, name):
    write_volume(a_volume(), tmp_path / name.lower())
    os.rename(tmp_path / name.lower(), tmp_path / "hold")
    os.rename(tmp_path / "hold", tmp_path / name)
    found = tally(lambda: read_volume(tmp_path / name))
    if isinstance(found, UserError):
        assert "in small letters only. Rename the file" in str(found)
    else:
        np.testing.assert_array_equal(found.array, a_volume().array)


@pytest.mark.parametrize("name", ["CT.NII.GZ", "CT.Nii", "CT.NRRD", "ct.MHA", "a.b.c.nii.gz", "ü ö.nii.gz", "x" * 248 + ".nii.gz", ".hidden.nrrd"])
def test_output_of_any_name_is_written(tmp_path, tally, name):
    tally(lambda: write_volume(a_volume(), tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    os.rename(
        tmp_path / name,
        tmp_path / (other := "ct" + name[name.lower().rindex(".nii" if ".nii" in name.lower() else name[-5:].lower()[name[-5:].index(".") :]) :].lower()),
    )
    np.testing.assert_array_equal(read_volume(tmp_path / other).array, a_volume().array)


def test_name_that_is_too_long_is_told(tmp_path, tally):
    for name in ("x" * 249 + ".nii.gz", "x" * 5000 + ".nii.gz"):
        assert "cannot be used" in str(tally(lambda: write_volume(a_volume(), tmp_path / name)))
        assert "cannot be used" in str(tally(lambda: read_volume(tmp_path / name)))


def test_name_that_is_not_utf_8_is_told(tmp_path, tally):
    write_volume(a_volume(), tmp_path / "ct.nii.gz")
    name = os.fsdecode(b"\xff\xfe.nii.gz")
    try:
        os.rename(tmp_path / "ct.nii.gz", tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert "not UTF-8. Rename" in str(tally(lambda: read_volume(tmp_path / name)))
    assert "not UTF-8. Rename" in str(tally(lambda: write_volume(a_volume(), tmp_path / os.fsdecode(b"\xff.nrrd"))))


def test_name_with_a_zero_byte_is_told(tmp_path, tally):
    assert "cannot be used" in str(tally(lambda: read_volume(str(tmp_path / "a\0.nii.gz"))))


def test_link_to_itself_is_told(tmp_path, tally):
    (tmp_path / "ct.nii.gz").symlink_to(tmp_path / "ct.nii.gz")
    assert "cannot be used" in str(tally(lambda: read_volume(tmp_path / "ct.nii.gz")))
    assert "cannot be used" in str(tally(lambda: write_volume(a_volume(), tmp_path / "ct.nii.gz")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_pipe_does_not_hang(tmp_path, tally):
    os.mkfifo(tmp_path / "ct.nii.gz")
    ends = []
    thread = threading.Thread(target=lambda: ends.append(tally(lambda: read_volume(tmp_path / "ct.nii.gz"))), daemon=True)
    thread.start()
    thread.join(20)
    assert "is no file, but a device, pipe" in str(ends[0])
    assert "is no file, but a device, pipe" in str(tally(lambda: write_volume(a_volume(), tmp_path / "ct.nii.gz")))


def test_file_that_may_not_be_read_is_told(tmp_path, tally, monkeypatch):
    write_volume(a_volume(), tmp_path / "ct.nrrd")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # tests may run as root
    assert "cannot be read (Permission denied)" in str(tally(lambda: read_volume(tmp_path / "ct.nrrd")))


def test_detached_header_without_its_data_is_told(tmp_path, tally, capfd):
    for ending, data in ((".mhd", ".raw"), (".nhdr", ".raw")):
        sitk.WriteImage(sitk.GetImageFromArray(a_volume().array), str(tmp_path / f"ct{ending}"))
        (tmp_path / f"ct{data}").unlink()
        assert isinstance(tally(lambda: read_volume(tmp_path / f"ct{ending}")), UserError)
    assert capfd.readouterr() == ("", "")


def test_file_replaced_while_it_is_read_is_told(tmp_path, tally):
    path = tmp_path / "ct.nii.gz"
    write_volume(a_volume(), path)
    file = open_volume(path)
    write_volume(Volume(voxels(seed=9), PLACE), path)
    assert "was changed while it was read" in str(tally(file.read))
    path.unlink()
    assert isinstance(tally(file.read), UserError)


def test_volume_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, tally, monkeypatch):
    write_volume(a_volume(), tmp_path / "ct.nrrd")
    monkeypatch.setattr("NMSWSegment.files.volume_checks.available_memory_bytes", lambda: 100)
    file = open_volume(tmp_path / "ct.nrrd")
    assert file.shape == SHAPE and file.bytes_per_voxel == 2
    assert "8 x 7 x 6 voxels.*Crop the volume" in str(error := tally(file.read)) or "Crop the volume" in str(error)
