"""The command line under bad conditions: what was there stays, what is written is whole, and the exit code says which."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

resource = pytest.importorskip("resource", reason="this system has no limits to set")

from NMSWSegment.__main__ import main  # noqa: E402
from NMSWSegment.console import printable  # noqa: E402
from NMSWSegment.engine.segment import segment_volume  # noqa: E402
from NMSWSegment.engine.session import Session  # noqa: E402
from NMSWSegment.files import phantoms  # noqa: E402
from NMSWSegment.files.bundle import list_bundles, load_bundle  # noqa: E402
from NMSWSegment.files.output_file import replaced_together  # noqa: E402
from NMSWSegment.files.volume import Volume, read_volume, write_labelmap, write_volume  # noqa: E402
from NMSWSegment.protocol import SegmentOptions, UserError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def a_case(tmp_path) -> Path:
    """A folder with a small upright phantom as ct.nii.gz."""
    write_volume(a_volume(), tmp_path / "ct.nii.gz")
    return tmp_path


def a_volume() -> Volume:
    """A phantom that is averaged twice along every axis by the tiny bundle."""
    shape = (40, 32, 44)
    volume, _ = phantoms.phantom(shape, ijk_to_ras=phantoms.upright_ijk_to_ras((7.0, 3.0, 3.0), shape))
    return volume


def words(folder: Path, bundle: Path, *more: str, output: str = "labels.nii.gz", source: str = "ct.nii.gz") -> list[str]:
    """Of a quick segmentation."""
    return ["segment", str(folder / source), "-o", str(folder / output), "--bundle", str(bundle), "--device", "cpu", "--threads", "1", "--k", "1", *more]


def names(folder: Path) -> set[str]:
    """Files that are there, hidden ones included."""
    return {path.name for path in folder.iterdir()}


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """A process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "NMSWSegment", *arguments], cwd=ROOT, env=environment, timeout=60, **options)


