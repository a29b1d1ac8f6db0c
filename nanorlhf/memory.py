"""How much memory a script takes on each GPU, from the shapes alone, and which option makes it fit.

    python -m nanorlhf.memory --shape 7b --script ppo --ranks 8 --shard --dtype bfloat16
    python -m nanorlhf.memory FOLDER --script dpo        # a checkpoint instead of a shape

Weights, gradients and optimizer states are counted exactly. What a layer keeps for the backward pass is counted from the code of
model.py, tensor by tensor, as on a CPU; on a GPU an RMSNorm keeps less. A test compares the sum with measured peaks on a CPU. Not
counted are the CUDA context, NCCL's buffers and what the allocator wastes, so a run fits if it takes at most 90% of --memory. Nor
is what sampling adds on a CPU: the policy's large weights once more, if they take at most an eighth of the memory.
"""

import dataclasses
import itertools
import sys
from typing import Literal

import torch
from torch import nn

from nanorlhf.errors import UserError
from nanorlhf.formats.checkpoints import read_config
from nanorlhf.model import ModelConfig, Transformer
from nanorlhf.options import check_options, leading_words, one_line_errors, parse_options

SHAPES = {
    "0.1b": dict(width=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536, vocab_size=49152, tied=True),    # SmolLM2-135M
    "1b": dict(width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab_size=128256, tied=True),   # Llama 3.2 1B
    "7b": dict(width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocab_size=32000, tied=False),  # Mistral
    "70b": dict(width=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab_size=128256, tied=False)}  # Llama 3
TRAINED = dict(sft=["policy"], rm=["reward"], dpo=["policy"], ppo=["policy", "value"], rrhf=["policy"], bon=[])
FROZEN = dict(sft=[], rm=[], dpo=["reference"], ppo=["reference", "reward"], rrhf=["reference", "reward"],
              bon=["policy", "reward"])
SAMPLES = ("ppo", "rrhf", "bon")     # scripts that sample before each step
STATES = {"adam": 2, "adamw": 2, "rmsprop": 1, "adafactor": 0}       # numbers that the optimizer keeps per weight
SCORED = 128                         # rows that a reward model reads at once, if --micro_batch_size does not say less
GIB = 2 ** 30


@dataclasses.dataclass
class Options:
    # The run
    script: Literal["sft", "rm", "dpo", "ppo", "rrhf", "bon"] = "ppo"  # train_sft.py, ..., sample_bon.py
    shape: Literal["", "0.1b", "1b", "7b", "70b"] = ""  # of all models, if no folder is given
    ranks: int = 1                   # processes, one per GPU
    memory: float = 80.0             # of one GPU, in GiB
    table: bool = False              # print the table of README.md instead: the script on several shapes and numbers of GPUs

    # Options of the script
    shard: bool = False              # split each model over the processes
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast
    batch_size: int = 64             # rows per step (DPO, RM: pairs; RRHF: prompts)
    micro_batch_size: int = 8        # of them in memory at a time, on each process
    gradient_checkpointing: bool = False  # compute each layer again in the backward pass, to save memory
    frozen_layers: float = 0.0       # do not train this share of the layers, the lowest, and the embeddings
    optimizer: Literal["adamw", "adam", "rmsprop", "adafactor"] = "adamw"  # update rule

    # Lengths in tokens
    length: int = 1024               # of a row, prompt and response
    response_length: int = 256       # of its response
    num_samples: int = 4             # RRHF, best-of-n: responses per prompt

    ranges = {"ranks": "[1, 1e6]", "memory": "(0, 1e6]", "micro_batch_size": "[1, 1e9]", "length": "[2, 1e9]"}


