"""The kernels: log-probabilities of given tokens, sampling, and the matrix products and attention of decoding.

Each is written in plain torch, to be read, and runs on any device. On an NVIDIA GPU the same functions call their twins in
kernels_triton.py. token_logprobs never holds an [N, V] tensor, sample never waits for the device, and decode_attention never
copies a prompt's keys for each of its samples.

Letters: N tokens, D width, V vocabulary, R rows, P prompts, n samples per prompt (R = P*n), H heads, K key-value heads,
G = H/K query heads per key-value head, S prompt positions, T new positions, E head width.
"""

import functools
import os

import torch
import torch.nn.functional as F

TILE = 2**22  # logits held at once: 16 MiB in float32, small enough to stay near the cache; 2% of a [4096, 50257] matrix


def matmul32(a, b, out=None):
    """Returns a @ b, accumulated in float32 (float64 stays float64), because bf16 logits would lose small differences. out: where
    to write it (a GPU's allocator has used memory at hand, a CPU's may not)."""
    if a.is_cuda and a.dtype not in (torch.float32, torch.float64):
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype != torch.float64:
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def triton_kernels(x):
    """Returns the module of Triton kernels if x lies on an NVIDIA GPU and Triton is installed, else None."""
    return _kernels_triton() if x.is_cuda else None


@functools.cache
def _kernels_triton():
    if torch.version.hip:                                                              # an AMD GPU, where nobody has tried them
        return None
    try:
        from nanorlhf import kernels_triton
    except ImportError:
        return None
    return kernels_triton


def absorb(z, bias, temperature, targets, state, with_entropy):
    """Takes a tile of logits into each token's running numbers `state` [4, N]: the maximum, the sum of exp(logit - maximum), that
    of exp(logit - maximum) logit, and the target's logit. z [N, W] is overwritten; bias [W] or None; targets [N] are columns of
    this tile, or lie outside it."""
    if fused := triton_kernels(z):
        return fused.absorb(z, bias, temperature, targets, state, with_entropy)
    if bias is not None:
        z += bias
    if temperature != 1.0:
        z /= temperature
    top, total, mean, picked = state
    inside = (targets >= 0) & (targets < z.shape[1])
    picked += torch.where(inside, z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None])[:, 0], 0.0)
    new_top = torch.maximum(top, z.amax(1))
    rescale = (top - new_top).exp()
    e = (z - new_top[:, None]).exp_() if with_entropy else z.sub_(new_top[:, None]).exp_()
    total.mul_(rescale).add_(e.sum(1))
    if with_entropy:
        mean.mul_(rescale).add_(e.mul_(z).sum(1))
    top.copy_(new_top)


def logits_gradient(z, bias, temperature, targets, lse, grad, dtype):
    """Returns grad * d log p(target) / d logit of a tile, [N, W] in dtype: (1[column = target] - p) / temperature times grad [N].
    z, bias, targets as in `absorb`; lse [N] is the log of the sum of all exp(logit). z is overwritten."""
    if fused := triton_kernels(z):
        return fused.logits_gradient(z, bias, temperature, targets, lse, grad, dtype)
    if bias is not None:
        z += bias
    if temperature != 1.0:
        z /= temperature
    grad = (grad / temperature)[:, None]
    inside = (targets >= 0) & (targets < z.shape[1])
    dz = z.sub_(lse[:, None]).exp_().mul_(-grad)
    dz.scatter_add_(1, targets.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside[:, None], grad, 0.0))
    return dz.to(dtype)


