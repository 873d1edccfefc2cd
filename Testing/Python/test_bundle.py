"""Bundles: what is refused, with the way out, and names for people and for Slicer."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import NMSWSegment.files.bundle as bundle_module
from NMSWSegment.files.bundle import BundleManifest, Code, Label, install_bundle, list_bundles, load_bundle, remove_bundle, user_bundles_folder
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.protocol import UserError


def manifest_values(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def change_manifest(folder: Path, **changes) -> Path:
    (folder / "manifest.json").write_text(json.dumps(manifest_values(folder) | changes))
    return folder


@pytest.fixture
def a_copy(a_tiny_bundle, tmp_path) -> Path:
    """A bundle that a test may damage."""
    return shutil.copytree(a_tiny_bundle, tmp_path / "copy")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch) -> Path:
    """A person's folder that is not the one of whoever runs the tests; it does not exist yet."""
    monkeypatch.setenv("NMSW_BUNDLES", str(tmp_path / "own"))
    return tmp_path / "own"


def test_manifest_comes_back_from_json_unchanged(a_tiny_bundle):
    manifest = replace(
        load_bundle(a_tiny_bundle).manifest,
        labels=coded_labels(["kidney_left", "kidney_right", "something_else"]),
        training={"iterations": 3},
        scores={"case": {"0": {"mean": 0.5}}},
        attributions=("a", "b"),
    )
    assert BundleManifest.from_dict(json.loads(manifest.to_json())) == manifest


def test_manifest_with_the_old_spelling_of_license_is_read(a_tiny_bundle):
    manifest = replace(load_bundle(a_tiny_bundle).manifest, license="CC-BY-4.0")
    values = json.loads(manifest.to_json())
    values["licence"] = values.pop("license")
    assert BundleManifest.from_dict(values) == manifest


def test_manifest_counts_background_as_a_class(a_tiny_bundle):
    manifest = load_bundle(a_tiny_bundle).manifest
    assert manifest.num_classes == 4 and manifest.label_names == ["liver", "spleen", "vertebrae"]
    assert [label.value for label in manifest.labels] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"spacing": [1, 1, 1]}, "Did you mean 'spacing_mm'"),
        ({"format_version": 2}, "Update NMSWSegment or export the bundle again"),
        ({"class_weights": [0.0, 0.0]}, "2 class weights for 4 classes. Export the bundle again"),
        ({"intensity_points": [[0, 0, 1]]}, "'intensity_points' of the bundle manifest.*Export the bundle again"),
        ({"patch_size": 16}, "'patch_size' of the bundle manifest is 16, but must be a list of 3 values. Export the bundle again"),
    ],
)
def test_manifest_with_a_bad_value_says_what_to_do(a_tiny_bundle, change, fix):
    with pytest.raises(UserError, match=fix):
        BundleManifest.from_dict(manifest_values(a_tiny_bundle) | change)


@pytest.mark.parametrize("key", ["labels", "spacing_mm", "sha256", "architecture", "name"])
def test_manifest_without_a_key_names_it(a_tiny_bundle, key):
    values = manifest_values(a_tiny_bundle)
    del values[key]
    with pytest.raises(UserError, match=f"{key}.*Export the bundle again"):
        BundleManifest.from_dict(values)


@pytest.mark.parametrize(("change", "fix"), [({"colour": [1, 2, 3]}, "Did you mean 'color'"), ({"type": {"scheme": "SCT"}}, "Export the bundle again")])
def test_manifest_with_a_bad_label_says_what_to_do(a_tiny_bundle, change, fix):
    values = manifest_values(a_tiny_bundle)
    values["labels"][1] |= change
    with pytest.raises(UserError, match=fix):
        BundleManifest.from_dict(values)


def test_load_gives_the_folder_and_the_hash_of_the_manifest(a_copy):
    bundle = load_bundle(a_copy)
    assert bundle.folder == a_copy.resolve() and bundle.coarse_path.is_file() and bundle.local_path.is_file()
    assert bundle.sha256 == bundle_module.file_sha256(a_copy / "manifest.json")


