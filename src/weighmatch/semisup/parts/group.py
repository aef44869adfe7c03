"""The processes that train one run together.

All of them draw the same batches from the same random streams. Each computes with its share of
the images of a batch, every N-th one, and what is a sum or a mean over the batch is added up over
all of them. So all processes hold the same parameters at every step, and a run does not depend on
their number but for the order of sums.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from weighmatch.checks import ToldError
from weighmatch.semisup.parts.state_file import content_digest, leaves
from weighmatch.semisup.parts.streams import Rows

T = TypeVar("T")
Items = TypeVar("Items", Tensor, NDArray[Any])


class GroupError(ToldError, RuntimeError):
    """A process of a group was lost; the message says how training goes on."""


class DisagreementError(ToldError, RuntimeError):
    """Processes that should hold the same numbers do not."""


class TooFewError(ToldError, ValueError):
    """A batch that cannot be divided over the processes of a group."""


class Group:
    """The group of one process, to which everything belongs and which costs nothing.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        spread: whether they are on several machines.
    """

    rank, size, spread = 0, 1, False

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def rows(self, count: int, times: int = 1) -> Rows:
        """The rows of this process among those of `times` batches of `count` images each."""
        return Rows(times * count)

    def share(self, count: int) -> int:
        """How many of the first `count` images of a batch belong to this process."""
        return count

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of one type over all processes, in place."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, the same bits in each of them."""
        return tensor

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the rows (n, …) of all processes, (…)."""
        return values.mean(dim=0)

    def gather(self, own: Tensor) -> Tensor:
        """The rows of all processes, in the order of their batch, from those of this one (n, …)."""
        return own

    def divide(self, function: Callable[[Items], Tensor], items: Items) -> Tensor:
        """What `function` gives for each of the items (n, …), where each process does its share."""
        return function(items)

    def fetch(self, held: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        """Rows (n, …) that processes hold, on the device of those that this one holds.

        Args:
            held: the rows of this process, (m, …).
            owners: the process that holds each of the rows to fetch, (n,).
            places: where it lies among the rows of that process, (n,).
        """
        return held.index_select(0, places.to(held.device))

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` gives in the first process, in all of them; the others do not call it."""
        return function()

    def unify(self, content: Any) -> None:
        """Give the tensors of nested containers the values that they have in the first process.

        What every process fits by itself may differ in the last bits.
        """

    def require_same(self, content: Callable[[], Any]) -> None:
        """Require that nested containers of tensors and numbers are the same in all processes."""


ALONE = Group()


class Processes(Group):
    """Several processes, by the default process group of `torch.distributed`.

    Args:
        minutes: how long a process waits for another; for the message.
    """

    def __init__(self, minutes: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Set by torchrun and by Ray Train: how many of them are on this machine.
        self.spread = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) < self.size
        self._minutes = minutes

    def rows(self, count: int, times: int = 1) -> Rows:
        """The rows of this process among those of `times` batches of `count` images each.

        Raises:
            TooFewError: if there are fewer images than processes.
        """
        if count < self.size:
            raise TooFewError(
                f"a batch of {count} images cannot be divided over {self.size} processes; set "
                "runs.processes to no more than that, or raise the sizes of batches in training "
                "and training.influence"
            )
        if times == 1:
            return Rows(count, slice(self.rank, None, self.size))
        every = torch.arange(times * count).view(times, count)
        return Rows(times * count, every[:, self.rank :: self.size].flatten())

    def share(self, count: int) -> int:
        return len(range(self.rank, count, self.size))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        _spread(self.sum(_flat(tensors)), tensors)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._together():
            dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        # The number of rows goes along, so that no process needs to know how many others have.
        count = values.new_tensor([float(len(values))])
        total = self.sum(torch.cat([values.sum(dim=0).reshape(-1), count]))
        return (total[:-1] / total[-1]).view(values.shape[1:])

    def gather(self, own: Tensor) -> Tensor:
        counts = torch.zeros(self.size, dtype=torch.long, device=own.device)
        counts[self.rank] = len(own)
        total = int(self.sum(counts).sum())
        most = -(-total // self.size)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._together():
            dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def divide(self, function: Callable[[Items], Tensor], items: Items) -> Tensor:
        if len(items) < self.size:  # a network may know no batch without an image
            return function(items)
        return self.gather(function(items[self.rank :: self.size]))

    def fetch(self, held: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        order = owners.argsort(stable=True)
        asked = owners.bincount(minlength=self.size)
        due = self._exchange(asked, [1] * self.size, [1] * self.size, held.device)
        mine, theirs = asked.tolist(), due.tolist()
        wanted = self._exchange(places[order], theirs, mine, held.device)
        found = self._exchange(held.index_select(0, wanted), mine, theirs, held.device)
        return torch.empty_like(found).index_copy_(0, order.to(found.device), found)

    def _exchange(
        self, rows: Tensor, receive: list[int], send: list[int], device: torch.device
    ) -> Tensor:
        """Send so many rows (n, …) to each process in turn, and receive so many of each."""
        sent = rows.to(device).contiguous()
        found = sent.new_empty(sum(receive), *rows.shape[1:])
        with self._together():
            dist.all_to_all_single(found, sent, receive, send)
        return found

    def from_first(self, function: Callable[[], T]) -> T:
        found: Any = function() if self.first else None
        carried: list[Any] = [pickle.dumps(found) if self.first else None]
        cpu = torch.device("cpu")
        with self._together():
            dist.broadcast_object_list(carried, device=cpu)
        # Outside: what cannot be read here says nothing of the other processes.
        known: T = found if self.first else pickle.loads(carried[0])
        return known

    def unify(self, content: Any) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for leaf in leaves(content):
            if isinstance(leaf, Tensor):
                kinds.setdefault((leaf.dtype, leaf.device), []).append(leaf)
        for tensors in kinds.values():
            flat = _flat(tensors)
            with self._together():
                dist.broadcast(flat, 0)
            _spread(flat, tensors)

    def require_same(self, content: Callable[[], Any]) -> None:
        """Require that nested containers of tensors and numbers are the same in all processes.

        Raises:
            DisagreementError: in all processes, if they are not.
        """
        mine = content_digest(content())
        differs = self.from_first(lambda: mine) != mine
        if bool(self.sum(torch.tensor([int(differs)]))):
            raise DisagreementError(
                f"the {self.size} processes of this training have come to different numbers; "
                "train on machines of one kind with the same packages, and start the same command "
                "again: training goes on from its last checkpoint"
            )

    def _together(self) -> AbstractContextManager[None]:
        return needs_all(self.size, self._minutes)


@contextmanager
def needs_all(size: int, minutes: float) -> Iterator[None]:
    """What is done here needs all processes of a group.

    Args:
        size: how many they are.
        minutes: how long a process waits for another.

    Raises:
        GroupError: if one of them has ended or does not answer.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, ToldError):
            raise
        raise GroupError(
            f"one of the {size} processes of this training has ended, or did not answer for "
            f"{minutes:g} minutes; see what it wrote last and start the same command again, and "
            "training goes on from its last checkpoint"
        ) from error


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The numbers of tensors of one type, (n,)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write numbers (n,) into tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))
