"""The kernels for NVIDIA GPUs, in Triton. kernels.py has the same functions in torch, says what they compute, and calls these.

A kernel is written for one program; a grid of programs runs at once. Each program here takes one row of logits and walks along
it in blocks, so that a row's numbers come out the same whatever its neighbours are, and from run to run: nothing is added by
atomics. Logits are read as float32, all arithmetic is float32, and rows are addressed with 64 bits.

Tests run these kernels under Triton's interpreter (TRITON_INTERPRET=1) on a CPU and compile them for sm_80 and sm_90; with a GPU
(`python -m pytest -m gpu`) they run there. results/bench has their speed on one H200.
"""

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # stands for -inf behind a row's end, where -inf * 0 would be NaN


@triton.jit
def _logits(z, bias, row, columns, W, temperature, HAS_BIAS: tl.constexpr):
    """Returns (z[row, columns] + bias[columns]) / temperature, LOWEST behind the end."""
    x = tl.load(z + row * W + columns, mask=columns < W, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=columns < W, other=0.0).to(tl.float32)
    return tl.where(columns < W, x / temperature, LOWEST)


@triton.jit
def _absorb(z, bias, targets, state, N, W, temperature, HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    top, total, mean, picked = (tl.load(state + row), tl.load(state + N + row), tl.load(state + 2 * N + row),
                                tl.load(state + 3 * N + row))
    for start in range(0, W, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _logits(z, bias, row, columns, W, temperature, HAS_BIAS)
        picked += tl.sum(tl.where((columns == target) & (columns < W), x, 0.0), 0)
        new_top = tl.maximum(top, tl.max(x, 0))
        rescale, e = tl.exp(top - new_top), tl.exp(x - new_top)
        total = total * rescale + tl.sum(e, 0)
        if ENTROPY:
            mean = mean * rescale + tl.sum(e * x, 0)
        top = new_top
    tl.store(state + row, top)
    tl.store(state + N + row, total)
    tl.store(state + 2 * N + row, mean)
    tl.store(state + 3 * N + row, picked)


def absorb(z, bias, temperature, targets, state, with_entropy):
    """kernels.absorb. Grid: one program per row of z [N, W]; each reads its row once and 4 numbers of `state`."""
    N, W = z.shape
    _absorb[(N,)](z, z if bias is None else bias, targets, state, N, W, temperature, bias is not None, with_entropy,
                  min(4096, triton.next_power_of_2(W)), num_warps=8)


@triton.jit
def _logits_gradient(z, bias, targets, lse, grad, out, W, temperature, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _logits(z, bias, row, columns, W, temperature, HAS_BIAS)
    is_target = tl.where(columns == tl.load(targets + row), 1.0, 0.0)
    d = (is_target - tl.exp(x - tl.load(lse + row))) * (tl.load(grad + row) / temperature)
    tl.store(out + row * W + columns, d.to(out.dtype.element_ty), mask=columns < W)


def logits_gradient(z, bias, temperature, targets, lse, grad, dtype):
    """kernels.logits_gradient. Grid: a program per row of z [N, W] and block of 4096 columns; each reads and writes its block
    once."""
    N, W = z.shape
    out, block = torch.empty(N, W, dtype=dtype, device=z.device), min(4096, triton.next_power_of_2(W))
    _logits_gradient[(N, triton.cdiv(W, block))](z, z if bias is None else bias, targets, lse, grad, out, W, temperature,
                                                 bias is not None, block, num_warps=8)
    return out


# ---- Sampling -------------------------------------------------------------------------------------------------------


@triton.jit
def _key(x):
    """Returns an int64 that orders as the float32 does: the bits of a negative number count backwards."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)                                        # -0 and 0 are a tie
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _exp_from(z, row, columns, V, temperature, top, key):
    """Returns exp(logit - top) where the logit's key is at least `key`, 0 elsewhere, and the keys."""
    x = _logits(z, z, row, columns, V, temperature, False)
    return tl.where((columns < V) & (_key(x) >= key), tl.exp(x - top), 0.0), _key(x)


@triton.jit
def _mass_from(z, row, V, temperature, top, key, BLOCK: tl.constexpr):
    """Returns the sum of exp(logit - top) over the logits whose key is at least `key`."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        mass += _exp_from(z, row, start + tl.arange(0, BLOCK), V, temperature, top, key)[0]
    return tl.sum(mass, 0)


@triton.jit
def _highest_key(z, row, V, temperature, top, low, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the highest key, from `low` on, from which on there are `wanted` logits (COUNT) or such a sum of exp(logit - top):
    the key of the last logit that top-k or top-p keeps. There is no sort, and all ties stay in. 16 pivots divide the interval
    of keys in each pass over the row, so that 8 passes are enough."""
    first, high = low, _key(top)
    for _ in range(8):
        pivots = low + ((high - low) * (tl.arange(0, 16) + 1) + 15) // 16
        mass = tl.zeros((16, BLOCK), tl.float32)
        for start in range(0, V, BLOCK):
            e, key = _exp_from(z, row, start + tl.arange(0, BLOCK), V, temperature, top, first)
            if COUNT:
                e = tl.where(start + tl.arange(0, BLOCK) < V, 1.0, 0.0)
            mass += tl.where(key[None, :] >= pivots[:, None], e[None, :], 0.0)
        enough = tl.sum(mass, 1) >= wanted
        low = tl.max(tl.where(enough, pivots, low), 0)
        high = tl.min(tl.where(enough, high, pivots - 1), 0)
    return low


@triton.jit
def _sample(z, uniform, tokens, logprobs, V, temperature, top_k, top_p, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
            BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((), LOWEST, tl.float32)
    key = _key(top)
    for start in range(0, V, BLOCK):
        top = tl.maximum(top, tl.max(_logits(z, z, row, start + tl.arange(0, BLOCK), V, temperature, False), 0))
    if TOP_K:
        key = _highest_key(z, row, V, temperature, top, key, top_k, True, 1024)
    if TOP_P:
        wanted = top_p * _mass_from(z, row, V, temperature, top, key, BLOCK)
        key = _highest_key(z, row, V, temperature, top, key, wanted, False, 1024)
    total = _mass_from(z, row, V, temperature, top, key, BLOCK)
    point, before, token, last = tl.load(uniform + row) * total, 0.0, V, 0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        e, _ = _exp_from(z, row, columns, V, temperature, top, key)
        cdf = before + tl.cumsum(e, 0)
        token = tl.minimum(token, tl.min(tl.where((cdf > point) & (e > 0), columns, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, columns, 0), 0))
        before += tl.sum(e, 0)
    token = tl.where(token < V, token, last)                                          # rounding may leave the point at the total
    x = tl.load(z + row * V + token) / temperature
    tl.store(tokens + row, token.to(tl.int64))
    tl.store(logprobs + row, x - top - tl.log(total))


def sample(logits, uniform, temperature, top_k, top_p):
    """kernels.sample, for temperatures above 0. Grid: one program per row of logits [R, V] float32. It reads its row three times,
    and 8 or 9 times more for each of top-k and top-p, mostly from the L2 cache; it writes two numbers."""
    R, V = logits.shape
    tokens, logprobs = torch.empty(R, dtype=torch.int64, device=logits.device), torch.empty(R, device=logits.device)
    _sample[(R,)](logits.contiguous(), uniform, tokens, logprobs, V, float(temperature), float(top_k), float(top_p),
                  0 < top_k < V, top_p < 1.0, min(4096, triton.next_power_of_2(V)), num_warps=8)
    return tokens, logprobs


# ---- Attention of a decoding step -----------------------------------------------------------------------------------

SPLIT = tl.constexpr(256)  # keys of a program; fixed, so that no sum depends on the cache's capacity


@triton.jit
def _attend(q, k, v, lengths, out, top_of, total_of, first_split, n, R, S, scale, K: tl.constexpr, G: tl.constexpr,
            E: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Attends from TILE of the n * G queries of one group (a prompt's rows, or one row) and key-value head to one split of the
    keys k, v [groups, K, S, E]. Leaves the sums of exp(score - top) values, unnormalised, with top and the sum of exp(score -
    top), for _combine."""
    tiles = tl.cdiv(n * G, TILE)
    group, head, split = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + group).to(tl.int32) if SHARED else tl.load(lengths).to(tl.int32) + 1   # `last` of all rows
    if split * SPLIT >= length:
        return
    query = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)                       # of the group's n * G
    at = (group * n + query // G) * K * G + head * G + query % G                       # row * H + head
    e, real = tl.arange(0, WIDTH), query < n * G
    queries = tl.load(q + at[:, None] * E + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
    top, total = tl.full((TILE,), LOWEST, tl.float32), tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, WIDTH), tl.float32)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length), BLOCK):
        key = start + tl.arange(0, BLOCK)
        place = ((group * K + head) * S + key)[:, None] * E + e[None, :]
        inside = (key < length)[:, None] & (e < E)[None, :]
        keys = tl.load(k + place, mask=inside, other=0.0)
        score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        score = tl.where((key < length)[None, :], score, LOWEST)
        new_top = tl.maximum(top, tl.max(score, 1))
        rescale, p = tl.exp(top - new_top), tl.exp(score - new_top[:, None])
        values = tl.load(v + place, mask=inside, other=0.0)
        total = total * rescale + tl.sum(p, 1)
        sums = sums * rescale[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
        top = new_top
    at += (first_split + split) * R * K * G
    tl.store(out + at[:, None] * E + e[None, :], sums, mask=real[:, None] & (e < E)[None, :])
    tl.store(top_of + at, top, mask=real)
    tl.store(total_of + at, total, mask=real)


@triton.jit
def _combine(partial, top_of, total_of, lengths, last, out, n, rows, prefix_splits, H: tl.constexpr, E: tl.constexpr,
             WIDTH: tl.constexpr):
    """Adds the splits of one row and head, first the prompt's, then the row's own, and divides by the total."""
    at = tl.program_id(0).to(tl.int64)                                                 # row * H + head
    e = tl.arange(0, WIDTH)
    top, total, sums = tl.full((), LOWEST, tl.float32), 0.0, tl.zeros((WIDTH,), tl.float32)
    filled = tl.cdiv(tl.load(lengths + at // H // n), SPLIT).to(tl.int32)              # splits of the prompt that hold a key
    own = (tl.load(last) // SPLIT).to(tl.int32) + 1
    for i in range(filled + own):
        place = at + tl.where(i < filled, i, prefix_splits + i - filled) * rows
        split_top = tl.load(top_of + place)
        new_top = tl.maximum(top, split_top)
        rescale, weight = tl.exp(top - new_top), tl.exp(split_top - new_top)
        total = total * rescale + tl.load(total_of + place) * weight
        sums = sums * rescale + tl.load(partial + place * E + e, mask=e < E, other=0.0) * weight
        top = new_top
    tl.store(out + at * E + e, (sums / total).to(out.dtype.element_ty), mask=e < E)


def attention_tiles(width, dtype):
    """Returns (queries of a tile, keys of a block, options of the launch) for heads of this width, a power of two. They depend on
    the model alone, because the order of a product's sums may depend on them."""
    if dtype == torch.float32:                                                         # no matrix instructions: exact products
        return *((32, 32) if width <= 128 else (16, 16)), dict(num_warps=8, num_stages=2)
    return 32, 64 if width <= 64 else 32, dict(num_warps=4, num_stages=2)


def decode_attention(q, k, v, last, prefix):
    """kernels.decode_attention, with a prefix. Three launches: `_attend` runs once for the prompts and once for the rows' own
    keys, on the grid (tiles of queries that share keys, K, splits of 256 keys). A program reads its keys and values once for up
    to 32 queries and writes E + 2 float32 per query; splits behind a length leave at once. `_combine`, one program per row and
    head, adds the splits in their order. Scratch: R H (E + 2) float32 per 256 keys of the longest prompt and of the capacity."""
    prefix_k, prefix_v, lengths, _ = prefix
    (R, H, E), (P, K, S, _), T = q.shape, prefix_k.shape, k.shape[2]
    n, G, width = R // P, H // K, max(16, triton.next_power_of_2(E))
    splits, own_splits = triton.cdiv(S, SPLIT.value), triton.cdiv(T, SPLIT.value)
    partial = torch.empty(splits + own_splits, R, H, E, device=q.device)
    top, total = torch.empty(2, splits + own_splits, R, H, device=q.device)
    tile, block, options = attention_tiles(width, k.dtype)
    q, common = q.contiguous(), dict(K=K, G=G, E=E, WIDTH=width, BLOCK=block, **options)
    own_tile = max(16, triton.next_power_of_2(G)) if G <= tile else tile
    _attend[(P * triton.cdiv(n * G, tile), K, splits)](q, prefix_k, prefix_v, lengths, partial, top, total, 0, n, R, S, E**-0.5,
                                                       SHARED=True, TILE=tile, **common)
    _attend[(R * triton.cdiv(G, own_tile), K, own_splits)](q, k, v, last, partial, top, total, splits, 1, R, T, E**-0.5,
                                                           SHARED=False, TILE=own_tile, **common)
    out = torch.empty_like(q)
    _combine[(R * H,)](partial, top, total, lengths, last, out, n, R * H, splits, H=H, E=E, WIDTH=width, num_warps=1)
    return out.view(R, H * E)
