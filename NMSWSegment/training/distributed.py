"""Several processes, one run: who is who, and the sums over all of them.

Started by torchrun, every process (rank) holds the same nets, works on its share of an iteration's volumes, and the
gradients are added up before the step, so that the weights stay the same everywhere. Alone, all of this does nothing.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from NMSWSegment.protocol import UserError

TIMEOUT = timedelta(hours=12)
"""How long a process waits for the others; the first use of a large data set is read and cached by all of them, some slower."""


@dataclass(frozen=True)
class ProcessGroup:
    """This process among all processes of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Only the first one writes."""
        return self.rank == 0

    def share(self, items: Sequence) -> Sequence:
        """What this process takes of a list; all processes together take everything once."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            with _others_there():
                torch.distributed.barrier()

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes; a missing one counts as 0."""
        if self.size == 1:
            return
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])  # one message instead of hundreds
        with _others_there():
            torch.distributed.all_reduce(flat)
        for parameter, gradient, values in zip(parameters, gradients, flat.split([g.numel() for g in gradients])):
            parameter.grad = gradient.copy_(values.view_as(gradient))

    def sum_values(self, values: Tensor) -> Tensor:
        """The sum of a small tensor over all processes."""
        total = values.detach().clone()
        if self.size > 1:
            with _others_there():
                torch.distributed.all_reduce(total)
        return total


@contextmanager
def _others_there() -> Iterator[None]:
    """Turn what the libraries say when another process has ended into one sentence."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". ")[0]  # what follows is advice for those who write gloo
        raise UserError(f"Another process of this run has ended, so that this one ends too; the first message says why ({reason}).") from error


@contextmanager
def joined_group(device: str) -> Iterator[ProcessGroup]:
    """The group of this run, left when the block ends.

    Args:
        device: cpu, cuda or cuda:N; with several processes on a computer, 'cuda' is the GPU of this process's number there.

    Raises:
        UserError: the processes cannot find each other, or there are more of them than GPUs.
    """
    rank, size, local_rank = (int(os.environ.get(name, alone)) for name, alone in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    own = torch.device(device)
    if own.type == "cuda" and own.index is None:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Process {local_rank} has no GPU of its own: this computer shows {torch.cuda.device_count()}. Start as many processes as GPUs, or use --device cpu."
            )
        own = torch.device("cuda", local_rank)
        torch.cuda.set_device(own)
    if size == 1:
        yield ProcessGroup(device=own)
        return
    backend = "nccl" if own.type == "cuda" and torch.distributed.is_nccl_available() else "gloo"  # torch for Windows has no NCCL
    try:
        torch.distributed.init_process_group(backend, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The {size} processes cannot find each other ({error}). Start them with torchrun, whose --rdzv-endpoint all computers can reach."
        ) from error
    try:
        yield ProcessGroup(device=own, rank=rank, size=size)
    finally:
        torch.distributed.destroy_process_group()
