"""Several processes, started by torchrun, one per GPU: the ranks. A single process needs none of this and pays nothing for it.

Every rank runs the same script on the same data and takes every decision alike, because all of them depend on (seed, step) only.
What differs is the work. Of a step's rows each rank gets a share (`deal`); gradients, logged sums and rows are added up
(`add_up_gradients`, `add_up_numbers`, `add_up_rows`); what is measured item by item is collected (`collect`). Only the first rank
writes, prints and calls the user's functions.
"""

import datetime
import os
import sys

import torch
import torch.distributed as dist

from nanorlhf.errors import UserError


def count():
    """Number of ranks, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine():
    """This rank's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(device, minutes=10.0):
    """Joins the other ranks if torchrun started this process, and returns the torch.device of this rank: with `cuda` or `auto`
    each rank of a machine gets a GPU of its own. A rank that waits longer than `minutes` for another ends with an error."""
    if not launched():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=minutes))
    if mine() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    return device


def deal(items, length):
    """Returns this rank's share of the items, in their order: as many as the others' up to one, and of about the same total
    length, so that the ranks finish together."""
    if count() == 1:
        return list(items)
    items, own = list(items), []
    order = sorted(range(len(items)), key=lambda i: (-length(items[i]), i))
    for k, first in enumerate(range(0, len(order), count())):                          # to and fro: 0 1 2 2 1 0 0 1 2 ...
        place = first + (mine() if k % 2 == 0 else count() - 1 - mine())
        own += order[place:place + 1] if place < first + count() else []
    return [items[i] for i in sorted(own)]


BUCKET = 2 ** 24                     # numbers that travel together: few calls, and little memory on top


def add_up_gradients(parameters):
    """Adds up the gradients over the ranks."""
    if count() == 1:
        return
    bucket, size = [], 0
    for p in [*parameters, None]:
        if bucket and (p is None or size + p.numel() > BUCKET or p.grad.dtype != bucket[0].dtype):
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(part.view_as(g))
            bucket, size = [], 0
        if p is not None:
            bucket.append(p.grad)
            size += p.numel()


def device_of_ranks():
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def add_up_numbers(numbers):
    """{name: number} of each rank -> the sums, by name."""
    if count() == 1:
        return numbers
    sums = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device_of_ranks())
    dist.all_reduce(sums)
    return dict(zip(numbers, sums.tolist()))


def add_up_rows(tensors):
    """Adds up tensors of any dtype over the ranks, in place, where each rank has filled rows of its own and the others hold 0."""
    if count() == 1:
        return
    for t in tensors:
        whole = t.to(torch.int32) if t.dtype == torch.bool else t
        dist.all_reduce(whole)
        t.copy_(whole)


def rows_of_all(tensors, own, total):
    """Returns tensors of `total` rows from each rank's tensors, which hold the rows `own` of them."""
    if count() == 1:
        return tensors
    filled = [t.new_zeros(total, *t.shape[1:]).index_copy_(0, torch.tensor(own, device=t.device), t) for t in tensors]
    add_up_rows(filled)
    return filled


def collect(pairs):
    """Returns the pairs (index, value) of all ranks as a list of values in the order of the indices."""
    if count() > 1:
        everywhere = [None] * count()
        dist.all_gather_object(everywhere, list(pairs))
        pairs = [pair for part in everywhere for pair in part]
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def on_first(function, *args):
    """Calls the function on the first rank and returns its result, or raises its error, on all."""
    if count() == 1:
        return function(*args)
    answer = [None, None]
    if mine() == 0:
        try:
            answer[0] = function(*args)
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def any_of(flag):
    """True if the flag is true on some rank."""
    if count() == 1:
        return bool(flag)
    found = torch.tensor(float(bool(flag)), device=device_of_ranks())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def leave():
    """Leaves the other ranks, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def launched():
    """True if torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def refuse():
    """Raises UserError for what torchrun cannot share out."""
    if launched():
        raise UserError("torchrun starts single scripts: this program runs several side by side by itself (--processes)")