def kept_by_layer(c, number):
    """Bytes per token that one layer keeps for its backward pass. c: ModelConfig; number: bytes of a number where autocast rounds
    (2 or 4). Letters as in model.py."""
    D, H, K, E = c.width, c.heads, c.kv_heads, c.head_dim
    norms, inputs = (1 if c.residual == "parallel, one norm" else 2), (2 if c.residual == "sequential" else 1)
    outputs = 2 if number == 2 else norms                                              # rounded for attention and MLP apart
    kept = inputs * 4 * D + outputs * number * D                                       # the norms' inputs and outputs
    kept += norms * (4 * D + 4 if c.norm == "rmsnorm" else 8)                          # x over its size, and one over the size
    kept += number * (H + 2 * K) * E + number * H * E + 4 * H                          # queries, keys, values; attention's output
    if c.positions == "rotary":
        kept += number * (H + K) * E                                                   # queries and keys, rotated
    if c.qk_norm:                                                                      # both normalized, and copies
        kept += 4 * (H + K) * (E + 1) + number * H * E + (4 * (H + K) * E if number == 2 else 0)
    return kept + number * c.ffn * (4 if c.gated else 1 if c.activation == "relu" else 2)


def passing_through(c, number):
    """Bytes per token that are alive at once within a layer when nothing is kept: the MLP's, its input, and the residual."""
    return number * c.ffn * (4 if c.gated else 2) + 16 * c.width


def count(c, share, kind):
    """Returns (all weights, those of the layers' matrices, trained weights, trained ones of the layers' matrices)."""
    language = kind in ("policy", "reference")
    with torch.device("meta"):
        one = Transformer(dataclasses.replace(c, layers=1), head=language)
    block, total = (sum(p.numel() for p in module.parameters()) for module in (one.blocks, one))
    matrices = sum(p.numel() for m in one.blocks.modules() if isinstance(m, nn.Linear) for p in m.parameters())
    rest = total - block + (0 if language else c.width + (kind == "value"))            # with the scalar head
    trained = c.layers - int(share * c.layers + 1e-9)
    embedding = sum(p.numel() for m in (one.embed, one.positions) if m is not None for p in m.parameters())
    return (c.layers * block + rest, c.layers * matrices,
            trained * block + rest - (embedding if share else 0), trained * matrices)


def bytes_of(o):
    """Of a number where autocast rounds."""
    return 2 if o.dtype == "bfloat16" else 4


def rows_at_once(o):
    """Rows of a micro-batch."""
    return o.micro_batch_size * dict(dpo=2, rm=2, rrhf=o.num_samples).get(o.script, 1)


def gathered(c, o, counts, gradients):
    """With --shard: a layer that runs and the next one, the rest of the model, and (gradients 1) their gradients before they are
    shared out. counts: of one model."""
    if not o.shard:
        return 0.0
    (n, m, t, tm), number = counts, bytes_of(o)
    return 2 * number * m / c.layers + 4 * (n - m) + gradients * ((number + 4) * tm / c.layers + 8 * (t - tm))


def rounded(o, counts):
    """The copies of trained matrices that autocast keeps during a step; sharded ones are gathered rounded."""
    return 0 if o.shard or o.dtype == "float32" else 2 * sum(tm for _, _, _, tm in counts)


