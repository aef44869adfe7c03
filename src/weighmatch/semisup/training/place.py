"""One of the processes that train a run together: how it joins the others and does as they say.

The first process gives orders by a store that all of them share, and every other process does what
they say. What a process fails of is put into the same store, where the first one finds it.
"""

import itertools
import json
import logging
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from weighmatch.checks import ToldError
from weighmatch.semisup.parts.group import ALONE, Group, GroupError, Processes, needs_all
from weighmatch.semisup.training.dividing import LAUNCHED

# How long a process waits for another one before it gives up.
MINUTES = 10.0
# Seconds between two looks for work or for processes that have ended.
INTERVAL = 0.05
# What the processes talk by: the second one wants a GPU for each of them.
GLOO, NCCL = "gloo", "cpu:gloo,cuda:nccl"


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
        store: what all processes share.
        rank: the number of this process.
        size: the number of all.
    """

    store: Store
    rank: int
    size: int

    def join(self, device: str) -> Group:
        """Make this process a member of the group, on the device "cpu" or "cuda".

        Raises:
            ToldError: if a process has no GPU.
            GroupError: if a process has ended or does not answer.
        """
        with needs_all(self.size, MINUTES):
            backend = GLOO if device == "cpu" else self._agree(own_gpu(self.rank))
            if backend not in (GLOO, NCCL):
                raise ToldError(backend)
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(minutes=MINUTES),
            )
        return Processes(MINUTES)

    def _agree(self, gpu: str) -> str:
        """The choice of the first process, which knows the GPUs of all."""
        self.store.set(f"gpu {self.rank}", gpu)
        if self.rank == 0:
            gpus = [self.store.get(f"gpu {rank}").decode() for rank in range(self.size)]
            self.store.set("backend", choose_backend(gpus))
        return self.store.get("backend").decode()

    def serve(self) -> None:
        """Do what the first process says until it says that all is done.

        Raises:
            GroupError: if another process is lost, or what was to be done fails here.
        """
        torch.set_num_threads(1)
        # The first process warns of the same.
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        try:
            self._do_as_told()
        except GroupError as error:
            raise self.explained(error) from error
        except Exception as error:
            sentence = self._sentence_of(error)
            with suppress(RuntimeError):  # the store may be gone
                letter = [sentence, "".join(traceback.format_exception(error))]
                self.store.set(f"failed {self.rank}", json.dumps(letter))
            raise GroupError(sentence) from error

    def _do_as_told(self) -> None:
        group = ALONE
        for number in itertools.count():
            order, _, device = self._order(number).partition(" ")
            if order == "end":
                return
            if order == "join":
                group = self.join(device)
                continue
            function, arguments = group.from_first(_nothing)
            function(*arguments, group)

    def _order(self, number: int) -> str:
        # Not by a collective operation: the first process may have other work for hours.
        with needs_all(self.size, MINUTES):
            while not self.store.check([f"order {number}"]):
                time.sleep(INTERVAL)
            return self.store.get(f"order {number}").decode()

    def _sentence_of(self, error: Exception) -> str:
        place = f"process {self.rank + 1} of the {self.size} of this training, on {platform.node()}"
        if isinstance(error, ToldError | FloatingPointError):
            return f"{error} (told by {place})"
        said = str(error).strip().partition("\n")[0]
        return (
            f"{place}, has failed: {type(error).__name__}: {said}; start the same command again "
            "with --traceback to see where, and training goes on from its last checkpoint"
        )

    def explained(self, error: GroupError) -> GroupError:
        """What a process has failed of, where it could say so; else the words of `error`."""
        return self.failure() or GroupError(*error.args)

    def failure(self) -> GroupError | None:
        """What a process has failed of, where it could say so."""
        with suppress(RuntimeError):  # the store may be gone
            for rank in range(self.size):
                if self.store.check([f"failed {rank}"]):
                    sentence, where = json.loads(self.store.get(f"failed {rank}"))
                    told = GroupError(sentence)
                    told.add_note(f"There:\n{where}")
                    return told
        return None


def _nothing() -> tuple[Callable[..., object], tuple[object, ...]]:
    """What no process but the first would have to say, and it says something else."""
    raise AssertionError("the first process alone gives orders")


def own_gpu(rank: int) -> str:
    """Take the GPU of this process: its machine and its name, or the machine alone."""
    count = torch.cuda.device_count()
    if not count:
        return platform.node()
    place = int(os.environ["LOCAL_RANK"]) if LAUNCHED in os.environ else rank
    torch.cuda.set_device(place % count)
    return f"{platform.node()} {torch.cuda.get_device_properties().uuid}"


def choose_backend(gpus: Sequence[str]) -> str:
    """What processes talk by, given what `own_gpu` says in each; a sentence where one has none."""
    for rank, gpu in enumerate(gpus):
        if " " not in gpu:
            return (
                f"process {rank + 1} of the {len(gpus)} of this training, on {gpu}, sees no GPU, "
                "and others have one; leave this machine out, or set training.device to cpu"
            )
    return NCCL if len(set(gpus)) == len(gpus) else GLOO
