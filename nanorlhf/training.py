"""What the training loops share and no method depends on: seeds, the order of rows, the learning rate, one guarded step."""

import functools
import hashlib
import math

import numpy as np
import torch

from nanorlhf import ranks
from nanorlhf.errors import NotFinite, UserError


def seed_for(seed, *keys):
    """Returns a 63-bit seed for one purpose, such as ("rollout", step).

    All randomness is a pure function of (seed, purpose, step) and no generator's state is carried along, so a resumed run draws
    what the uninterrupted run would have drawn. Two purposes never share random numbers, so every generator of a run gets
    its seed here. Runs of one seed share those of the same purpose, so that PPO and PPO-GT, say, differ by less noise.
    """
    words = [seed % 2**64] + [int.from_bytes(hashlib.sha256(str(k).encode()).digest()[:8], "little") for k in keys]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(2)
def epoch_order(n, seed, epoch):
    """Permutation of range(n) for one epoch. It depends on (n, seed, epoch) only, so a resume has nothing to restore."""
    order = np.random.Generator(np.random.Philox(key=seed_for(seed, "order", n, epoch))).permutation(n)
    order.flags.writeable = False  # it is cached
    return order


def batch_indices(n, batch_size, step, seed):
    """Rows (list of ints) of global step `step` = 0, 1, ...: the steps walk through one epoch's order after another.

    The n % batch_size rows at the end of an epoch are left out (other rows each epoch); if n < batch_size, a batch is all n.
    """
    epoch, k = divmod(step, max(1, n // batch_size))
    return epoch_order(n, seed, epoch)[k * batch_size:(k + 1) * batch_size].tolist()


def steps_of(epochs, n, batch_size):
    """Number of steps in this many epochs of batch_indices, at least 1."""
    return max(1, round(epochs * max(1, n // batch_size)))


def learning_rate(step, total, peak, warmup=0, schedule="linear"):
    """Learning rate of update `step` (from 0) of `total`: a linear warm-up, then constant, linear to 0 or cosine to 0.

    The warm-up takes at most a fifth of the steps; otherwise a short run would end within it.
    """
    warmup = min(warmup, total // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[schedule]


def make_optimizer(parameters, name, lr, weight_decay=0.0, eps=1e-8):
    """Returns AdamW, Adam, RMSprop (the DPO paper's) or Adafactor (Shazeer 2018), which keeps two vectors per matrix instead of
    one or two matrices, and whose rate is relative to a weight's size. As usual, weight decay acts on matrices, not on norms and
    biases."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0)]
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, eps=eps)
    if name == "adafactor":
        if ranks.sharded:
            raise UserError("--optimizer adafactor needs whole matrices, which no process has with --shard")
        return torch.optim.Adafactor(groups, lr=lr, foreach=False)                     # foreach would copy all weights
    if name not in ("adamw", "adam"):
        raise UserError(f"--optimizer {name}: not one of adamw, adam, rmsprop, adafactor")
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(groups, lr=lr, eps=eps, fused=fused)


def totals(parts):
    """Dicts of scalar tensors -> {name: float, the sum over the dicts}. All numbers come from the device at once, because each
    transfer makes a GPU wait."""
    names = [name for part in parts for name in part]
    numbers = torch.stack([value.detach() for part in parts for value in part.values()]).tolist()
    sums = dict.fromkeys(names, 0.0)
    for name, number in zip(names, numbers):
        sums[name] += number
    return sums


def optimizer_step(rates, max_grad_norm, step, rows, parts):
    """Takes one guarded step of each optimizer. rates: {optimizer: learning rate}. Clips each optimizer's gradient to the norm
    max_grad_norm (0: no clipping). parts: of each micro-batch, a dict of scalar tensors to log, its part of the "loss" among
    them. Returns the list of gradient norms before clipping, in the order of rates, and the `totals` of parts. Gradients and
    parts are added up over the ranks first.

    A loss or gradient that is not finite raises UserError here, before any weight changes. The message names `step` and
    `rows`, the indices of the batch's examples.
    """
    for optimizer in rates:
        ranks.add_up_gradients([p for g in optimizer.param_groups for p in g["params"]])
    norms = [ranks.whole(torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]],
                                                        max_grad_norm or math.inf)) for optimizer in rates]
    sums = totals([dict(enumerate(norms)), *parts])
    norms = [sums.pop(i) for i in range(len(norms))]
    sums = ranks.add_up_numbers(sums)
    loss = sums["loss"]
    if not all(map(math.isfinite, [loss, *norms])):
        raise NotFinite(f"step {step}: loss {loss}, gradient norm {', '.join(map(str, norms))}, on the examples "
                        f"{list(rows)[:8]} (of {len(rows)}); the weights were not changed by this update (lower --lr?)")
    for optimizer, lr in rates.items():
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms, sums
