"""The endless, reproducible sequence of training samples, drawn from labelled CT and anatomies.

Sample n depends on the seed and on n alone, so that workers, processes and resumed runs see the same sequence.
"""

from collections.abc import Sequence

import numpy as np
import torch

from NMSWSegment.data.training_sample import TrainingSample
from NMSWSegment.protocol import UserError
from NMSWSegment.samples.case_source import CaseSource
from NMSWSegment.samples.synthesis import AnatomySource, SynthesisOptions
from NMSWSegment.samples.warp import chance


class TrainingSet(torch.utils.data.Dataset):
    """Sample n of an endless random sequence, for every n >= 0; labels as `label_names` says."""

    def __init__(
        self,
        *,
        cases: Sequence[CaseSource],
        anatomies: Sequence[AnatomySource],
        label_names: Sequence[str],
        options: SynthesisOptions,
        real_fraction: float = 0.35,
        seed: int = 0,
    ) -> None:
        """Mix sources.

        Args:
            cases: labelled CT; every case is equally likely.
            anatomies: every anatomy is equally likely.
            label_names: classes without background, in label order.
            options: how samples are drawn.
            real_fraction: share of samples from cases where there are both kinds.
            seed: the sequence.

        Raises:
            UserError: there is no source at all, or the fraction is no share.
        """
        check_not_empty([*cases, *anatomies])
        if not 0 <= real_fraction <= 1:
            raise UserError(f"real_fraction is {real_fraction}, but it is a share. Use a number from 0 to 1.")
        self.label_names = list(label_names)
        self._cases, self._anatomies, self._options = list(cases), list(anatomies), options
        self._real_fraction, self._seed = real_fraction, seed

    def __getitem__(self, number: int) -> TrainingSample:
        """Sample `number`."""
        generator = sample_generator(seed=self._seed, number=number)
        is_real = chance(generator, self._real_fraction) if self._cases and self._anatomies else bool(self._cases)
        sources = self._cases if is_real else self._anatomies
        source = sources[int(torch.randint(len(sources), (), generator=generator))]
        return source.draw(generator, self._options)


def sample_generator(*, seed: int, number: int, purpose: int = 0) -> torch.Generator:
    """A generator whose state depends on nothing else; purpose keeps the draws for one sample apart."""
    state = np.random.SeedSequence([seed, number, purpose] if purpose else [seed, number]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def check_not_empty(sources: Sequence) -> None:
    """Raise UserError when there is no source."""
    if not sources:
        raise UserError("There is nothing to train on: every case and anatomy is held out, or the folders are empty. Give more --data or hold out less.")
