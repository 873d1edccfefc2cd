"""NIfTI, NRRD and MetaImage files as they should not be: the right volume, or one sentence that says what to do."""

import gzip
import os
import struct
import sys
import threading
import zlib
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
    "vox_offset within the header": ({"offset": (108, "f", (100,))}, "begin at byte 100 .vox_offset., which is within its header"),
    "vox_offset 0": ({"offset": (108, "f", (0,))}, "begin at byte 0 .vox_offset., which is within its header"),
    "vox_offset 348": ({"offset": (108, "f", (348,))}, "begin at byte 348 .vox_offset., which is within its header"),
    "slope 0 with an intercept": ({"slope": (112, "2f", (0, -1024))}, "scl_slope is 0 but scl_inter -1024.*set scl_slope to 1"),
    "voxels of 999 mm": (
        {"s": rows(np.diag([999.0, 999, 999, 1])), "pixdim": (80, "3f", (999,) * 3), "q": NO_QFORM},
        "999 x 999 x 999 mm large; 0.0001 to 100",
    ),
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


@pytest.mark.parametrize("tail", [b"", b"\0" * 700])
def test_nifti_padded_behind_its_compressed_voxels_is_read(tmp_path, tally, tail):
    path = nifti(tmp_path / "ct.nii.gz")
    path.write_bytes(path.read_bytes() + tail)
    np.testing.assert_array_equal(tally(lambda: read_volume(path)).array, a_volume().array)


def test_nifti_with_garbage_behind_its_compressed_voxels_is_not_called_damaged(tmp_path, tally):
    path = nifti(tmp_path / "ct.nii.gz")
    path.write_bytes(path.read_bytes() + b"garbage" * 50)
    assert "goes on behind its compressed voxels with something that is not gzip" in str(tally(lambda: read_volume(path)))


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


RAST = "dimension=4;sizes=8 7 6 1;space directions=(1,0,0,0) (0,2,0,0) (0,0,3,0) (0,0,0,1);space origin=(1,2,3,0);kinds=domain domain domain time;space="
NO_SPACE = ";space=;space directions=;space origin="


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (RAST + "right-anterior-superior-time", "space 'right-anterior-superior-time', which cannot be read here. Save one time point"),
        (RAST + "LAST", "space 'LAST', which cannot be read here"),
        ('space units="cm" "cm" "cm"', "gives lengths in 'cm', but millimeters are needed"),
        ('space units="m" "m" "m"', "gives lengths in 'm', but millimeters are needed"),
        ('spacings=1 2 3;units="mm" "mm" "cm"' + NO_SPACE, "gives lengths in 'cm'"),
        ("kinds=" + NO_SPACE, "does not say how large its voxels are. Add 'space directions' or 'spacings'"),
        ("spacings=nan nan nan" + NO_SPACE, "does not say how large its voxels are"),
        ("encoding=bzip2", "compressed with bzip2, which cannot be read here. Save it with the encoding gzip or raw"),
    ],
)  # fmt: skip
def test_nrrd_is_refused_with_the_reason(tmp_path, tally, capfd, fields, sentence):
    assert sentence in str(tally(lambda: read_volume(nrrd(tmp_path, fields=fields))))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "fields",
    [
        'space units="mm" "mm" "mm"', 'space units="" "" ""', 'space units="MM" "Millimeters" "???"', "spacings=1 2 3;kinds=domain domain domain" + NO_SPACE,
        RAST + "left-posterior-superior-time;space units=\"mm\" \"mm\" \"mm\" \"s\"",
        "dimension=4;sizes=1 8 7 6;space directions=none (1,0,0) (0,2,0) (0,0,3);kinds=list domain domain domain",
    ],
)  # fmt: skip
def test_nrrd_in_millimeters_is_read_with(tmp_path, tally, fields):
    found = tally(lambda: read_volume(nrrd(tmp_path, fields=fields)))
    np.testing.assert_array_equal(found.array, a_volume().array)
    np.testing.assert_allclose(np.abs(np.diag(found.ijk_to_ras)), (1, 2, 3, 1))


@pytest.mark.parametrize("cut", [0, 9])
def test_nrrd_of_two_gzip_streams_is_right_or_refused(tmp_path, tally, cut):
    path = nrrd(tmp_path, fields="encoding=gzip")
    data = a_volume().array.tobytes()
    header = path.read_bytes()[: -len(data)].rstrip(b"\n") + b"\nencoding:=a key of somebody\n\n"
    path.write_bytes(header + gzip.compress(data[:300]) + gzip.compress(data[300:])[: -cut or None])
    found = tally(lambda: read_volume(path))
    if cut:
        assert "damaged" in str(found)
    else:
        np.testing.assert_array_equal(found.array, a_volume().array)