def test_load_changed_file_is_refused_by_name(a_copy):
    archive = a_copy / "local.pt"
    content = bytearray(archive.read_bytes())
    content[len(content) // 2] ^= 1
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"'local\.pt' of bundle 'tiny' was changed.*Install the bundle again"):
        load_bundle(a_copy)


def test_load_missing_file_is_refused_by_name(a_copy):
    (a_copy / "coarse.pt").unlink()
    with pytest.raises(UserError, match=r"lacks the file 'coarse\.pt'. Install the bundle again"):
        load_bundle(a_copy)


def test_load_broken_manifest_says_so(a_copy):
    (a_copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON.*Install the bundle again"):
        load_bundle(a_copy)


def test_load_folder_without_manifest_says_which_folder_to_give(tmp_path):
    with pytest.raises(UserError, match="is not a bundle.*Give the folder that 'nmsw export' wrote"):
        load_bundle(tmp_path)


def test_load_by_name_finds_installed_bundles_and_lists_them(a_tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "BUNDLES_FOLDER", tmp_path)
    for name in ("torso-b", "torso-a"):
        shutil.copytree(a_tiny_bundle, tmp_path / name)
    (tmp_path / "no-bundle").mkdir()
    assert list_bundles(tmp_path) == ["torso-a", "torso-b"]
    assert load_bundle("torso-b").folder == (tmp_path / "torso-b").resolve()
    with pytest.raises(UserError, match="Did you mean 'torso-.'.*Choose from: torso-a, torso-b.*A folder that 'nmsw export' wrote works too"):
        load_bundle("torso-c")


def test_list_without_any_bundle_is_empty(tmp_path):
    assert list_bundles(tmp_path / "nothing") == []


def test_load_net_that_the_manifest_does_not_vouch_for_is_refused(a_copy):
    hashes = manifest_values(a_copy)["sha256"]
    del hashes["local.pt"]
    with pytest.raises(UserError, match=r"'local\.pt' belongs to it. Export the bundle again"):
        load_bundle(change_manifest(a_copy, sha256=hashes))


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "sub/file", "..\\outside.txt"])
def test_load_never_reads_outside_the_folder(a_copy, name):
    (a_copy.parent / "outside.txt").write_text("secret")
    hashes = manifest_values(a_copy)["sha256"] | {name: "0" * 64}
    with pytest.raises(UserError, match="does not say which .* Export the bundle again"):
        load_bundle(change_manifest(a_copy, sha256=hashes))


def test_load_unreadable_file_says_so(a_copy, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(bundle_module, "file_sha256", refuse)
    with pytest.raises(UserError, match=r"could not be read \(Permission denied\). Check .* that you may use the folder"):
        load_bundle(a_copy)


def test_load_manifest_that_is_a_list_says_so(a_copy):
    (a_copy / "manifest.json").write_text("[1]")
    with pytest.raises(UserError, match="is not the manifest of a bundle. Install the bundle again"):
        load_bundle(a_copy)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("win32", {"LOCALAPPDATA": "/profile/Local"}, "/profile/Local/NMSWSegment/Bundles"),
        ("win32", {}, "/home/a person/AppData/Local/NMSWSegment/Bundles"),
        ("darwin", {}, "/home/a person/Library/Application Support/NMSWSegment/Bundles"),
        ("linux", {}, "/home/a person/.local/share/NMSWSegment/Bundles"),
        ("linux", {"XDG_DATA_HOME": "/data"}, "/data/NMSWSegment/Bundles"),
        ("linux", {"NMSW_BUNDLES": "/shared/models"}, "/shared/models"),
        ("linux", {"NMSW_BUNDLES": ""}, "/home/a person/.local/share/NMSWSegment/Bundles"),
    ],
)
def test_own_folder_is_where_the_platform_keeps_data(monkeypatch, platform, variables, expected):
    for name in ("NMSW_BUNDLES", "LOCALAPPDATA", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bundle_module.sys, "platform", platform)
    monkeypatch.setattr(bundle_module.Path, "home", lambda: Path("/home/a person"))
    assert user_bundles_folder() == Path(expected)