class _TokenLogprobs(torch.autograd.Function):
    """Streams over tiles of the vocabulary: forward keeps each token's log-sum-exp, and backward recomputes the tiles."""

    @staticmethod
    def tiles(hidden, weight, bias, targets):
        """Yields (slice of the vocabulary, weight tile, product [N, W], bias [W] or None, the targets' columns in it [N])."""
        N, V = len(hidden), len(weight)
        width = 4096 if hidden.is_cuda else max(1024, TILE // max(1, N))                # on a GPU 24 KiB per token
        f = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        memory = torch.empty(N * min(width, V), dtype=f) if hidden.is_cpu else None     # of all tiles: new memory costs time
        for first in range(0, V, width):
            tile = slice(first, first + width)
            w = weight[tile].to(hidden.dtype)
            z = matmul32(hidden, w.T, None if memory is None else memory[:N * len(w)].view(N, len(w)))
            yield tile, w, z, None if bias is None else bias[tile], targets - first

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, with_entropy):
        f = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        state = torch.zeros(4, len(hidden), dtype=f, device=hidden.device)
        state[0] = -torch.inf
        for _, _, z, b, local in _TokenLogprobs.tiles(hidden, weight, bias, targets):
            absorb(z, b, temperature, local, state, with_entropy)
        top, total, mean, picked = state
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, lse)
        ctx.temperature = temperature
        entropy = lse - mean / total if with_entropy else None                         # H = lse - E[z]
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return picked - lse, entropy

    @staticmethod
    def backward(ctx, grad, _):
        # d log p(y) / dz = 1[z = y] - p, so each tile of the logits' gradient needs only the saved log-sum-exp.
        with torch.autocast(grad.device.type, enabled=False):
            return _TokenLogprobs.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        hidden, weight, bias, targets, lse = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad = grad.to(lse.dtype)
        d_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = torch.empty_like(bias) if bias is not None and need_bias else None
        for tile, w, z, b, local in _TokenLogprobs.tiles(hidden, weight, bias, targets):
            dz = logits_gradient(z, b, ctx.temperature, local, lse, grad, hidden.dtype)
            if d_bias is not None:
                d_bias[tile] = dz.sum(0, dtype=lse.dtype)
            if need_weight:
                d_weight[tile] = matmul32(dz.T, hidden)
            if need_hidden:
                d_hidden = d_hidden.addmm_(dz, w) if dz.dtype == d_hidden.dtype else d_hidden + matmul32(dz, w)
        return d_hidden.to(hidden.dtype) if need_hidden else None, d_weight, d_bias, None, None, None


def token_logprobs(hidden, weight, targets, bias=None, temperature=1.0, entropy=False):
    """Returns log p(target) under softmax((hidden @ weight.T + bias) / temperature), without holding an [N, V] tensor.

    hidden [..., D]; weight [V, D]; targets [...] int64 in [0, V); bias [V] or None. The result is float32 [...] in nats
    (float64 for float64 input), differentiable in hidden, weight and bias. With entropy=True it is (log p, entropy [...]);
    the entropy is for logging and carries no gradient. Under autocast the products use the autocast type and accumulate in
    float32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        logp, h = _TokenLogprobs.apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, targets.reshape(-1),
                                       float(temperature), entropy)
    return (logp.view(targets.shape), h.view(targets.shape)) if entropy else logp.view(targets.shape)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Returns logits / temperature, with -inf outside the top_k most likely tokens and then outside the smallest set whose
    probability reaches top_p (the token that crosses it stays in). Ties with the last token of a set stay in, too, since
    nothing but their ids would choose among them. logits [R, V]; top_k 0 and top_p 1 are off."""
    if temperature != 1.0:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True).values
        before = F.pad(ordered.softmax(-1).cumsum(-1)[:, :-1], (1, 0))                 # probability before each token
        kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)                     # at least one, even at top_p 0
        logits = logits.masked_fill(logits < ordered.gather(-1, kept - 1), -torch.inf)
    return logits


def sample(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draws one token per row by inverting the cumulative distribution at `uniform`; greedy at temperature 0.

    logits [R, V]; uniform [R] float32 in [0, 1). There is one number per row, so that a row's draw does not depend on its
    neighbours (torch.multinomial would also draw V exponentials per row). Returns tokens [R] int64 and their
    log-probabilities [R] float32 under the distribution sampled from: filtered and renormalised, 0 when greedy.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    if fused := triton_kernels(logits):
        return fused.sample(logits, uniform, temperature, top_k, top_p)
    z = filter_logits(logits, temperature, top_k, top_p)
    top = z.amax(-1, keepdim=True)
    cdf = (z - top).exp_().cumsum_(-1)                                                 # not yet divided by its total
    total = cdf[:, -1:]
    # The point stays below the total, because rounding could pick a token of probability zero at the vocabulary's end.
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, point, right=True)                                # [R, 1]
    return tokens[:, 0], (z.gather(1, tokens) - top - total.log())[:, 0]


