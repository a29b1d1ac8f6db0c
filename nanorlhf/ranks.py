"""Several processes, started by torchrun, one per GPU: the ranks. A single process needs none of this and pays nothing for it.

Every rank runs the same script on the same data and takes every decision alike, because all of them depend on (seed, step) only.
What differs is the work. Of a step's rows each rank gets a share (`deal`); gradients, logged sums and rows are added up
(`add_up_gradients`, `add_up_numbers`, `add_up_rows`); what is measured item by item is collected (`collect`). Only the first rank
writes, prints and calls the user's functions.

Each rank holds whole models, or with --shard a part of each weight (`place`). Then a layer's weights are gathered whenever it
runs, and all ranks must run it equally often (`split`, `in_step`).
"""

import atexit
import contextlib
import datetime
import itertools
import os
import sys
import threading
import warnings

import torch
import torch.distributed as dist
from torch import nn

from nanorlhf.errors import UserError, one_line

sharded = False                      # with --shard; `join` sets it


def count():
    """Number of ranks, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mine():
    """This rank's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def join(device, shard=False, minutes=10.0):
    """Joins the other ranks if torchrun started this process, and returns the torch.device of this rank: with `cuda` or `auto`
    each rank of a machine gets a GPU of its own. A rank that waits longer than `minutes` for another ends with an error. shard:
    whether the models that `place` puts on the device are split over the ranks."""
    global sharded
    if shard and not launched():
        raise UserError("--shard splits the models over several processes: start the script with torchrun --nproc_per_node N")
    if not launched():
        return device
    sharded = shard
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=minutes))
    if mine() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    watcher = threading.Thread(target=watch, args=(mine(), count()), daemon=True)
    watcher.start()
    atexit.register(lambda: (left.set(), watcher.join(5.0)))
    return device


BEAT, LOST = 2.0, 16.0               # seconds between signs of life, and without one until a rank counts as lost
left = threading.Event()             # set when this rank leaves the others


def watch(rank, total):
    """Shows the others that this rank lives, and ends the process once the next rank has shown no life for LOST seconds: its
    process is stopped, or its machine gone. torchrun, which waits for a process to end, would not notice that, but ends all
    others when one fails. It runs in a thread, so a rank that works long, or calls a slow reward function, lives."""
    other, seen, silent = (rank + 1) % total, b"", 0.0
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
        for beat in itertools.count():
            gone = left.wait(BEAT)
            store.set(f"life of rank {rank}", "left" if gone else str(beat))
            if gone:
                return
            sign = store.get(f"life of rank {other}") if store.check([f"life of rank {other}"]) else b""
            silent = 0.0 if sign != seen or sign == b"left" else silent + BEAT
            seen = sign
            if silent >= LOST:
                raise RuntimeError(f"rank {other} has shown no life for {LOST:g} seconds: its process is stopped, or its machine "
                                   f"gone")
    except RuntimeError as error:
        if not left.is_set():
            print(f"rank {rank}: error: {one_line(error)}; the job ends, and --resume continues it", file=sys.stderr, flush=True)
            os._exit(1)


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