def test_install_copies_under_the_own_name_and_keeps_extra_files(a_copy, own_folder):
    (a_copy / "MODEL_CARD.md").write_text("for people")
    (a_copy / "pictures").mkdir()
    (a_copy / "pictures" / "overlay.png").write_bytes(b"\x89PNG")
    (a_copy / "coarse.pt").chmod(0o444)
    bundle = install_bundle(a_copy)
    assert bundle.folder == (own_folder / "tiny").resolve() and bundle.sha256 == load_bundle(a_copy).sha256
    kept = {path.relative_to(bundle.folder).as_posix(): path.read_bytes() for path in bundle.folder.rglob("*") if path.is_file()}
    assert kept == {path.relative_to(a_copy).as_posix(): path.read_bytes() for path in a_copy.rglob("*") if path.is_file()}
    assert bundle.coarse_path.stat().st_mode & 0o200  # can be removed again
    assert [path.name for path in own_folder.iterdir()] == ["tiny"]


def test_installed_bundle_is_found_by_name_beside_the_packaged_ones(a_copy, own_folder):
    packaged = list_bundles()
    install_bundle(a_copy)
    assert list_bundles() == sorted([*packaged, "tiny"]) and list_bundles(own_folder) == ["tiny"]
    assert load_bundle("tiny").folder == (own_folder / "tiny").resolve()
    assert load_bundle(packaged[0]).folder == (bundle_module.BUNDLES_FOLDER / packaged[0]).resolve()


def test_packaged_bundle_wins_over_an_own_folder_of_its_name(a_copy, own_folder):
    name = list_bundles(bundle_module.BUNDLES_FOLDER)[0]
    shutil.copytree(a_copy, own_folder / name)
    assert load_bundle(name).folder == (bundle_module.BUNDLES_FOLDER / name).resolve()
    assert list_bundles().count(name) == 1


def test_install_into_a_chosen_folder(a_copy, own_folder, tmp_path):
    assert install_bundle(a_copy, folder=tmp_path / "elsewhere").folder == (tmp_path / "elsewhere" / "tiny").resolve()
    assert not own_folder.exists()


def test_install_twice_is_refused_unless_told_to_replace(a_copy, own_folder):
    install_bundle(a_copy)
    (own_folder / "tiny" / "old.txt").write_text("of the old one")
    change_manifest(a_copy, title="Newer")
    with pytest.raises(UserError, match="'tiny' is installed already.*Remove it first"):
        install_bundle(a_copy)
    assert load_bundle("tiny").manifest.title == "Tiny"
    assert install_bundle(a_copy, replace=True).manifest.title == "Newer"
    assert not (own_folder / "tiny" / "old.txt").exists()
    assert [path.name for path in own_folder.iterdir()] == ["tiny"]


def test_install_over_itself_keeps_it(a_copy, own_folder):
    install_bundle(a_copy)
    assert install_bundle(own_folder / "tiny", replace=True).manifest.name == "tiny"
    assert [path.name for path in own_folder.iterdir()] == ["tiny"]


@pytest.mark.parametrize("replace_it", [False, True])
def test_install_never_takes_the_place_of_something_else(a_copy, own_folder, replace_it):
    (own_folder / "tiny").mkdir(parents=True)
    (own_folder / "tiny" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="Remove it first"):
        install_bundle(a_copy, replace=replace_it)
    assert (own_folder / "tiny" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_install_under_the_name_of_a_packaged_bundle_is_refused(a_copy, own_folder):
    name = list_bundles(bundle_module.BUNDLES_FOLDER)[0]
    for taken in (name, name.upper()):
        with pytest.raises(UserError, match="comes with the program. Export yours under another name"):
            install_bundle(change_manifest(a_copy, name=taken), replace=True)
    assert not own_folder.exists()


def test_install_name_that_differs_only_in_case_is_refused(a_copy, own_folder):
    install_bundle(a_copy)
    with pytest.raises(UserError, match="'tiny' is installed already"):
        install_bundle(change_manifest(a_copy, name="Tiny"), replace=True)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/tmp/evil", "a/b", "a\\b", "C:evil", "..", ".", ".hidden", "", "a?", "a*", "nul", "COM1.txt", "end.", "end ", "tab\t", "x" * 65, 7, None],
)
def test_install_name_that_is_no_file_name_is_refused(a_copy, own_folder, name):
    with pytest.raises(UserError, match="no file name on every computer. Export it to a folder named with letters|'name' of the bundle manifest"):
        install_bundle(change_manifest(a_copy, name=name))
    assert not own_folder.exists() and sorted(path.name for path in a_copy.parent.iterdir()) == ["copy"]