# --- voxels of MetaImage that are elsewhere, or too few -------------------------------------------------------------


def meta_image(folder: Path, data_file: str, *, fields: str = "", data: bytes = b"") -> Path:
    """A header with the given last line, and what follows it; raw slices s0.raw to s5.raw lie beside it."""
    lines = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "Offset": "1 2 3", "ElementSpacing": "1 2 3", "DimSize": "8 7 6", "ElementType": "MET_SHORT",
    }  # fmt: skip
    for field in filter(None, fields.split(";")):
        key, _, value = field.partition("=")
        lines[key] = value
    text = "".join(f"{key} = {value}\n" for key, value in lines.items() if value) + f"ElementDataFile = {data_file}"
    for index, plane in enumerate(a_volume().array):
        (folder / f"s{index}.raw").write_bytes(plane.tobytes())
    path = folder / ("ct.mha" if data_file == "LOCAL\n" else "ct.mhd")
    path.write_bytes(text.encode() + data)
    return path


def compressed(data: bytes) -> tuple[str, bytes]:
    """Fields and stream."""
    stream = zlib.compress(data)
    return f"CompressedData=True;CompressedDataSize={len(stream)}", stream


NAMES = [f"s{index}.raw" for index in range(6)]


@pytest.mark.parametrize("file", ["LOCAL\n", "ct.zraw\n"])
@pytest.mark.parametrize("size", ["right", "missing", "too small"])
@pytest.mark.parametrize("share", [0.5, 1, 2])
def test_meta_image_with_a_stream_of_half_the_voxels_is_refused(tmp_path, tally, capfd, file, size, share):
    data = a_volume().array.tobytes()
    fields, stream = compressed((data * 2)[: int(len(data) * share)])
    fields = {"right": fields, "missing": "CompressedData=True", "too small": "CompressedData=True;CompressedDataSize=100"}[size]
    (tmp_path / "ct.zraw").write_bytes(stream)
    found = tally(lambda: read_volume(meta_image(tmp_path, file, fields=fields, data=stream if file == "LOCAL\n" else b"")))
    if share < 1 or size == "too small" or (size == "missing" and file == "LOCAL\n"):
        sentence = "CompressedDataSize.*Write it again" if size == "missing" and file == "LOCAL\n" else "damaged, incomplete"
        with pytest.raises(UserError, match=sentence):
            raise found
    else:
        np.testing.assert_array_equal(found.array, a_volume().array)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", ["0", "-5", "x"])
def test_meta_image_with_a_senseless_size_of_its_stream_is_refused(tmp_path, tally, size):
    data = zlib.compress(a_volume().array.tobytes())
    path = meta_image(tmp_path, "LOCAL\n", fields=f"CompressedData=1;CompressedDataSize={size}", data=data)
    assert "does not say how many bytes its compressed voxels are (CompressedDataSize)" in str(tally(lambda: read_volume(path)))


