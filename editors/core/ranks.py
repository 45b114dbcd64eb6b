"""Several processes that carry out one run together: which of them this is, and how they share work.

    torchrun --nproc-per-node 4 -m errata.cli.main bench ...        # starts the processes

Every process, called a rank, has the whole model and does the same, except where work comes in many independent pieces:
texts of second moments, requests of the search for values, cases of an evaluation. Each rank takes its share of them,
and then all ranks have all results. So every rank carries the same edits, and needs no message about them.

Without a process group there is one rank, and every function here returns at once. The group itself is torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as group
from torch.distributed.rendezvous import rendezvous

from errata.editors.core.rank_messages import packed, unpacked

T = TypeVar("T")
R = TypeVar("R")

# A rank may wait this long for the others: for a lock on the cache, or for the disk of the first. torchrun ends all
# ranks when one has died, so no wait lasts longer than the others live.
_PATIENCE = timedelta(days=7)


@contextmanager
def joined(start: str = "env://", rank: int = -1, count: int = -1) -> Iterator[None]:
    """Context manager in which this process is one of several ranks.

    Args:
        start: Where the ranks find each other; by default by what torchrun has put into the environment.
        rank: Number of this process, from 0; by default by the environment.
        count: Number of processes; by default by the environment.
    """
    if torch.cuda.is_available():
        # Each rank has a GPU of its own, which "cuda" then means. Tensors of the CPU still go by gloo.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, total = next(rendezvous(start, rank, count, timeout=_PATIENCE))
    # torchrun may keep its store when it starts all ranks again. Addresses of those that have died are in it.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = group.PrefixStore(f"start {attempt}", store)  # type: ignore[attr-defined]
    group.init_process_group(backend, store=store, rank=number, world_size=total, timeout=_PATIENCE)
    try:
        yield
    finally:
        group.destroy_process_group()


def _is_joined() -> bool:
    return group.is_available() and group.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return group.get_rank() if _is_joined() else 0


def count() -> int:
    """Return how many processes there are."""
    return group.get_world_size() if _is_joined() else 1


def own(items: Sequence[T]) -> Sequence[T]:
    """Return this rank's share of some items: every `count()`-th, so that neighbours of one size are spread."""
    return items[rank() :: count()]


def wait() -> None:
    """Wait until all ranks are here."""
    if count() > 1:
        group.barrier()


def share_out(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """Do work whose pieces are independent: each rank does its share, and all return all results.

    Args:
        items: The pieces, the same on every rank.
        work: Returns one result per piece. Results are sent to the other ranks, as rank_messages.py says; tensors
            arrive on the CPU.

    Returns:
        The results in the order of the items.

    Raises:
        Exception: What the work of any rank raised; every rank raises it.
    """
    if count() == 1:
        return list(work(items))
    mine = own(items)
    try:
        outcome: list[R] | Exception = list(work(mine)) if mine else []
    except Exception as error:  # noqa: BLE001 - raised below, by every rank
        outcome = error
    outcomes = gather(outcome)
    results: dict[int, R] = {}
    for number, found in enumerate(outcomes):
        if isinstance(found, Exception):
            raise found
        results |= dict(zip(range(number, len(items), count()), found, strict=True))
    return [results[index] for index in range(len(items))]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in their order. They hold what rank_messages.py can send."""
    if count() == 1:
        return [value]
    mine = torch.frombuffer(bytearray(packed(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    group.all_gather(sizes, torch.tensor([len(mine)]))
    room = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    room[: len(mine)] = mine
    messages = [torch.empty_like(room) for _ in sizes]
    group.all_gather(messages, room)
    return [unpacked(each[: int(size)].numpy().tobytes()) for each, size in zip(messages, sizes, strict=True)]


def from_first(value: T) -> T:
    """Return the value of the first rank."""
    if count() == 1:
        return value
    found: list[Any] = gather(value if rank() == 0 else None)
    return found[0]


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in place. Every rank has tensors of the same shapes."""
    if count() > 1:
        for tensor in tensors:
            group.all_reduce(tensor)