@pytest.mark.parametrize("name", ["torso-unet_2", "Kopf Hals", "größe", "v1.5", "nullable"])
def test_install_name_that_people_use_is_accepted(a_copy, own_folder, name):
    assert install_bundle(change_manifest(a_copy, name=name)).folder.name == name
    assert load_bundle(name).manifest.name == name


def test_install_damaged_bundle_leaves_nothing(a_copy, own_folder):
    (a_copy / "local.pt").write_bytes(b"other")
    with pytest.raises(UserError, match=r"'local\.pt' of bundle 'tiny' was changed"):
        install_bundle(a_copy)
    assert not own_folder.exists()


@pytest.mark.parametrize(("name", "fix"), [("nothing", "Give the folder that 'nmsw export' wrote"), ("empty", "is not a bundle.*Give the folder")])
def test_install_source_that_is_no_bundle_says_what_to_give(tmp_path, name, fix):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=fix):
        install_bundle(tmp_path / name)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_install_that_stops_half_way_leaves_nothing_and_what_was_there(a_copy, own_folder, monkeypatch, error):
    install_bundle(a_copy)
    before = {path: path.read_bytes() for path in own_folder.rglob("*") if path.is_file()}
    copied = []

    def copy_one_then_fail(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[: 7 if copied else None])
        if copied:
            raise error
        copied.append(target)

    monkeypatch.setattr(bundle_module.shutil, "copyfile", copy_one_then_fail)
    with pytest.raises((UserError, KeyboardInterrupt), match="disk is not full|^$"):
        install_bundle(a_copy, replace=True)
    assert {path: path.read_bytes() for path in own_folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in own_folder.iterdir()] == ["tiny"]


def test_install_whose_copy_is_not_what_was_read_is_refused(a_copy, own_folder, monkeypatch):
    monkeypatch.setattr(bundle_module.shutil, "copyfile", lambda source, target: Path(target).write_bytes(Path(source).read_bytes()[:-1]))
    with pytest.raises(UserError, match="Install the bundle again|is not JSON"):
        install_bundle(a_copy)
    assert list(own_folder.iterdir()) == []


def test_install_that_cannot_take_its_place_brings_the_old_one_back(a_copy, own_folder, monkeypatch):
    install_bundle(a_copy)
    real_replace = os.replace

    def refuse_the_new_one(source, target):
        if Path(source).name.endswith(".installing"):
            raise PermissionError(13, "Permission denied")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_new_one)
    with pytest.raises(UserError, match="could not be installed.*no other program has its files open"):
        install_bundle(change_manifest(a_copy, title="Newer"), replace=True)
    assert load_bundle("tiny").manifest.title == "Tiny" and [path.name for path in own_folder.iterdir()] == ["tiny"]


def test_install_goes_on_where_an_earlier_one_crashed(a_copy, own_folder):
    for leftover in (".tiny.installing", ".tiny.removed"):
        shutil.copytree(a_copy, own_folder / leftover)
        (own_folder / leftover / "leftover.txt").write_text("old")
    assert list_bundles(own_folder) == []
    install_bundle(a_copy)
    install_bundle(a_copy, replace=True)
    assert [path.name for path in own_folder.iterdir()] == ["tiny"] and not (own_folder / "tiny" / "leftover.txt").exists()


