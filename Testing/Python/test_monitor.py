"""TensorBoard: the curves, and the picture of what the coarse net sees and chooses."""

import numpy as np
import pytest

pytest.importorskip("monai")
pytest.importorskip("tensorboard")

from test_train import a_data_folder, tiny_options  # noqa: E402

from NMSWSegment.files.colors import rank_color  # noqa: E402
from NMSWSegment.files.grid import CandidateGrid  # noqa: E402
from NMSWSegment.training import monitor as monitor_module  # noqa: E402
from NMSWSegment.training.monitor import OVERLAY_SHARE, selection_picture  # noqa: E402
from NMSWSegment.training.train import train  # noqa: E402


def test_picture_shows_right_at_the_left_edge_and_superior_at_the_top():
    grid = CandidateGrid.covering((24, 16, 32), patch_size=(16, 16, 16), overlap=0.5)
    x = np.zeros(grid.padded_shape, np.float32)
    x[20, 5, 30] = 1.0  # superior, right
    labels = np.zeros(grid.padded_shape, np.uint8)
    labels[2, 5, 3] = 1  # inferior, left
    colors = np.array([(0, 0, 0), (0, 1, 0)], dtype=np.float32)
    picture = selection_picture(x, labels, (), grid=grid, row=5, colors=colors)
    assert picture.shape == (24, 32, 3)
    np.testing.assert_array_equal(np.argwhere(picture[..., 0] == 1), [[23 - 20, 31 - 30]])
    np.testing.assert_allclose(picture[23 - 2, 31 - 3], (0, OVERLAY_SHARE, 0), atol=1e-6)


def test_picture_outlines_patches_by_rank_the_best_on_top():
    grid = CandidateGrid.covering((24, 16, 32), patch_size=(16, 16, 16), overlap=0.5)
    chosen = (grid.num_candidates - 1, 0)  # far end, then the first
    picture = selection_picture(
        np.zeros(grid.padded_shape, np.float32), np.zeros(grid.padded_shape, np.uint8), chosen, grid=grid, row=0, colors=np.zeros((1, 3))
    )[::-1, ::-1]
    np.testing.assert_allclose(picture[23, 20], rank_color(1, count=2), atol=1e-6)
    np.testing.assert_allclose(picture[0, 5], rank_color(2, count=2), atol=1e-6)
    np.testing.assert_array_equal(picture[4, 5], 0)
    assert (picture.sum(2) > 0).sum() == 2 * 60


def test_curve_of_a_resumed_run_drops_torn_rows_and_those_after_the_checkpoint(tmp_path):
    curve = tmp_path / monitor_module.CURVE_NAME
    curve.write_text("iteration,coarse,high,patch,entropy,ranking,total,validation_dsc\n2,1,1,1,1,0,3,\n4,1,1,1,1,0,3,0.5\n6,1,1,1,1,0,3,\n8,1,1")
    monitor = monitor_module.Monitor(tmp_path, options=None, label_names=["liver"], first_iteration=4)
    monitor.close()
    assert [row.split(",")[0] for row in curve.read_text(encoding="utf-8").splitlines()] == ["iteration", "2", "4"]


def test_curve_of_a_run_from_before_there_was_a_validation_goes_on(tmp_path):
    curve = tmp_path / monitor_module.CURVE_NAME
    curve.write_text("iteration,coarse,high,patch,entropy,ranking,total\n2,1,1,1,1,0,3\n4,1,1,1,1,0,3\n")
    monitor_module.Monitor(tmp_path, options=None, label_names=["liver"], first_iteration=2).close()
    assert curve.read_text(encoding="utf-8").splitlines() == [
        "iteration,coarse,high,patch,entropy,ranking,total,validation_dsc",
        "2,1.00000,1.00000,1.00000,1.00000,0.00000,3.00000,",
    ]


@pytest.mark.parametrize("damage", ["missing", "empty", "folder vanished"])
def test_curve_that_cannot_be_drawn_ends_no_run(tmp_path, damage):
    output = tmp_path / "run"
    monitor = monitor_module.Monitor(output, options=None, label_names=["liver"], first_iteration=0)
    if damage == "folder vanished":
        output.rename(tmp_path / "moved")
    elif damage == "empty":
        (output / monitor_module.CURVE_NAME).write_text("")
    else:
        (output / monitor_module.CURVE_NAME).unlink()
    monitor.close()


def test_run_leaves_curves_class_weights_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = tiny_options(a_data_folder(tmp_path / "data"), iterations=4)
    train(options, output=tmp_path / "run", num_workers=0, log_every=2, show_every=2)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = events.Tags()
    assert {
        "loss/total",
        "loss/coarse",
        "loss/high",
        "loss/patch",
        "loss/entropy",
        "learning_rate",
        "tau",
        "class_weight/mean",
        "class_weight/background",
        "class_weight/spleen",
    } <= set(tags["scalars"])
    assert [point.step for point in events.Scalars("learning_rate")] == [2, 4]
    assert [picture.step for picture in events.Images("selection")] == [2, 4]
    assert [row.split(",")[0] for row in (tmp_path / "run" / "curve.csv").read_text(encoding="utf-8").splitlines()] == ["iteration", "2", "4"]
    picture = events.Images("selection")[0]
    assert picture.width >= 16 and picture.height >= 16


def test_point_of_the_curve_is_the_mean_of_the_steps_since_the_last_one(tmp_path):
    options = tiny_options(a_data_folder(tmp_path / "data"), iterations=4)
    curves = {}
    for every in (1, 2):
        train(options, output=tmp_path / str(every), num_workers=0, log_every=every)
        curves[every] = np.genfromtxt(tmp_path / str(every) / "curve.csv", delimiter=",", skip_header=1)
    assert curves[2][:, 0].tolist() == [2, 4]
    np.testing.assert_allclose(curves[2][:, 1:-1], curves[1][:, 1:-1].reshape(2, 2, -1).mean(1), atol=2e-5)
