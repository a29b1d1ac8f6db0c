"""Two kernels by which tests/test_triton.py tests the interpreter's bfloat16."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(tl.bfloat16))


@triton.jit
def twice(a, out):
    at = tl.arange(0, 16)
    x = tl.load(a + at)
    tl.store(out + at, x + x)