def split(own, total, size):
    """Returns a rank's share `own` of `total` items in lists of at most `size`, as many lists on each rank."""
    n, longest = len(own), -(-total // count())
    if count() == 1:
        return [own[i:i + size] for i in range(0, n, size)]
    k = -(-longest // size)
    if total < count() or sharded and k > total // count():
        raise UserError(f"{total} rows at a time are too few for {count()} processes, or do not divide among them with "
                        f"--micro_batch_size {size}: raise --batch_size, or make it a multiple of the processes")
    return [own[i * n // k:(i + 1) * n // k] for i in range(k) if i * n // k < (i + 1) * n // k]


def in_step(jobs, spare, needed=True):
    """Yields (job, True) for each of this rank's jobs. Then, if the models are sharded and it is needed, (spare, False) until
    every rank has had as many: a job whose result does not count."""
    jobs = list(jobs)
    most = max(collect([(mine(), len(jobs))])) if sharded and needed else len(jobs)
    for k in range(most):
        yield (jobs[k], True) if k < len(jobs) else (spare, False)


BUCKET = 2 ** 24                     # numbers that travel together: few calls, and little memory on top


def add_up_gradients(parameters):
    """Adds up the gradients over the ranks. Those of a sharded model are added up in the backward pass."""
    if count() == 1 or sharded:
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


# ---- Sharded models -------------------------------------------------------------------------------------------------


def reads_weights():
    """True if this rank reads the weights of checkpoints. With --shard only the first does, and `place` hands out the parts."""
    return not sharded or mine() == 0


def place(model, device, dtype="float32"):
    """Moves a model to the device. With --shard each rank gets a part of each weight from the first rank (FSDP2's fully_shard),
    and with the dtype "bfloat16" the layers' matrices are gathered rounded, as autocast would use them; gradients are summed in
    float32. Returns the model."""
    if not sharded:
        return model.to(device)
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(f"--shard needs a newer torch than {torch.__version__}: it has run with 2.13")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")    # no layer's output is changed in place
    trunk, weights = getattr(model, "trunk", model), model.state_dict() if mine() == 0 else {}
    mesh = dist.init_device_mesh(device.type, (count(),))
    rounded = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    model.to("meta")
    for block in trunk.blocks:       # its matrices; norms and embeddings, which stay float32, belong to the whole
        fully_shard([m for m in block.modules() if isinstance(m, nn.Linear)], mesh=mesh, mp_policy=rounded)
    fully_shard(model, mesh=mesh, reshard_after_forward=trunk is not model)    # a policy's head is used after its forward pass
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)                             # a sum, not a mean
            module.set_force_sum_reduction_for_comms(True)                     # which all backends know
    model.to_empty(device=device)
    trunk.make_rope()
    trunk.to(device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            whole = weights.pop(name).to(device) if mine() == 0 else torch.empty(p.shape, dtype=p.dtype, device=device)
            local(p).copy_(local(distribute_tensor(whole, mesh, p.placements)))
        model(torch.zeros(1, 1, dtype=torch.long, device=device))              # FSDP prepares itself in the first pass
        model.reshard()
    size = {p: p.numel() * p.element_size() for p in model.parameters()}       # in bytes, when it is gathered
    if dtype == "bfloat16":
        size |= {p: 2 * p.numel() for m in trunk.blocks.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    model.gathered_size = sum(size.values())
    return model


def local(tensor):
    """Returns this rank's part of a sharded tensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor):
    """Returns the whole of a sharded tensor; any other tensor as it is. All ranks must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_on_first(tensors):
    """{name: tensor} -> the whole tensors, on the first rank; {} on the others."""
    found = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    return {name: tensor.cpu() if sharded else tensor for name, tensor in found if mine() == 0}


def part_like(tensor, other):
    """Returns of a whole tensor the part that this rank holds, if `other`, of the same shape, is sharded; else all of it."""
    if not hasattr(other, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def own_share(parameter):
    """Returns what this rank counts of a parameter in a sum over all ranks, in which each number must come once."""
    return local(parameter) if sharded else parameter.flatten().tensor_split(count())[mine()]


def shard_again(model):
    """Frees what a forward pass without gradients has left gathered of a sharded model. Returns the model."""
    if sharded:
        model.reshard()
    return model


@contextlib.contextmanager
def gathered(model, free):
    """Within it a sharded model is whole on every rank, if it takes at most `free` bytes on each. Yields True if it takes more:
    then its layers are gathered one at a time whenever they run, and all ranks must run it equally often."""
    if not sharded:
        yield False
        return
    modules = [m for m in model.modules() if hasattr(m, "unshard")]
    if any_of(free is not None and model.gathered_size > free):
        yield True
        model.reshard()
        return
    model.set_reshard_after_forward(False)
    for module in modules:
        module.unshard()
    try:
        yield False
    finally:
        for module in modules:
            module.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)                  # as in `place`


# ---- Beginning and end ----------------------------------------------------------------------------------------------


def leave():
    """Leaves the other ranks, at the end of a run."""
    if dist.is_initialized():
        # If a thread of gloo's lets go of the last reference to a tensor while Python ends, the process aborts. Of this tensor
        # there is another reference, and by the time that all ranks are here the earlier ones are gone.
        leave.last = torch.zeros(1, device=device_of_ranks())
        dist.all_reduce(leave.last)
        left.set()
        dist.destroy_process_group()


def launched():
    """True if torchrun started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def refuse():
    """Raises UserError for what torchrun cannot share out."""
    if launched():
        raise UserError("torchrun starts single scripts: this program runs several side by side by itself (--processes)")
