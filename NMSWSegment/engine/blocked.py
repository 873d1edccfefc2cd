"""Passes over large (C, voxels) arrays in blocks that stay in the processor's cache.

Written for numpy: its element-wise operations take a place for their result, run at full width, let other Python threads work meanwhile, and
round after every single operation, so that the values equal torch's bit for bit. Blocks are independent of each other: neither their size nor
the number of threads changes a value.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

BLOCK_FLOATS = 1 << 17  # of one temporary array; a few of them fit in the caches of one core

Task = TypeVar("Task")


def in_threads(work: Callable[[Task], object], tasks: Iterable[Task]) -> None:
    """Do independent pieces of work, as many at a time as torch has threads."""
    tasks, threads = list(tasks), torch.get_num_threads()
    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            work(task)
        return
    with ThreadPoolExecutor(max_workers=min(threads, len(tasks))) as pool:
        for _ in pool.map(work, tasks):  # consumed, so that an error comes back
            pass


def shares(length: int) -> list[slice]:
    """[0, length) in a few pieces for every thread."""
    return list(ranges(length, step=-(-length // (4 * torch.get_num_threads()))))


def ranges(stop: int, *, step: int, start: int = 0) -> Iterator[slice]:
    """[start, stop) in pieces of at most `step`, which counts as 1 if it is less."""
    for first in range(start, stop, max(1, step)):
        yield slice(first, min(first + max(1, step), stop))


class BestClass:
    """arg max over the first axis; keeps its working memory between calls, so that one object serves one thread."""

    def __init__(self, num_classes: int) -> None:
        self._codes = np.arange(num_classes - 1, -1, -1, dtype=np.uint8)[:, None]  # the lowest class has the highest code
        self._largest = np.empty(0, np.float32)
        self._is_largest = np.empty(0, bool)

    def __call__(self, values: np.ndarray) -> tuple[np.ndarray, float]:
        """The lowest class where several are largest, class 0 where a value is no number, and the least of the largest values;
        (C, ...) float32 -> (...) uint8."""
        shape, values = values.shape[1:], values.reshape(len(values), -1)
        num_classes, n = values.shape
        if len(self._largest) < n:
            self._largest, self._is_largest = np.empty(n, np.float32), np.empty(num_classes * n, bool)
        largest, is_largest = self._largest[:n], self._is_largest[: num_classes * n].reshape(num_classes, n)
        np.maximum.reduce(values, axis=0, out=largest)
        np.equal(values, largest, out=is_largest)
        codes = is_largest.view(np.uint8)
        np.multiply(codes, self._codes, out=codes)
        classes = np.uint8(num_classes - 1) - np.maximum.reduce(codes, axis=0)
        np.multiply(classes, np.equal(largest, largest).view(np.uint8), out=classes)
        return classes.reshape(shape), float(largest.min())
