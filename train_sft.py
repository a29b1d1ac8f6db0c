"""Supervised fine-tuning (SFT): maximise the likelihood of demonstrations given their prompts.

    L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t          m_t = 1 on response tokens, EOS included

The same script pretrains (--kind text: every token counts) and does Preferred-FT (--data with chosen and
rejected: SFT on the chosen response; Rafailov 2023, section 6).

The prompt is masked, as in Kirk 2023; --train_on_prompt counts its tokens too, as in Huang 2024. The loss is
a mean over the tokens of the whole batch, so a long response weighs more than a short one, and the result
does not depend on the micro-batches.

Without options it fine-tunes out/base on the built-in reviews. To pretrain that base model first:
    python train_sft.py --init scratch --family llama --kind text --packing false --lr 2.5e-3 --out out/base
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from nanorlhf.data import (Group, collate, describe, length_limits, load_and_hold_out, make_all_turns_example,
                           make_example, pack_texts, post_of, with_progress)
from nanorlhf.files import require_folder
from nanorlhf.metrics import with_error
from nanorlhf.model import Transformer
from nanorlhf.options import main
from nanorlhf.run import MAKE_BASE, Run, new_model
from nanorlhf.tokenizer import load_tokenizer
from nanorlhf.training import batch_indices, learning_rate, make_optimizer, optimizer_step, steps_of


@dataclass
class Config:
    # SFT
    kind: Literal["completion", "text"] = "completion"  # completion: prompt and response; text: pretraining
    packing: bool = True             # text: fill rows with several texts; False = each begins its own row
    train_on_prompt: bool = False    # count the prompt's tokens too
    all_turns: bool = False          # train on all turns of the assistant, not only the last

    # Data
    init: str = "out/base"           # starting checkpoint: folder or hub name; `scratch` = new weights
    data: str = "reviews"            # record file, or `reviews` (40000 texts, or 8000 demonstrations)
    eval_data: str = ""              # held-out record file; '' = hold out a part of --data
    eval_fraction: float = 0.05      # share of --data to hold out if there is no --eval_data
    columns: str = ""                # other names of its columns, OURS=THEIRS: prompt=question,chosen=good
    limit: int = 0                   # use at most this many records; 0 = all
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first

    # New model, with --init scratch
    tokenizer: str = "reviews"       # tokenizer folder, file or name
    family: str = "gpt2"  # gptj, gpt_neox, opt, llama, mistral, qwen2, qwen3, phi3, starcoder2 or stablelm
    context: int = 128               # longest sequence in tokens
    width: int = 128                 # of the hidden states
    layers: int = 2                  # number of blocks
    heads: int = 4                   # query heads per block
    kv_heads: int = 0                # key-value heads per block; 0 = as many as heads

    # Lengths in tokens
    max_length: int = 0              # longest prompt + response; 0 = the model's context
    max_prompt_length: int = 0       # cut longer prompts to this; 0 = half of max_length
    keep: Literal["end", "start", "tldr"] = "end"  # what an overlong prompt keeps (tldr: Stiennon's rule)

    # Optimisation
    epochs: float = 1.0              # passes over the data
    max_steps: int = 0               # number of steps; 0 = from --epochs
    batch_size: int = 32             # rows per step
    micro_batch_size: int = 0        # rows in memory at a time; 0 = batch_size
    gradient_checkpointing: bool = False  # compute each layer again in the backward pass, to save memory
    frozen_layers: float = 0.0       # do not train this share of the layers, the lowest, and the embeddings
    lr: float = 1e-3                 # peak learning rate
    warmup_steps: int = 20           # linear warm-up
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # after the warm-up
    optimizer: Literal["adamw", "adam", "rmsprop", "adafactor"] = "adamw"  # update rule
    weight_decay: float = 0.0        # on matrices only; apart from the loss in AdamW
    max_grad_norm: float = 1.0       # clip the gradient's norm to this; 0 = off

    # Run
    eval_every: int = 100            # steps between evaluations, one after the last step included; 0 = never
    save_every: int = 200            # steps between checkpoints; 0 = none
    out: str = "out/sft"             # run folder
    overwrite: bool = False          # overwrite an existing run
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto = a GPU if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 is autocast; weights stay float32
    compile: bool = False            # torch.compile the layers
    shard: bool = False              # with torchrun: split each model over the processes (FSDP2)
    deterministic: bool = False      # on a GPU: kernels that give the same bits every time; slower
    tensorboard: bool = False        # write the metrics for TensorBoard too, into --out/tensorboard


def sft_loss(logprobs, mask, count):
    """- sum of m_t log pi(y_t | x, y_<t), divided by `count`, the response tokens of the whole batch. Scalar.

    logprobs [B, T] float, mask [B, T] bool. Micro-batches of one batch share `count`, so their losses add up.
    """
    return -(logprobs * mask).sum() / count


def to_groups(records, tokenizer, config, context):
    """Records -> Groups of one example: a demonstration, or a block of packed texts."""
    cut = *length_limits(config, context), config.keep
    if config.kind == "text":
        texts = [r["text"] for r in records]
        streams = [texts] if config.packing else [[text] for text in texts]
        return [Group([e]) for stream in streams for e in pack_texts(tokenizer, stream, cut[0])]
    if config.all_turns:
        examples = [make_all_turns_example(tokenizer, r["prompt"], r["completion"], *cut, r.get("given", ()))
                    for r in records]
    else:
        examples = [make_example(tokenizer, r["prompt"], r["completion"], *cut)
                    for r in with_progress(records, "demonstrations tokenised")]
    if config.train_on_prompt:
        examples = [e._replace(prompt_length=1, given=()) for e in examples]
    return [Group([e], (), post_of(r)) for e, r in zip(examples, records)]


class Forward(NamedTuple):
    logprobs: torch.Tensor           # [B, T] log pi(y_t | x, y_<t), 0 outside the mask
    mask: torch.Tensor               # [B, T] True on the tokens that count


def forward(model, groups, tokenizer, run):
    """One forward pass over all examples of these groups."""
    examples = [e for g in groups for e in g.examples]
    batch = collate(examples, tokenizer.pad_id, run.device)
    with run.autocast():
        logprobs = model.logprobs(batch.tokens, batch.mask, where=batch.where)   # [B, T]
    return Forward(logprobs, batch.mask)


@torch.no_grad()
def evaluate(model, groups, tokenizer, run):
    """Mean loss per token on held-out examples, in nats, and its standard error."""
    def measured(part):
        out = forward(model, part, tokenizer, run)
        return zip((-out.logprobs.sum(1)).tolist(), out.mask.sum(1).tolist())
    if not groups:
        return {}
    losses, counts = zip(*run.of_each(groups, measured))
    posts = [g.post for g in groups]                                         # packed texts have none
    return with_error("eval/loss", losses, counts, posts if any(posts) else None)


def train(config):
    run = Run(config, "sft")
    if run.finished:
        return
    if config.init == "scratch":
        tokenizer, model = new_model(config)
    else:
        init = require_folder(config.init, MAKE_BASE, Config.init)
        tokenizer, model = load_tokenizer(init), Transformer.from_pretrained(init)
    run.prepare(model, tokenizer)

    limit = {"text": 40000, "completion": 8000}[config.kind] if config.data == "reviews" else None
    records, held_out = load_and_hold_out(config, config.kind, tokenizer, default_limit=limit)
    groups = to_groups(records, tokenizer, config, model.config.context)
    eval_groups = to_groups(held_out, tokenizer, config, model.config.context)

    describe(run.name, tokenizer, [e for g in groups for e in g.examples])

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    run.begin(state["step"])
    total = config.max_steps or steps_of(config.epochs, len(groups), config.batch_size)
    for step in range(state["step"], total):
        rows = batch_indices(len(groups), config.batch_size, step, config.seed)
        count = sum(e.count for i in rows for e in groups[i].examples)       # response tokens of the batch
        parts, tokens = [], sum(groups[i].tokens for i in rows)
        with run.autocast():
            for part in run.micro_batches([groups[i] for i in rows]):
                out = forward(model, part, tokenizer, run)
                loss = sft_loss(out.logprobs, out.mask, count)
                loss.backward()
                parts.append({"loss": loss})
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        [norm], sums = optimizer_step({optimizer: lr}, config.max_grad_norm, step + 1, rows, parts)

        metrics = {**sums, "lr": lr, "grad_norm": norm}
        if run.due(config.eval_every, step + 1, total):
            metrics |= evaluate(model, eval_groups, tokenizer, run)
        run.log(step + 1, total, metrics, tokens)
        run.checkpoint(step + 1, total, {"model": model}, {"optimizer": optimizer})
    run.finish(model, tokenizer)


if __name__ == "__main__":
    main(Config, train, __doc__)