@pytest.mark.parametrize(
    "files",
    [
        "LIST\n" + "\n".join(NAMES) + "\n", "LIST 2\r\n" + "\r\n".join(NAMES) + "\r\n", "s%d.raw 0 5 1\n", "s%01d.raw 0\n", "LIST\n" + "\n".join(NAMES) + "\n\n",
        "./s%d.raw 0 5 1",
    ],
)  # fmt: skip
def test_meta_image_of_a_file_for_each_slice_is_right(tmp_path, tally, files):
    found = tally(lambda: read_volume(meta_image(tmp_path, files)))
    np.testing.assert_array_equal(found.array, a_volume().array)
    assert found.spacing_mm == (3, 2, 1)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ("LIST\n" + "\n".join(NAMES[:5]) + "\n", "has 6 slices but names 5 files"),
        ("LIST\n" + "\n".join(NAMES), "has 6 slices but names 5 files. Export it again with all its files; in a list, the last name needs a line break"),  # ITK passes over the last
        ("LIST\n", "has 6 slices but names 0 files"),
        ("LIST 3\ns0.raw\n", "cannot be read here. Give one number such as %03d"),
        ("LIST\n" + "\n".join([*NAMES[:5], "none.raw"]) + "\n", "in the file 'none.raw', which is not there"),
        ("s%d.raw 0 4 1\n", "has 6 slices but names 5 files"),
        ("s%d.raw 0 10 2\n", "in the file 's6.raw', which is not there"),
        ("s%d.raw 0 5\n", "cannot be read here. Give one number such as %03d"),  # a division by zero in ITK
        ("s%d.raw 0 5 0\n", "cannot be read here. Give one number such as %03d"),
        ("s%d.raw 5 0 -1\n", "cannot be read here. Give one number such as %03d"),
        ("s%d.raw 0 5 1 2\n", "cannot be read here. Give one number such as %03d"),
        ("s%s%s%n.raw 0 5 1\n", "cannot be read here. Give one number such as %03d"),  # ITK crashes
        ("s%d%s.raw 0 5 1\n", "cannot be read here. Give one number such as %03d"),
        ("s%99999999d.raw 0 5 1\n", "cannot be read here. Give one number such as %03d"),
        ("x" * 5000 + "\n", "x', which is not there"),
        ("s%%.raw 0 5 1\n", "cannot be read here. Give one number such as %03d"),
        ("none.raw\n", "in the file 'none.raw', which is not there"),
        (".\n", "is no file, but a folder, device, pipe"),
        pytest.param("/dev/zero\n", "is no file, but a folder, device, pipe", marks=pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no such device")),
    ],
)  # fmt: skip
def test_meta_image_of_other_files_than_slices_is_refused(tmp_path, tally, capfd, files, sentence):
    assert sentence in str(tally(lambda: read_volume(meta_image(tmp_path, files))))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("ElementSpacing=", "does not say how large its voxels are. Add 'ElementSpacing'"),
        ("DistanceUnits=cm", "gives lengths in 'cm', but millimeters are needed"),
        ("CompressedData=True", "compressed voxels of 'ct.mhd' are in several files"),
        ("CompressedData=True;CompressedDataSize=99;HeaderSize=-1", "gives a HeaderSize of -1, but its voxels do not begin there"),
        ("ElementToIntensityFunctionSlope=2", "gives the ElementToIntensityFunctionSlope 2, which is not applied here"),
        ("ElementToIntensityFunctionOffset=-1024", "gives the ElementToIntensityFunctionOffset -1024, which is not applied here"),
    ],
)
def test_meta_image_is_refused_with_the_reason(tmp_path, tally, fields, sentence):
    assert sentence in str(tally(lambda: read_volume(meta_image(tmp_path, "s%d.raw 0 5 1\n", fields=fields))))


@pytest.mark.parametrize("header_size", [0, -1, 50])
def test_meta_image_whose_voxels_would_begin_within_its_header_is_refused(tmp_path, tally, header_size):
    path = meta_image(tmp_path, "LOCAL\n", fields=f"HeaderSize={header_size}", data=a_volume().array.tobytes())
    found = tally(lambda: read_volume(path))
    if header_size > 0:
        assert "gives a HeaderSize of 50, but its voxels do not begin there" in str(found)
    else:
        np.testing.assert_array_equal(found.array, a_volume().array)


@pytest.mark.parametrize("fields", ["DistanceUnits=mm", "DistanceUnits=?", "ElementSpacing=;ElementSize=1 2 3"])
def test_meta_image_in_millimeters_is_read_with(tmp_path, tally, fields):
    found = tally(lambda: read_volume(meta_image(tmp_path, "s%d.raw 0 5 1\n", fields=fields)))
    np.testing.assert_array_equal(found.array, a_volume().array)
    assert found.spacing_mm == (3, 2, 1)


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


@pytest.mark.skipif(sys.platform == "win32", reason="names are UTF-16 there")
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


def test_link_to_itself_is_told(tmp_path, tally, can_link):
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_header_that_names_a_pipe_does_not_hang(tmp_path, tally, ending):
    sitk.WriteImage(sitk.GetImageFromArray(a_volume().array), str(tmp_path / f"ct{ending}"))
    (tmp_path / "ct.raw").unlink()
    os.mkfifo(tmp_path / "ct.raw")
    ends = []
    thread = threading.Thread(target=lambda: ends.append(tally(lambda: read_volume(tmp_path / f"ct{ending}"))), daemon=True)
    thread.start()
    thread.join(20)
    assert "is no file, but a folder, device, pipe" in str(ends[0])


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_compressed_file_beside_its_header_is_right_or_refused(tmp_path, tally, ending):
    sitk.WriteImage(sitk.GetImageFromArray(a_volume().array), str(tmp_path / f"ct{ending}"), useCompression=True)
    np.testing.assert_array_equal(tally(lambda: read_volume(tmp_path / f"ct{ending}")).array, a_volume().array)
    data = next(path for path in tmp_path.iterdir() if path.suffix != ending)
    data.write_bytes(data.read_bytes()[:-5])
    assert "damaged" in str(tally(lambda: read_volume(tmp_path / f"ct{ending}")))


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
