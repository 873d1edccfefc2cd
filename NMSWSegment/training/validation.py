"""How good the nets of a run are on cases that it does not learn from, measured while it trains.

    coarse                     arg max of the up-sampled coarse logits, whole case
    local                      the local net on fixed patches around voxels of every class
    everything else            the model's own inference with validation_patches patches, whole case

Whole cases on the model's grid, without augmentation, with the weights that would be exported. DSC of a class is the mean over the cases that
hold it, the score the mean over those classes.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from NMSWSegment.data.metrics import dice_per_class
from NMSWSegment.data.prepared_case import ijk_to_ras_of
from NMSWSegment.data.training_sample import TrainingSample
from NMSWSegment.engine.resampling import coarse_input
from NMSWSegment.engine.runtime import Nets
from NMSWSegment.engine.segment import CoarsePass, coarse_pass, refine
from NMSWSegment.engine.selection import select
from NMSWSegment.files.bundle import BundleManifest
from NMSWSegment.files.orientation import Triple_mm
from NMSWSegment.files.volume import Volume
from NMSWSegment.nets.nmsw_net import NMSWNet
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.samples.training_set import sample_generator
from NMSWSegment.training.cascade import parts_of_boxes
from NMSWSegment.training.distributed import ProcessGroup
from NMSWSegment.training.net_facts import net_facts
from NMSWSegment.training.options import TrainOptions
from NMSWSegment.training.run_folder import TrainingState, current_weights
from NMSWSegment.training.step import prepare, random_boxes

PATCHES_PER_CASE = 8
"""Of the local net alone."""
PLACES = 2
"""Purpose of a generator: where these patches lie."""


@dataclass(frozen=True)
class ValidationScore:
    """DSC on the held-out cases."""

    mean: float
    """Over the classes; nan where no case holds any."""
    by_class: tuple[float, ...]
    """In label order without background; nan where no case holds the class."""
    seconds: float


class Validation:
    """The held-out cases of a run, shared out over its processes."""

    def __init__(self, cases: Sequence[CaseSource], *, options: TrainOptions, label_names: Sequence[str], group: ProcessGroup) -> None:
        """Args: cases: all of them; label_names: without background, in label order."""
        self.num_cases = len(cases)
        self._numbered = group.share(list(enumerate(cases)))
        self._options, self._names, self._group = options, list(label_names), group
        self._net: NMSWNet | None = None

    def score(self, state: TrainingState) -> ValidationScore:
        """Score the nets as they are now; the same on every process. What is trained does not change."""
        started = time.monotonic()
        nets = self._nets(state)
        rows = [self._dice(nets, source.whole(), number=number) for number, source in self._numbered]
        dice = np.array(rows, dtype=np.float64).reshape(len(rows), -1) if rows else np.full((1, len(self._names) + 1), np.nan)
        sums = torch.from_numpy(np.stack([np.nansum(dice, axis=0), np.isfinite(dice).sum(axis=0)])[:, 1:])
        total, count = self._group.sum_values(sums.float().to(self._group.device)).cpu().double().numpy()
        by_class = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
        mean = float(np.nanmean(by_class)) if count.any() else math.nan
        return ValidationScore(mean=mean, by_class=tuple(by_class.tolist()), seconds=time.monotonic() - started)

    def _nets(self, state: TrainingState) -> Nets:
        """The nets with the weights that would be exported, as inference runs them."""
        if self._net is None:
            self._net = NMSWNet(state.net.architecture).eval()
        net, device = self._net.to(self._group.device), self._group.device
        net.load_state_dict(current_weights(state))
        manifest = BundleManifest(name="run", title="", description="", sha256={}, **net_facts(self._options, net, label_names=self._names))
        return Nets(manifest=manifest, coarse_net=net.coarse, local_net=net.local, device=device)

    def _dice(self, nets: Nets, sample: TrainingSample, *, number: int) -> np.ndarray:
        """DSC of every class, background included, of one case."""
        if self._options.train == "local":
            predicted, reference = self._on_patches(nets, sample, number=number)
        else:
            coarse = coarse_pass(as_volume(sample, self._options.spacing_mm), nets)
            labels = coarse.coarse_labels if self._options.train == "coarse" else self._refined(coarse, nets)
            predicted, reference = labels[tuple(slice(0, length) for length in sample.labels.shape)], sample.labels.cpu()
        return dice_per_class(predicted.numpy(), reference.numpy(), num_classes=len(self._names) + 1)

    def _refined(self, coarse: CoarsePass, nets: Nets) -> Tensor:
        """Labels of the model's own inference."""
        num_patches = self._options.validation_patches
        selection = select(coarse.coarse_logits, coarse.importance_map, grid=coarse.grid, num_patches=num_patches, policy="greedy")
        return refine(coarse, selection, nets)

    def _on_patches(self, nets: Nets, sample: TrainingSample, *, number: int) -> tuple[Tensor, Tensor]:
        """Labels of the local net on the case's patches, and the reference, (K, P, P, P) each."""
        x, labels, grid = prepare(sample, self._options)
        generator = sample_generator(seed=self._options.seed, number=number, purpose=PLACES)
        multiple = self._options.coarse_factor if nets.manifest.is_cascade else (1, 1, 1)
        boxes = random_boxes(labels, count=PATCHES_PER_CASE, patch_size=self._options.patch_size, multiple=multiple, generator=generator)
        parts = parts_of_boxes(nets.coarse(coarse_input(x, grid=grid))[0], boxes, grid=grid)[:, None] if nets.manifest.is_cascade else [None] * len(boxes)
        predicted = [nets.local(x[(0, slice(None), *box)], part).argmax(1)[0] for box, part in zip(boxes, parts)]
        return torch.stack(predicted), torch.stack([labels[box] for box in boxes]).cpu()


def is_due(iteration: int, options: TrainOptions) -> bool:
    """Whether the nets are validated after this iteration; always after the last one."""
    return options.validate_every > 0 and (iteration % options.validate_every == 0 or iteration == options.iterations)


def is_best(state: TrainingState, score: ValidationScore) -> bool:
    """Whether this is the best score so far (D30); keeps account of it in the state."""
    if math.isnan(score.mean):
        return False
    best = state.best_score is None or score.mean > state.best_score
    if best:
        state.best_score, state.best_iteration, state.validations_since_best = score.mean, state.iteration, 0
    else:
        state.validations_since_best += 1
    return best


def is_finished(state: TrainingState, options: TrainOptions) -> bool:
    """Whether a run has all its iterations, or so many validations in a row were no better that it ends."""
    return state.iteration >= options.iterations or 0 < options.patience <= state.validations_since_best


def as_volume(sample: TrainingSample, spacing_mm: Triple_mm) -> Volume:
    """A sample on the model's grid as inference takes it."""
    return Volume(array=sample.intensity.cpu().numpy(), ijk_to_ras=ijk_to_ras_of(spacing_mm, np.eye(3)))
