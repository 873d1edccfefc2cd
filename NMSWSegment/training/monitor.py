"""What a running training shows: lines on the terminal, and curves and pictures in TensorBoard."""

import logging
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.data.training_sample import TrainingSample
from NMSWSegment.engine.aggregation import CoarseUpsampler, mixing_weights
from NMSWSegment.engine.resampling import coarse_input, run_coarse
from NMSWSegment.engine.selection import select
from NMSWSegment.files.colors import rank_color
from NMSWSegment.files.grid import CandidateGrid
from NMSWSegment.files.labels import coded_labels
from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.training.options import TrainOptions
from NMSWSegment.training.run_folder import TrainingState
from NMSWSegment.training.step import Losses, prepare

logger = logging.getLogger(__name__)

CURVE_NAME = "curve.csv"
CURVE_POINTS = 40
"""About as many points are left of a learning curve."""
OVERLAY_PATCHES = 5
OVERLAY_SHARE = 0.45
"""Of a class's color over the intensity."""


class Monitor:
    """Writes the progress of one run; only the first process has one."""

    def __init__(self, output: Path, *, options: TrainOptions, label_names: list[str], first_iteration: int) -> None:
        """Args: output: the run folder; first_iteration: steps that an earlier process made, to take the time of this one's."""
        from torch.utils.tensorboard import SummaryWriter

        # purge: what a killed run wrote after its last checkpoint would otherwise stand there twice
        self._writer = SummaryWriter(str(output), purge_step=first_iteration or None)
        self._options, self._names = options, ["background", *label_names]
        self._colors = np.array([(0, 0, 0), *(label.color for label in coded_labels(label_names))], dtype=np.float32) / 255
        self._first, self._started = first_iteration, time.monotonic()
        self._curve = output / CURVE_NAME
        self._columns = ["iteration", *(field.name for field in fields(Losses))]
        rows = [row for row in _curve_rows(self._curve, num_columns=len(self._columns)) if row[0] <= first_iteration]
        self._write_curve(rows, mode="w")

    def close(self) -> None:
        """Finish the files and draw the learning curve; what a run has learned does not depend on them."""
        self._writer.close()
        try:
            draw_curve(self._curve)
        except OSError as error:
            logger.warning("The learning curve cannot be drawn (%s)", error)

    def log(self, state: TrainingState, losses: Tensor, *, tau: float) -> None:
        """One line and one set of points.

        Args:
            losses: mean over the volumes of the step, in the order of Losses' fields.
        """
        iteration = state.iteration
        values = {field.name: float(value) for field, value in zip(fields(Losses), losses)}
        seconds = (time.monotonic() - self._started) / (iteration - self._first)
        for name, value in values.items():
            self._writer.add_scalar(f"loss/{name}", value, iteration)
        self._write_curve([(iteration, *values.values())])
        self._writer.add_scalar("tau", tau, iteration)
        self._writer.add_scalar("learning_rate", state.optimizer.param_groups[0]["lr"], iteration)
        self._writer.add_scalar("seconds_per_iteration", seconds, iteration)
        weights = mixing_weights(state.net.class_weights.detach()).tolist()
        self._writer.add_scalar("class_weight/mean", float(np.mean(weights)), iteration)
        for name, weight in zip(self._names, weights):
            self._writer.add_scalar(f"class_weight/{name}", weight, iteration)
        if state.sparsity:
            self._writer.add_scalar("fusion_density", state.sparsity.density, iteration)
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
        logger.info("%6d  %s  tau %.2f  %.2f s", iteration, text, tau, seconds)

    def _write_curve(self, rows: Sequence[Sequence[float]], *, mode: str = "a") -> None:
        """Rows of the learning curve, under its heading in mode w."""
        lines = [",".join(self._columns)] if mode == "w" else []
        lines += [",".join([f"{row[0]:.0f}", *(f"{value:.5f}" for value in row[1:])]) for row in rows]
        try:
            with self._curve.open(mode, encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            logger.warning("The learning curve '%s' cannot be written (%s)", self._curve, error)

    def show_selection(self, state: TrainingState, sample: TrainingSample) -> None:
        """A coronal slice of one sample, always the same: coarse result, and the patches that would be run now, by rank."""
        device = state.net.class_weights.device
        x, labels, grid = prepare(sample, self._options)
        coarse_labels, chosen = _coarse_view(state.net, x.to(device), grid=grid, options=self._options)
        picture = selection_picture(x[0, 0].cpu().numpy(), coarse_labels.cpu().numpy(), chosen, grid=grid, row=_fullest_row(labels.cpu()), colors=self._colors)
        self._writer.add_image("selection", picture, state.iteration, dataformats="HWC")


def draw_curve(path: Path) -> None:
    """The learning curve beside its table, smoothed; nothing where matplotlib is not installed or there are too few points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    names = [field.name for field in fields(Losses)]
    values = np.array(_curve_rows(path, num_columns=len(names) + 1))
    if len(values) < 2:
        return
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    width = max(1, len(values) // CURVE_POINTS)
    for column, name in enumerate(names, start=1):
        if values[:, column].any():
            smooth = np.convolve(values[:, column], np.ones(width) / width, mode="valid")
            axes.plot(values[width - 1 :, 0], smooth, label=name)
    axes.set(xlabel="iteration", ylabel=f"loss, mean of {width} points")
    axes.legend()
    figure.savefig(path.with_suffix(".png"), dpi=120)


def _curve_rows(path: Path, *, num_columns: int) -> list[list[float]]:
    """The whole rows of a learning curve, without what a kill tore; none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            row = [float(value) for value in line.split(",")]
        except ValueError:
            continue
        if len(row) == num_columns:
            rows.append(row)
    return rows


def selection_picture(x: np.ndarray, labels: np.ndarray, chosen: tuple[int, ...], *, grid: CandidateGrid, row: int, colors: np.ndarray) -> np.ndarray:
    """A coronal slice in radiological view (patient right at the left edge, superior at the top), (rows, columns, 3) in [0, 1].

    Args:
        x: (D, H, W) in [0, 1].
        labels: (D, H, W) of the coarse net.
        chosen: candidates, best first; outlined where they lie, whatever their anterior position, from yellow to violet.
        row: index along anterior.
        colors: of every class, (C, 3) in [0, 1].
    """
    picture = np.repeat(x[:, row, :, None], 3, axis=2)
    plane = labels[:, row]
    picture[plane > 0] = (1 - OVERLAY_SHARE) * picture[plane > 0] + OVERLAY_SHARE * colors[plane[plane > 0]]
    for rank, index in reversed(list(enumerate(chosen, start=1))):  # the best one last, on top
        rows, _, columns = grid.slices(index)
        color = rank_color(rank, count=len(chosen))
        picture[[rows.start, rows.stop - 1], columns] = color
        picture[rows, [columns.start, columns.stop - 1]] = color
    return picture[::-1, ::-1]  # S-A-R: superior to the top, right to the left


@torch.no_grad()
def _coarse_view(net: NMSWNet, x: Tensor, *, grid: CandidateGrid, options: TrainOptions) -> tuple[Tensor, tuple[int, ...]]:
    """Labels of the coarse net (D, H, W) and the candidates that inference would take now."""
    net.eval()
    coarse_logits, importance_map = run_coarse(net.coarse, coarse_input(x, grid=grid), multiple=net.architecture.coarse_multiple)
    net.train()
    selection = select(coarse_logits[0], importance_map[0, 0], grid=grid, num_patches=OVERLAY_PATCHES, policy="greedy")
    return CoarseUpsampler(coarse_logits[0].cpu(), grid=grid).labels(), selection.indices


def _fullest_row(labels: Tensor) -> int:
    """The coronal slice with the most different classes, then the most labelled voxels."""
    num_classes = [len(plane.unique()) for plane in labels.unbind(1)]
    return int(torch.tensor(num_classes).mul(labels.shape[0] * labels.shape[2]).add(((labels > 0) & (labels < 255)).sum((0, 2))).argmax())
