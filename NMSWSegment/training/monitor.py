"""What a running training shows: lines on the terminal, and curves and pictures in TensorBoard."""

import logging
import math
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
from NMSWSegment.training.validation import ValidationScore

logger = logging.getLogger(__name__)

CURVE_NAME, VALIDATION_NAME = "curve.csv", "validation.csv"
VALIDATION_COLUMN = "validation_dsc"
CURVE_POINTS = 40
"""About as many points are left of a learning curve."""
CURVE_COLUMNS = ("iteration", *(field.name for field in fields(Losses)), VALIDATION_COLUMN)
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
        self._seconds_validated = 0.0
        self._losses: list[Tensor] = []
        self._curve = _Table(output / CURVE_NAME, CURVE_COLUMNS, last_iteration=first_iteration)
        self._validation: _Table | None = None
        self._output = output

    def close(self) -> None:
        """Finish the files and draw the learning curve; what a run has learned does not depend on them."""
        self._writer.close()
        try:
            draw_curve(self._curve.path)
        except OSError as error:
            logger.warning("The learning curve cannot be drawn (%s)", error)

    def count(self, losses: Tensor) -> None:
        """Remember the losses of a step for the next line: the mean over its volumes, in the order of Losses' fields."""
        self._losses.append(losses)

    def log(self, state: TrainingState, *, tau: float, score: ValidationScore | None = None) -> None:
        """One line and one set of points; the losses are the mean of the steps since the last one.

        Args:
            score: of the nets after this step, where they were validated.
        """
        iteration = state.iteration
        values = {field.name: float(value) for field, value in zip(fields(Losses), torch.stack(self._losses).nanmean(0))}
        self._losses.clear()
        seconds = (time.monotonic() - self._started) / (iteration - self._first)
        for name, value in values.items():
            self._writer.add_scalar(f"loss/{name}", value, iteration)
        self._curve.add((iteration, *values.values(), score.mean if score else math.nan))
        self._writer.add_scalar("tau", tau, iteration)
        self._writer.add_scalar("learning_rate", state.optimizer.param_groups[0]["lr"], iteration)
        self._writer.add_scalar("seconds_per_iteration", seconds, iteration)
        weights = mixing_weights(state.net.class_weights.detach()).tolist()
        self._writer.add_scalar("class_weight/mean", float(np.mean(weights)), iteration)
        for name, weight in zip(self._names, weights):
            self._writer.add_scalar(f"class_weight/{name}", weight, iteration)
        if state.sparsity:
            self._writer.add_scalar("fusion_density", state.sparsity.density, iteration)
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if value)
        logger.info("%6d  %s  tau %.2f  %.2f s", iteration, text, tau, seconds)
        if score:
            self._log_validation(state, score)

    def _log_validation(self, state: TrainingState, score: ValidationScore) -> None:
        """The line, the points and the row of a validation."""
        self._seconds_validated += score.seconds
        share = self._seconds_validated / (time.monotonic() - self._started)
        place = "the best so far" if state.best_iteration == state.iteration else f"the best is {state.best_score or 0:.4f} of iteration {state.best_iteration}"
        logger.info("%6d  validation DSC %.4f, %s  %.1f s, %.1f %% of the time", state.iteration, score.mean, place, score.seconds, 100 * share)
        self._writer.add_scalar("validation/mean", score.mean, state.iteration)
        for name, dice in zip(self._names[1:], score.by_class):
            if not math.isnan(dice):
                self._writer.add_scalar(f"validation/{name}", dice, state.iteration)
        if self._validation is None:
            self._validation = _Table(self._output / VALIDATION_NAME, ("iteration", "mean", *self._names[1:]), last_iteration=state.iteration - 1)
        self._validation.add((state.iteration, score.mean, *score.by_class))

    def show_selection(self, state: TrainingState, sample: TrainingSample) -> None:
        """A coronal slice of one sample, always the same: coarse result, and the patches that would be run now, by rank."""
        device = state.net.class_weights.device
        x, labels, grid = prepare(sample, self._options)
        coarse_labels, chosen = _coarse_view(state.net, x.to(device), grid=grid, options=self._options)
        picture = selection_picture(x[0, 0].cpu().numpy(), coarse_labels.cpu().numpy(), chosen, grid=grid, row=_fullest_row(labels.cpu()), colors=self._colors)
        self._writer.add_image("selection", picture, state.iteration, dataformats="HWC")


class _Table:
    """A csv file that grows by a row at a time; a resumed run goes on after the row of its checkpoint. What is not a number is left empty."""

    def __init__(self, path: Path, columns: Sequence[str], *, last_iteration: int) -> None:
        """Args: columns: the first one is the iteration; last_iteration: rows after it are dropped."""
        self.path = path
        rows = [row for row in _table_rows(path, columns) if row[0] <= last_iteration]
        self._write([",".join(columns), *map(_row_text, rows)], mode="w")

    def add(self, row: Sequence[float]) -> None:
        """One more row."""
        self._write([_row_text(row)], mode="a")

    def _write(self, lines: Sequence[str], *, mode: str) -> None:
        """Lines at the end, or a new file in mode w."""
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            logger.warning("'%s' cannot be written (%s)", self.path, error)


def draw_curve(path: Path) -> None:
    """The learning curve beside its table, smoothed, and the validation DSC beside the losses; nothing without matplotlib or with too few points."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    values = np.array(_table_rows(path, CURVE_COLUMNS)).reshape(-1, len(CURVE_COLUMNS))
    if len(values) < 2:
        return
    scores = values[np.isfinite(values[:, -1])]
    figure = Figure(figsize=(11 if len(scores) else 7, 4), layout="constrained")
    axes = figure.subplots(ncols=2 if len(scores) else 1, squeeze=False)[0]
    width = max(1, len(values) // CURVE_POINTS)
    shown = [column for column in range(1, len(CURVE_COLUMNS) - 1) if values[:, column].any()]
    for column in shown[:1] if len(shown) == 2 else shown:  # a single term is the total
        smooth = np.convolve(values[:, column], np.ones(width) / width, mode="valid")
        axes[0].plot(values[width - 1 :, 0], smooth, label=CURVE_COLUMNS[column])
    axes[0].set(xlabel="iteration", ylabel="loss" if width == 1 else f"loss, mean of {width} points")
    axes[0].legend()
    if len(scores):
        axes[1].plot(scores[:, 0], scores[:, -1], marker="o")
        best = scores[scores[:, -1].argmax()]
        axes[1].set(xlabel="iteration", ylabel="validation DSC", title=f"best {best[-1]:.3f} at iteration {best[0]:.0f}")
    figure.savefig(path.with_suffix(".png"), dpi=120)


def _table_rows(path: Path, columns: Sequence[str]) -> list[list[float]]:
    """The whole rows of a table, without what a kill tore; none where there is no file, or one with other columns. The last columns may be missing."""
    if not path.is_file():
        return []
    heading, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    names, rows = heading.split(","), []
    for line in lines if names == list(columns[: len(names)]) else []:
        try:
            row = [float(value) if value else math.nan for value in line.split(",")]
        except ValueError:
            continue
        if len(row) == len(names) and not math.isnan(row[0]):
            rows.append(row + [math.nan] * (len(columns) - len(names)))
    return rows


def _row_text(row: Sequence[float]) -> str:
    """'200,0.51200,' for an iteration, a loss and nothing."""
    return ",".join([f"{row[0]:.0f}", *("" if math.isnan(value) else f"{value:.5f}" for value in row[1:])])


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