def training(c, o, counts):
    """{what: bytes} of the forward and backward pass of a micro-batch. counts: of the models that are trained."""
    number, rows = bytes_of(o), rows_at_once(o)
    trained, tokens, layer = sum(t for _, _, t, _ in counts), rows * o.length, kept_by_layer(c, number)
    micro_batches, layers = -(-o.batch_size // (o.ranks * o.micro_batch_size)), c.layers - int(o.frozen_layers * c.layers + 1e-9)
    gradients = 4 * trained / (o.ranks if o.shard else 1)
    kept = len(counts) * tokens * (layers * (4 * c.width if o.gradient_checkpointing else layer) + 12 * c.width)
    logits = rows * o.response_length * (6 * min(4096, c.vocab_size) + 3 * number * c.width)
    found = {
        "gradients": gradients,
        "activations": kept,
        "a layer's, computed again": tokens * layer if o.gradient_checkpointing else 0,
        "logits and the head's gradient": (logits + 4 * c.vocab_size * c.width * (micro_batches > 1)) * (o.script != "rm"),
        "weights rounded by autocast": rounded(o, counts),
        "weights gathered": sum(gathered(c, o, model, 1) for model in counts),
        "gradients that travel": 4 * min(2 ** 24, trained) if o.ranks > 1 and not o.shard else 0}
    if micro_batches == 1:                        # gradients come as activations go
        found["gradients in place of activations"] = -min(gradients, kept)
    return found


def sampling(c, o, counts, free):
    """{what: bytes} of the policy's samples. free: bytes beside what stays."""
    (n, m, _, _), number = counts, bytes_of(o)
    per_prompt = o.num_samples if o.script != "ppo" else 1
    drawn = min(512, -(-o.batch_size * per_prompt // o.ranks))
    prompts, token = -(-drawn // per_prompt), 2 * c.layers * c.kv_heads * c.head_dim * number
    found = {
        "cache": token * (prompts * (o.length - o.response_length) + drawn * o.response_length) + drawn * 16 * c.vocab_size,
        "prompts on their way": min(2 ** 14, prompts * o.length) * passing_through(c, number),
        "weights rounded by autocast": rounded(o, [counts])}
    whole = number * m + 4 * (n - m)
    if o.shard and whole <= free / 2:             # as in generate.gathered
        found["weights gathered"] = whole
    elif o.shard:
        found["weights gathered, layer by layer"] = gathered(c, o, counts, 0)
    return found


def scoring(c, o, counts):
    """{what: bytes} of a pass of the reference or the reward model. counts: of that model."""
    rows = dict(ppo=min(SCORED, o.micro_batch_size), rrhf=min(SCORED, o.micro_batch_size), dpo=rows_at_once(o),
                bon=min(SCORED, -(-o.batch_size * o.num_samples // o.ranks)))[o.script]
    return {"activations": rows * o.length * passing_through(c, bytes_of(o)), "weights gathered": gathered(c, o, counts, 0)}


def estimate(c, o):
    """Returns ({what: bytes that stay}, {phase: {what: bytes on top}}) of one process. c: ModelConfig of all models; o:
    Options."""
    parts = o.ranks if o.shard else 1
    counts = {kind: count(c, o.frozen_layers, kind) for kind in TRAINED[o.script] + FROZEN[o.script]}
    trained, frozen = ([counts[kind] for kind in kinds[o.script]] for kinds in (TRAINED, FROZEN))
    held = 4 * sum(n for n, _, _, _ in frozen)
    held -= sum((4 - bytes_of(o)) * counts[kind][1] for kind in FROZEN[o.script] if kind != "policy")     # matrices, rounded
    stays = {"weights that are trained": 4 * sum(n for n, _, _, _ in trained) / parts,
             "frozen weights": held / parts,
             "optimizer": 4 * STATES[o.optimizer] * sum(t for _, _, t, _ in trained) / parts}
    phases = {}
    if trained:
        phases["training"] = training(c, o, trained)
    if o.script in SAMPLES:
        phases["sampling"] = sampling(c, o, counts["policy"], o.memory * GIB - sum(stays.values()))
    if frozen:
        phases["scoring"] = scoring(c, o, frozen[-1])
    return stays, phases


def peak(c, o):
    """Returns the bytes of the phase that takes most."""
    stays, phases = estimate(c, o)
    return sum(stays.values()) + max(sum(phase.values()) for phase in phases.values())


REMEDIES = {"--dtype bfloat16": dict(dtype="bfloat16"), "--gradient_checkpointing": dict(gradient_checkpointing=True),
            "--shard": dict(shard=True), "--micro_batch_size 1": dict(micro_batch_size=1),
            "--optimizer adafactor": dict(optimizer="adafactor"), "--frozen_layers 0.8": dict(frozen_layers=0.8)}
CHANGES = ["--optimizer adafactor", "--frozen_layers 0.8"]       # what is learned


def what_would_fit(c, o):
    """Returns (the fewest options that make the run fit, as one text, and the Options with them), or None. Those that change what
    is learned, with another optimizer or frozen layers, come last."""
    if peak(c, o) <= 0.9 * o.memory * GIB:
        return "", o
    useful = {name: change for name, change in REMEDIES.items() if dataclasses.replace(o, **change) != o
              and (o.ranks > 1 or "shard" not in change) and (o.script not in ("ppo", "bon") or "optimizer" not in change)
              and (o.script != "bon" or not {"gradient_checkpointing", "micro_batch_size", "frozen_layers"} & change.keys())}
    several = [names for k in range(1, len(useful) + 1) for names in itertools.combinations(useful, k)]
    for names in sorted(several, key=lambda names: [name in names for name in CHANGES[::-1]]):
        changed = dataclasses.replace(o, **{k: v for name in names for k, v in useful[name].items()})
        if peak(c, changed) <= 0.9 * o.memory * GIB and not (changed.shard and changed.optimizer == "adafactor"):
            return " ".join(names), changed
    return None


def table(script, ranks=(1, 8, 64)):
    """Returns a Markdown table of the shapes: what a process takes with --dtype bfloat16 and the options that it needs to fit."""
    lines = [f"| {script} | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in ranks) + " |", "|---|" + "---|" * len(ranks)]
    for shape in SHAPES:
        cells, c = [], config_of("", shape)
        for n in ranks:
            found = what_would_fit(c, Options(script=script, ranks=n, dtype="bfloat16", batch_size=512))
            size = f"{peak(c, found[1]) / GIB:.0f} GiB" if found else "does not fit"
            cells.append(size + (f" `{found[0]}`" if found and found[0] else ""))
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def config_of(folder, shape):
    """Returns the ModelConfig of a folder or of a name in SHAPES."""
    if folder:
        return ModelConfig(**read_config(folder)[0])
    if not shape:
        raise UserError(f"name a checkpoint folder, or --shape {'|'.join(SHAPES)}")
    return ModelConfig.for_family("llama", **SHAPES[shape])


def report(c, o):
    """Returns the text that the program prints."""
    stays, phases = estimate(c, o)
    lines = [f"{o.script} with models of {count(c, 0.0, 'policy')[0] / 1e9:.3g} billion weights, {o.ranks} "
             f"{'process' if o.ranks == 1 else 'processes'}, {o.dtype}; GiB per process:"]

    def line(what, size, indent=2):
        if size:
            lines.append(f"{' ' * indent}{what:<{50 - indent}}{size / GIB:9.2f}")
    for what, size in stays.items():
        line(what, size)
    for name, phase in phases.items():
        line(f"{name}, in all", sum(stays.values()) + sum(phase.values()))
        for what, size in phase.items():
            line(what, size, 4)
    found = what_would_fit(c, o)
    fits = found is not None and not found[0]
    lines.append(f"At most {peak(c, o) / GIB:.2f} GiB: {'fits' if fits else 'does not fit'} into 90% of {o.memory:g} GiB.")
    if found and found[0]:
        lines.append(f"It fits with {found[0]}: {peak(c, found[1]) / GIB:.2f} GiB.")
    elif not found:
        lines.append("It takes more processes (--ranks, with --shard), or shorter rows.")
    return "\n".join(lines)


def main():
    folders = leading_words()
    o = parse_options(Options, __doc__, sys.argv[1 + len(folders):],
                            prog="python -m nanorlhf.memory [FOLDER]")
    with one_line_errors(o, lambda: "give the same command again"):
        check_options(o)
        if len(folders) > 1 or folders and o.shape:
            raise UserError("name one checkpoint folder, or --shape")
        if o.shard and o.optimizer == "adafactor":
            raise UserError("--optimizer adafactor does not work with --shard")
        if o.shard and o.ranks == 1:
            raise UserError("--shard splits the models over several processes: give their number with --ranks")
        print(table(o.script) if o.table else report(config_of(folders[0] if folders else "", o.shape), o))


if __name__ == "__main__":
    main()
