"""The packaged bundles on the packaged volume: anatomy in its place, in world coordinates."""

import zipfile

import numpy as np
import pytest
from conftest import ROOT

from NMSWSegment.engine.segment import segment_volume
from NMSWSegment.files.bundle import BUNDLES_FOLDER, list_bundles, load_bundle
from NMSWSegment.files.statistics import structure_statistics
from NMSWSegment.files.volume import Volume, read_volume
from NMSWSegment.nets.backbones import BACKBONES
from NMSWSegment.panel.messages import model_summary
from NMSWSegment.protocol import SegmentOptions

SAMPLE = ROOT / "Resources" / "SampleData" / "cptac_pda_3mm.nii.gz"


@pytest.fixture(scope="module", params=list_bundles(BUNDLES_FOLDER))
def bundle(request):
    return load_bundle(request.param)


def statistics(volume, bundle, **options) -> dict[str, dict]:
    """Rows of the statistics table by structure."""
    result = segment_volume(volume, bundle, options=SegmentOptions(device="cpu", **options))
    return {row.structure: row.to_dict() for row in structure_statistics(result.labelmap, volume, labels=bundle.manifest.labels)}


def center_ras(row: dict) -> np.ndarray:
    return np.array([row[f"center_{axis}_mm"] for axis in "ras"])


def test_sample_shows_a_torso_with_left_and_right_in_place(bundle):
    rows = statistics(read_volume(SAMPLE), bundle, num_patches=3)
    # What a radiologist would call plausible for an adult, not a reference segmentation.
    for name, low_ml, high_ml in (("lung_right", 1500, 3000), ("lung_left", 1300, 2700), ("liver", 1000, 1900), ("spleen", 150, 450), ("heart", 350, 1000)):
        assert low_ml < rows[name]["volume_ml"] < high_ml, name
    r, a, s = 0, 1, 2
    centers = {name: center_ras(row) for name, row in rows.items() if row["voxels"]}
    assert centers["lung_right"][r] > centers["heart"][r] > centers["lung_left"][r]
    assert centers["liver"][r] > centers["vertebrae"][r] > centers["spleen"][r]
    assert centers["kidney_right"][r] > centers["vertebrae"][r] > centers["kidney_left"][r]
    assert centers["sternum"][a] > centers["heart"][a] > centers["vertebrae"][a]
    assert min(centers["lung_right"][s], centers["lung_left"][s]) > centers["liver"][s] > centers["kidney_right"][s]


def test_mirrored_storage_order_gives_the_same_anatomy(bundle):
    volume = read_volume(SAMPLE)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[:2, 3] = volume.shape[2] - 1, volume.shape[1] - 1
    stored_lps = Volume(array=np.ascontiguousarray(volume.array[:, ::-1, ::-1]), ijk_to_ras=volume.ijk_to_ras @ flip)
    options = SegmentOptions(device="cpu", num_patches=1)
    upright = segment_volume(volume, bundle, options=options).labelmap.array
    mirrored = segment_volume(stored_lps, bundle, options=options).labelmap.array
    assert np.array_equal(mirrored[:, ::-1, ::-1], upright)


def test_patches_raise_the_mean_held_out_score_and_lower_none_by_much(bundle):
    gains = np.array([[by_k[k]["mean"] - by_k["0"]["mean"] for k in ("5", "10")] for by_k in bundle.manifest.scores.values()])
    assert gains.mean(0).min() > 0.01 and gains.min() > -0.005


def test_archives_name_no_folder_of_the_computer_that_exported_them(bundle):
    for name in ("coarse.pt", "local.pt"):
        with zipfile.ZipFile(bundle.folder / name) as archive:
            assert not any(b"site-packages" in archive.read(record) for record in archive.namelist())


def test_every_backbone_is_packaged():
    assert {load_bundle(name).manifest.backbone for name in list_bundles(BUNDLES_FOLDER)} == set(BACKBONES)


def test_bundle_is_light_and_its_card_is_complete(bundle):
    assert sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file()) < 8e6
    card = (bundle.folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for words in ("Not for clinical use", "TotalSegmentator", "ICRP", "LIDC-IDRI", "k = 10", "overlay.png"):
        assert words in card
    assert bundle.manifest.num_classes == 25
    assert "lits_volume0" in bundle.manifest.scores
    assert "held-out volume" in model_summary(bundle.manifest)


def test_scores_of_the_default_model_hold_for_six_volumes():
    scores = load_bundle(SegmentOptions.bundle).manifest.scores
    assert len(scores) == 6 and {"spl_abdominal_atlas", "lits_volume0"} <= set(scores)
    assert "Mean Dice on 6 held-out volumes: 0.73 to 0.85." in model_summary(load_bundle(SegmentOptions.bundle).manifest)