def test_install_where_the_folder_is_a_file_says_so(a_copy, own_folder):
    own_folder.write_text("in the way")
    with pytest.raises(UserError, match="could not be installed in .*Check .* that you may use the folder"):
        install_bundle(a_copy)
    assert own_folder.read_text(encoding="utf-8") == "in the way"


def test_install_copies_links_as_files(a_copy, own_folder, can_link):
    (a_copy / "blob").write_bytes((a_copy / "local.pt").read_bytes())
    (a_copy / "local.pt").unlink()
    (a_copy / "local.pt").symlink_to("blob")
    bundle = install_bundle(a_copy)
    assert bundle.local_path.is_file() and not bundle.local_path.is_symlink()


@pytest.mark.parametrize("target", ["../outside.txt", "..", ".", "missing"])
def test_install_link_that_leads_out_is_refused(a_copy, own_folder, can_link, target):
    (a_copy.parent / "outside.txt").write_text("secret")
    (a_copy / "extra").symlink_to(target)
    with pytest.raises(UserError, match="extra' is no file of the bundle.*Put the file itself there, or remove the link"):
        install_bundle(a_copy)
    assert not own_folder.exists()


def test_install_from_a_link_to_the_folder_works(a_copy, own_folder, tmp_path, can_link):
    (tmp_path / "shortcut").symlink_to(a_copy)
    assert install_bundle(tmp_path / "shortcut").folder == (own_folder / "tiny").resolve()


def test_remove_deletes_an_own_bundle_only(a_copy, own_folder):
    install_bundle(a_copy)
    remove_bundle("tiny")
    assert list(own_folder.iterdir()) == []
    with pytest.raises(UserError, match="Unknown bundle of your own 'tiny'"):
        remove_bundle("tiny")


def test_remove_packaged_bundle_is_refused(own_folder):
    name = list_bundles(bundle_module.BUNDLES_FOLDER)[0]
    for folder in (None, bundle_module.BUNDLES_FOLDER):
        with pytest.raises(UserError, match="comes with the program and stays"):
            remove_bundle(name, folder=folder)
    assert load_bundle(name)


@pytest.mark.parametrize("name", ["../copy", ".", "..", "", "thesis"])
def test_remove_never_deletes_what_is_no_own_bundle(a_copy, own_folder, name):
    (own_folder / "thesis").mkdir(parents=True)
    (own_folder / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="Unknown bundle of your own"):
        remove_bundle(name)
    assert (own_folder / "thesis" / "thesis.txt").exists() and load_bundle(a_copy)


def test_remove_link_leaves_what_it_leads_to(a_copy, own_folder, can_link):
    own_folder.mkdir()
    (own_folder / "tiny").symlink_to(a_copy)
    remove_bundle("tiny")
    assert list(own_folder.iterdir()) == [] and load_bundle(a_copy)


def test_remove_that_is_refused_says_so_and_keeps_it(a_copy, own_folder, monkeypatch):
    install_bundle(a_copy)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(bundle_module.os, "replace", refuse)
    with pytest.raises(UserError, match="could not be removed.*no other program has its files open"):
        remove_bundle("tiny")
    assert load_bundle("tiny")


@pytest.mark.parametrize(
    ("name", "title"), [("kidney_right", "right kidney"), ("lung_upper_lobe_left", "left lung upper lobe"), ("liver", "liver"), ("left_atrium", "left atrium")]
)
def test_label_title_is_for_a_person(name, title):
    assert replace(coded_labels(["liver"])[0], name=name).title == title


def test_label_terminology_is_what_slicer_writes():
    organ, kidney, right = Code("SCT", "123037004", "Anatomical Structure"), Code("SCT", "64033007", "Kidney"), Code("SCT", "24028007", "Right")
    label = Label(value=1, name="kidney_right", color=(1, 2, 3), category=organ, type=kidney, modifier=right)
    start = "Segmentation category and type - DICOM master list~SCT^123037004^Anatomical Structure~SCT^64033007^Kidney~"
    end = "~Anatomic codes - DICOM master list~^^~^^"
    assert label.terminology == f"{start}SCT^24028007^Right{end}"
    assert replace(label, modifier=None).terminology == f"{start}^^{end}"