@contextmanager
def full_disk(num_bytes: int):
    """No file can grow beyond `num_bytes`, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


# --- nothing lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_full_disk_leaves_the_older_volume(tmp_path, tally, ending):
    path = tmp_path / f"ct{ending}"
    write_volume(a_volume(), path)
    before = path.read_bytes()
    for share in (0.0, 0.3, 0.99):
        with full_disk(int(share * len(before))):
            error = tally(lambda: write_volume(a_volume(), path))
        assert isinstance(error, UserError) and "disk is not full" in str(error)
        assert path.read_bytes() == before and names(tmp_path) == {path.name}


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".seg.nrrd"])
def test_full_disk_leaves_the_older_labelmap(tmp_path, tally, ending):
    labels = load_bundle("torso-unet").manifest.labels
    labelmap = Volume(np.random.default_rng(0).integers(0, 4, (20, 20, 20)).astype(np.uint8), np.eye(4))
    path = tmp_path / f"labels{ending}"
    path.write_text("old")
    with full_disk(700):
        error = tally(lambda: write_labelmap(labelmap, path, labels=labels))
    assert isinstance(error, UserError) and "disk is not full" in str(error)
    assert path.read_text(encoding="utf-8") == "old" and names(tmp_path) == {path.name}


@pytest.mark.parametrize("kind", ["statistics", "preview", "patches", "report"])
def test_full_disk_at_a_later_file_leaves_all_older_files(a_case, a_tiny_bundle, capsys, monkeypatch, kind):
    files = {"statistics": "s.csv", "preview": "p.png", "patches": "p.mrk.json", "report": "r.json"}
    for name in ("labels.nii.gz", *files.values()):
        (a_case / name).write_text(f"old {name}")
    more = [word for kind, name in files.items() for word in (f"--{kind}", str(a_case / name))]
    write = {"statistics": "write_statistics", "preview": "write_preview", "patches": "write_patches", "report": "json.dumps"}[kind]

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"NMSWSegment.command_line.{write}", fail)
    assert main(words(a_case, a_tiny_bundle, *more)) == 2
    assert "disk is not full" in capsys.readouterr().err
    assert names(a_case) == {"ct.nii.gz", "labels.nii.gz", *files.values()}
    assert all((a_case / name).read_text(encoding="utf-8") == f"old {name}" for name in ("labels.nii.gz", *files.values()))


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("has_links", [True, False])
def test_set_of_files_that_fails_half_way_restores_the_older_ones(tmp_path, monkeypatch, at, has_links):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
    paths[0].write_text("old a")
    paths[2].write_text("old c")
    calls = []

    def fail_at(source, target, replace=os.replace):
        if not str(source).endswith(".old"):
            calls.append(target)
            if len(calls) == at:
                raise OSError(5, "Input/output error")
        replace(source, target)

    def no_links(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("NMSWSegment.files.output_file.os.replace", fail_at)
    if not has_links:  # FAT, network drives
        monkeypatch.setattr("NMSWSegment.files.output_file.os.link", no_links)
    with pytest.raises(UserError, match="Input/output error"), replaced_together(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == {"a.txt": "old a", "c.txt": "old c"}
    calls += [None] * 9
    with replaced_together(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == dict.fromkeys(("a.txt", "b.txt", "c.txt"), "new")


def test_kill_while_writing_leaves_the_older_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom NMSWSegment.files.output_file import replaced_together\n"
        "with replaced_together([Path(sys.argv[1]), Path(sys.argv[2])]) as (a, b):\n"
        "    a.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    end = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], cwd=ROOT, timeout=60)
    assert end.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old" and not (tmp_path / "b.txt").exists()


def test_temporary_name_cannot_be_foreseen_and_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr("NMSWSegment.files.output_file.secrets.token_hex", lambda count: "0" * 2 * count)
    (tmp_path / f".nmsw-{'0' * 16}.txt").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="File exists"), replaced_together([tmp_path / "a.txt"]) as (temporary,):
        temporary.write_text("over")
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "precious" and not (tmp_path / "a.txt").exists()
    monkeypatch.undo()
    seen = set()
    for _ in range(2):
        with replaced_together([tmp_path / "a.txt"]) as (temporary,):
            seen.add(temporary.name)
    assert len(seen) == 2


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_replaced_output_keeps_its_mode(a_case, a_tiny_bundle, mode):
    (a_case / "labels.nii.gz").write_text("old")
    os.chmod(a_case / "labels.nii.gz", mode)
    assert main(words(a_case, a_tiny_bundle)) == 0
    assert (a_case / "labels.nii.gz").stat().st_mode & 0o777 == mode


def test_new_output_has_the_mode_that_the_person_wants(tmp_path):
    previous = os.umask(0o027)
    try:
        write_volume(a_volume(), tmp_path / "ct.nii.gz")
    finally:
        os.umask(previous)
    assert (tmp_path / "ct.nii.gz").stat().st_mode & 0o777 == 0o640


# --- nothing wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float32, -np.finfo(np.float32).max), (np.float32, 3e38), (np.float64, 1e39), (np.float64, -1e300), (np.int32, -(2**31)), (np.int16, -32768)],
)
def test_extreme_voxels_count_as_the_ends_of_the_intensity_range(a_tiny_bundle, tally, dtype, value):
    bundle = load_bundle(a_tiny_bundle)
    options = SegmentOptions(num_patches=None, device="cpu", threads=1)
    volume = a_volume()
    array = volume.array.astype(dtype)
    array[:, :5], array[20, 20, 20] = value, value
    bounded = Volume(np.clip(array, -1000, 1000).astype(np.float32), volume.ijk_to_ras)
    expected = segment_volume(bounded, bundle, options=options).labelmap.array
    found = tally(lambda: segment_volume(Volume(array, volume.ijk_to_ras), bundle, options=options)).labelmap.array
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) > 2


@pytest.mark.parametrize("modality", ["MR", "PT", "US", "OT"])
def test_volume_of_another_modality_is_refused_unless_forced(tmp_path, a_tiny_bundle, capsys, modality):
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    from hostile import write_slices

    write_slices(tmp_path / "ct", change=lambda found, at: setattr(found, "Modality", modality))
    arguments = words(tmp_path, a_tiny_bundle, source="ct")
    assert main(arguments) == 2
    assert f"is {modality}, but model 'tiny' was trained on CT" in (errors := capsys.readouterr().err) and "--force-modality" in errors
    assert names(tmp_path) == {"ct"}
    assert main([*arguments, "--force-modality"]) == 0


@pytest.mark.parametrize("padding", [None, -2000])
def test_intensities_that_are_no_hounsfield_units_are_refused_unless_forced(a_case, a_tiny_bundle, capsys, padding):
    volume = a_volume()
    array = volume.array.astype(np.int16) + 1024
    if padding is not None:
        array[:, :4] = padding
    write_volume(Volume(array, volume.ijk_to_ras), a_case / "raw.nrrd")
    arguments = words(a_case, a_tiny_bundle, source="raw.nrrd")
    assert main(arguments) == 2
    assert "hardly a CT in Hounsfield units" in (errors := capsys.readouterr().err) and "--force-modality" in errors
    assert main([*arguments, "--force-modality"]) == 0


def test_run_that_needs_more_memory_than_is_free_is_refused_before_the_voxels_are_read(a_case, a_tiny_bundle, capsys, monkeypatch):
    monkeypatch.setattr("NMSWSegment.files.run_checks.available_memory_bytes", lambda: 300_000_000)
    monkeypatch.setattr("NMSWSegment.files.volume.VolumeFile.read", lambda self: pytest.fail("it was read"))
    assert main(words(a_case, a_tiny_bundle)) == 2
    assert "but 0.3 GB are free" in (errors := capsys.readouterr().err) and "--force-memory" in errors


def test_header_of_60000_rows_is_refused_before_memory_is_taken(a_case, a_tiny_bundle, capsys):
    header = "NDims = 3\nDimSize = 60000 60000 400\nElementSpacing = 0.01 0.01 0.1\nElementType = MET_SHORT\nElementDataFile = big.raw\n"
    (a_case / "big.mhd").write_text("ObjectType = Image\n" + header)
    with open(a_case / "big.raw", "wb") as stream:
        stream.truncate(60000 * 60000 * 400 * 2)  # a sparse file, so that the data are not short
    assert main(words(a_case, a_tiny_bundle, source="big.mhd")) == 2
    assert "GB" in capsys.readouterr().err


# --- no traceback, no hang ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["LABELS.NII.GZ", "Labels.Nii", "labels.SEG.NRRD", "x" * 246 + ".nii.gz", "ü ö.nii.gz", "-o.nii.gz", "[bold].nii.gz"])
def test_output_name_works_to_the_end(a_case, a_tiny_bundle, output):
    assert main(words(a_case, a_tiny_bundle, output=output)) == 0
    assert names(a_case) == {"ct.nii.gz", output}


WORDS = [
    "",
    "\0",
    "a\0b",
    "x" * 300,
    "x" * 5000,
    "..",
    "/",
    "~nobody/x",
    "\udcff",
    "\x1b[2J",
    "*",
    "nan",
    "99999999999999999999",
    "cuda:99999999999",
    "cuda:-1",
    "meta",
]


def test_words_that_mean_nothing_are_one_sentence(a_case, a_tiny_bundle, capsys, tally, monkeypatch):
    monkeypatch.setenv("NMSW_BUNDLES", str(a_case / "own"))
    options = ("bundle", "k", "policy", "device", "structures", "threads", "statistics", "preview", "patches", "report", "output")
    for word in WORDS:
        tried = [
            [*words(a_case, a_tiny_bundle), f"--{option}={word}"]
            for option in options
            if (option, word) not in (("structures", ""), ("k", "99999999999999999999"))
        ]
        tried += [["segment", word, "-o", str(a_case / "labels.nii.gz")], [word], ["models", word], ["install", word], ["remove", word]]
        for arguments in tried:
            assert main(arguments) == 2, arguments
            errors = capsys.readouterr().err
            assert len(errors.splitlines()) == 1 and "\x1b" not in errors, errors
            tally.ends["clear errors"] += 1
    assert names(a_case) == {"ct.nii.gz"}


@pytest.mark.parametrize("threads", ["100000", "1025", "-1", "0"])
def test_number_of_threads_that_no_computer_has_is_refused(a_case, a_tiny_bundle, capsys, threads):
    assert main(words(a_case, a_tiny_bundle, f"--threads={threads}")) == 2
    assert "at most 1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(ImportError("libtorch_cpu.so: failed to map segment from shared object"), "PyTorch cannot be loaded"), (MemoryError(), "ran out of memory")],
)
def test_memory_that_is_too_little_for_the_libraries_is_a_sentence(a_case, a_tiny_bundle, capsys, monkeypatch, error, sentence):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "NMSWSegment.engine.segment":
                raise error

    monkeypatch.delitem(sys.modules, "NMSWSegment.engine.segment")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert main(words(a_case, a_tiny_bundle)) == 2
    assert sentence in (errors := capsys.readouterr().err) and len(errors.splitlines()) == 1


def test_output_that_links_to_itself_is_refused(a_case, a_tiny_bundle, capsys):
    (a_case / "labels.nii.gz").symlink_to(a_case / "labels.nii.gz")
    assert main(words(a_case, a_tiny_bundle)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_name_with_markup_is_shown_as_it_is(a_case, a_tiny_bundle, monkeypatch, capsys):
    pytest.importorskip("rich")
    os.rename(a_case / "ct.nii.gz", a_case / "[bold]\x1b[2J.nii.gz")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(words(a_case, a_tiny_bundle, source="[bold]\x1b[2J.nii.gz")) == 0
    assert "\x1b[2J" not in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is full")
def test_models_with_a_full_or_closed_output(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "wb") as full, open(writing, "wb") as pipe:
        ends = [run("models", stdout=stream, stderr=subprocess.PIPE, encoding="utf-8") for stream in (full, pipe)]
    for end in ends:
        assert end.returncode == 2 and "could not be written or printed" in end.stderr and len(end.stderr.splitlines()) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is full")
@pytest.mark.parametrize("redirection", [">/dev/full 2>/dev/full", ">&- 2>&- <&-"], ids=["full", "closed"])
def test_segment_with_a_full_or_closed_output_has_written_its_files(a_case, a_tiny_bundle, redirection):
    command = " ".join(f"'{word}'" for word in [sys.executable, "-m", "NMSWSegment", *words(a_case, a_tiny_bundle)])
    end = subprocess.run(f"{command} {redirection}", shell=True, executable="/bin/bash", cwd=ROOT, timeout=60, capture_output=True, encoding="utf-8")
    assert end.returncode == 0 and "Traceback" not in end.stderr and "bug" not in end.stderr
    assert read_volume(a_case / "labels.nii.gz").array.any()


def test_ctrl_c_while_libraries_are_loaded_is_one_word(tmp_path):
    for library in ("numpy", "SimpleITK"):
        program = (
            "import os, signal, sys\n"
            "class Finder:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name == '{library}':\n            os.kill(os.getpid(), signal.SIGINT)\n"
            "sys.meta_path.insert(0, Finder())\n"
            "from NMSWSegment.__main__ import main\n"
            "sys.exit(main(['models']))\n"
        )
        end = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=60)
        assert (end.returncode, end.stdout, end.stderr) == (130, "", "nmsw: Stopped.\n")


def test_person_without_a_home_and_a_name_sees_the_models(monkeypatch, capsys):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("NMSW_BUNDLES", "XDG_DATA_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    assert "torso-unet" in list_bundles()
    assert main(["models"]) == 0
    monkeypatch.setenv("NMSW_BUNDLES", "~nobody-of-this-name/models")
    assert main(["models"]) == 0
    assert "torso-unet" in capsys.readouterr().out


def test_text_for_a_terminal_that_knows_few_letters(monkeypatch, capsys):
    assert printable("ü\x1b[31m\u202e", None) == "ü\\x1b[31m\\x202e"


# --- the worker and the session -----------------------------------------------------------------------------------


def test_worker_that_is_sent_thousands_of_brackets_answers_and_ends_with_its_input(tmp_path):
    lines = b"[" * 200_000 + b"\n" + b'{"request": ["segment"]}\n' + b'{"request": {}}\n' + b"\xff\xfe\n" + b"null\n"
    program = (
        "import os, sys, threading\nfrom pathlib import Path\nfrom NMSWSegment.engine.worker import Inbox, _event_writer, _read_requests\n"
        "_read_requests(os.fdopen(0, 'rb'), Inbox(), _event_writer(os.fdopen(1, 'wb', buffering=0)), Path(sys.argv[1]))\n"
    )
    (tmp_path / "panel").mkdir()
    end = subprocess.run([sys.executable, "-c", program, str(tmp_path / "panel")], input=lines, cwd=ROOT, capture_output=True, timeout=30)
    events = [json.loads(line) for line in end.stdout.splitlines()]
    assert end.returncode == 0 and end.stderr == b""
    assert [event["kind"] for event in events] == ["bug"] * 5 and all(len(event["details"]) <= 1000 for event in events)
    assert not (tmp_path / "panel").exists()


def test_hundred_warm_runs_keep_the_memory_flat(a_tiny_bundle):
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell")
    bundle, session, volume = load_bundle(a_tiny_bundle), Session(), a_volume()
    sizes = []
    for index in range(100):
        session.run(str(index // 10), volume, bundle=bundle, options=SegmentOptions(num_patches=index % 5, device="cpu", threads=1))
        sizes.append(resident_bytes())
    assert max(sizes[50:]) - sizes[30] < 20_000_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_kill_at_every_stage_leaves_the_older_files(a_case, a_tiny_bundle):
    # One process loads torch; a fork of it is killed at each stage of a run.
    program = (
        "import os, signal, sys\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from contextlib import contextmanager\n"
        "from NMSWSegment import command_line\n"
        "import NMSWSegment.engine.segment\n"
        "seen = []\n"
        "def run(victim):\n"
        "    def kill(progress):\n"
        "        seen.append(progress.stage)\n"
        "        if progress.stage == victim:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
        "    @contextmanager\n"
        "    def progress_bar(**_):\n        yield kill\n"
        "    command_line.progress_bar = progress_bar\n"
        "    return command_line.main(sys.argv[1:])\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    run('')\n"
        "    os.write(write, ' '.join(dict.fromkeys(seen)).encode())\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "stages = os.read(read, 1000).decode().split()\n"
        "for stage in stages:\n"
        "    before = {name: open(os.path.join(os.path.dirname(sys.argv[2]), name), 'rb').read() for name in ('labels.nii.gz', 's.csv')}\n"
        "    if os.fork() == 0:\n        os._exit(run(stage))\n"
        "    _, status = os.wait()\n"
        "    after = {name: open(os.path.join(os.path.dirname(sys.argv[2]), name), 'rb').read() for name in before}\n"
        "    print(stage, os.WTERMSIG(status), before == after, flush=True)\n"
    )
    arguments = words(a_case, a_tiny_bundle, "--statistics", str(a_case / "s.csv"))
    end = subprocess.run([sys.executable, "-c", program, "segment", *arguments[1:]], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=100)
    lines = [line.split() for line in end.stdout.splitlines() if len(line.split()) == 3]
    assert len(lines) >= 6 and all(line[1:] == [str(int(signal.SIGKILL)), "True"] for line in lines), end.stdout + end.stderr
    assert names(a_case) == {"ct.nii.gz", "labels.nii.gz", "s.csv"}
