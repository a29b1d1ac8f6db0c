"""Compiles every Triton kernel ahead of time for sm_80 and sm_90, at the tiles that nanorlhf uses; needs no GPU. Prints per kernel:
name, case, capability, registers, spills (instructions that touch local memory), bytes of shared memory, matrix instructions."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from nanorlhf import kernels_triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = dict(z="*fp32", bias="*fp32", targets="*i64", state="*fp32", lse="*fp32", grad="*fp32", uniform="*fp32", tokens="*i64",
             logprobs="*fp32", temperature="fp32", top_k="fp32", top_p="fp32", scale="fp32", lengths="*i64", last="*i64", top_of="*fp32",
             total_of="*fp32", partial="*fp32")   # all others are i32
EIGHT = dict(num_warps=8)
CASES = [("_absorb", "fp32", {}, dict(HAS_BIAS=True, ENTROPY=True, BLOCK=4096), EIGHT),
         ("_logits_gradient", "fp32", dict(out="*fp32"), dict(HAS_BIAS=True, BLOCK=4096), EIGHT),
         ("_logits_gradient", "bf16", dict(out="*bf16"), dict(HAS_BIAS=True, BLOCK=4096), EIGHT),
         ("_sample", "fp32", {}, dict(TOP_K=True, TOP_P=True, BLOCK=4096), EIGHT),
         ("_combine", "bf16-128", dict(out="*bf16"), dict(H=32, E=128, WIDTH=128), dict(num_warps=1))]
for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
    for E in (64, 80, 256):
        width = triton.next_power_of_2(E)
        tile, block, options = kernels_triton.attention_tiles(width, dtype)
        for shared, queries in ((True, tile), (False, 16)):
            CASES.append(("_attend", f"{name}-{E}-{queries}", dict(q="*" + name, k="*" + name, v="*" + name, out="*fp32"),
                          dict(K=8, G=4, E=E, WIDTH=width, BLOCK=block, SHARED=shared, TILE=queries), options))
# Triton makes a number that is 1 a constant of the kernel, which then has other code.
for name, case, types, constants, options in {case[0]: case for case in CASES}.values():
    integers = set(getattr(kernels_triton, name).arg_names) - (TYPES | types).keys()
    CASES.append((name, case + "-ones", types, dict.fromkeys(integers, 1) | constants, options))


def compiled(name, types, constants, options, capability):
    fn = getattr(kernels_triton, name)
    signature = {a: "constexpr" if a in constants else (TYPES | types).get(a, "i32") for a in fn.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(fn.arg_names) if signature[a].startswith("*")}
    source = ASTSource(fn, signature, constexprs={(fn.arg_names.index(a),): v for a, v in constants.items()}, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def tool(*arguments):
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


for name, case, types, constants, options in CASES:
    for capability in (80, 90):
        kernel = compiled(name, types, constants, options, capability)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(kernel.asm["cubin"])
            f.flush()
            code = tool(TOOLS / "nvdisasm", "-c", f.name)
            registers = re.search(r"REG:(\d+)", tool(TOOLS / "cuobjdump", "-res-usage", f.name))[1]
        print(name, case, capability, registers, len(re.findall(r"\b(?:STL|LDL)\b", code)), kernel.metadata.shared,
              len(re.findall(r"\b(?:HGMMA|HMMA)\b", code)), flush=True)