@functools.cache
def packing_rule():
    """Returns (numbers of rows, least size of a weight) from which `packed_linear` is faster with a packed weight. They depend on
    the processor's maker, because F.linear's library, MKL, has other kernels for each, and never on a clock, so that a run's
    numbers do not vary. The tables are in results/bench: of AMD's Zen 4, where packing always helps, and of Intel's Emerald
    Rapids, where it helps with an output head from 4 rows. Other makers: not tried, nothing is packed."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            maker = next((line.split()[-1] for line in f if line.startswith("vendor_id")), "")
    except OSError:
        maker = ""
    return {"AuthenticAMD": (range(1, 2**31), 2**18), "GenuineIntel": (range(4, 2**31), 2**24)}.get(maker, (range(0), 0))


def packing_pays(rows, steps, weights):
    """True if a CPU decodes this many rows and steps sooner with these weights packed: `pack` takes as long as some three to
    eight steps save, and longer in memory that is new to the process. The copy must fit an eighth of the machine's memory (what
    is free at the moment has no say, so that numbers do not vary)."""
    faster, least = packing_rule()
    if steps < 16 or not faster or rows < faster.start or not torch.backends.mkldnn.is_available():
        return False
    size = sum(w.numel() * w.element_size() for w in weights if w.numel() >= least)
    return 0 < size <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8


def pack(weight, least=None):
    """Returns a copy of weight [out, in] in the layout of the library oneDNN, for `packed_linear`; None for other dtypes than
    float32, and for weights of fewer than `least` numbers (None: of packing_rule), with which it is not faster."""
    least = packing_rule()[1] if least is None else least
    fits = weight.is_cpu and weight.dtype == torch.float32 and weight.numel() >= least
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64) if fits else None


def packed_linear(x, weight, bias=None, packed=None):
    """Computes F.linear without gradients: x [..., in], weight [out, in] -> [..., out]; packed: the same weight from `pack`, or
    None. With it a product of few rows, as in decoding, mostly takes a quarter to nine tenths of F.linear's time."""
    if packed is None or x.numel() // x.shape[-1] not in packing_rule()[0]:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def static_shapes(device):
    """True where a decoding step has to be the same work at any time, with its number on the device: on a GPU, which waits when
    the host looks at a number, and can replay such a step as a graph. On a CPU, looking costs nothing, and less work pays."""
    return device.type != "cpu"


def decode_attention(q, k, v, bias=None, last=None, prefix=None):
    """Computes attention of one new position per row over the row's cache: q [R, H, E]; k, v [R, K, T, E] -> [R, H*E].

    bias [R or 1, 1, 1, T] is 0 at real positions and -inf at padding (None: all are real). Instead, `last` [1] int64 may say on
    the device which of the T positions is the last that holds a key, so that a step has the same shapes at any time.
    prefix = (keys [P, K, S, E], values, lengths [P], bias [P, 1, 1, 1, S]) holds prompts, each shared by n = R/P rows. One
    softmax spans both parts; only the products are split, so that a prompt's keys are stored and read once for all its samples.
    """
    R, H, E = q.shape
    K, T = k.shape[1:3]
    G = H // K
    if last is not None:
        if prefix is not None and (fused := triton_kernels(q)):
            return fused.decode_attention(q, k, v, last, prefix)
        bias = torch.zeros(1, 1, 1, T, device=q.device).masked_fill_(torch.arange(T, device=q.device) > last, -torch.inf)
    if prefix is None:                                                                 # a key head's G queries as G positions
        return F.scaled_dot_product_attention(q.view(R, K, G, E), k, v, attn_mask=bias).reshape(R, H * E)
    prefix_k, prefix_v, _, prefix_bias = prefix
    P, _, S, _ = prefix_k.shape
    n = R // P
    q = q.view(R, K, G, E) * E**-0.5
    scores = q @ k.mT                                                                  # [R, K, G, T]
    if bias is not None:
        scores = scores + bias
    q = q.view(P, n, K, G, E).transpose(1, 2).reshape(P, K, n * G, E)                  # all rows of a prompt at once
    on_prefix = (q @ prefix_k.mT).view(P, K, n, G, S) + prefix_bias
    p = torch.cat([on_prefix.transpose(1, 2), scores.view(P, n, K, G, T)], -1).softmax(-1, dtype=torch.float32).to(v.dtype)
    out = p[..., :S].transpose(1, 2).reshape(P, K, n * G, S) @ prefix_v                # [P, K, n*G, E]
    out = out.view(P, K, n, G, E).transpose(1, 2).reshape(R, K, G, E) + p[..., S:].reshape(R, K, G, T) @ v
    return out.reshape(R, H * E)
