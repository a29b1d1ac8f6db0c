"""Supervised fine-tuning: maximise the likelihood of demonstrations given their prompts.

    L = - sum_t m_t log pi(y_t | x, y_<t) / sum_t m_t          m_t = 1 on response tokens, EOS included

The same script pretrains (--kind text: every token counts) and does Preferred-FT (--data with chosen/rejected: SFT on the
chosen response; Rafailov 2023, section 6). Kirk 2023 masks the prompt, as here; --train_on_prompt true is Huang 2024's.
The loss is averaged over the tokens of the whole batch, so long responses weigh more than short ones, whatever the
micro-batches.

With no option it fine-tunes out/base on the built-in reviews. To pretrain that base model first:
    python train_sft.py --init scratch --kind text --lr 5e-3 --batch_size 16 --out out/base
"""

from dataclasses import dataclass

import torch

from nanorlhf.data import (batch_indices, collate, load_records, load_tokenizer, make_example, make_turns_example, micro_batches,
                           pack_texts, split_records, steps_of)
from nanorlhf.model import ModelConfig, Transformer
from nanorlhf.run import Run, UserError, learning_rate, main, make_optimizer, need_folder


@dataclass
class Config:
    init: str = "out/base"           # starting checkpoint folder, or `scratch` for new weights
    data: str = "reviews"            # record file, or `reviews`
    kind: str = "completion"         # completion (prompt -> response), or text (pretraining)
    eval_data: str = ""              # held-out record file; '' holds out a part of --data
    limit: int = 0                   # at most so many records; 0 = all (of `reviews`: 40000 texts, 8000 demonstrations)
    skip_bad: bool = False           # skip bad rows and count them, instead of stopping at the first
    out: str = "out/sft"             # run folder
    overwrite: bool = False          # replace a run that is there
    resume: bool = False             # continue the run in --out from its newest checkpoint
    seed: int = 0                    # of everything random
    device: str = "auto"             # cpu, cuda, cuda:1, ...; auto takes a GPU if there is one
    dtype: str = "float32"           # float32, or bfloat16 (autocast; weights stay float32)
    compile: bool = False            # torch.compile the layers

    tokenizer: str = "reviews"       # with --init scratch: tokenizer folder, file or name
    family: str = "gpt2"             # with --init scratch: gpt2, gptj, gpt_neox, opt, llama, mistral, qwen2 or qwen3
    context: int = 128               # with --init scratch: longest sequence
    width: int = 128                 # with --init scratch
    layers: int = 2                  # with --init scratch
    heads: int = 4                   # with --init scratch
    kv_heads: int = 0                # with --init scratch: 0 = as many as heads

    max_length: int = 0              # longest prompt + response in tokens; 0 = the model's context
    max_prompt_length: int = 0       # a row that is too long has its prompt cut to this first; 0 = half of max_length
    keep: str = "end"                # what a too long prompt keeps: end, start, or tldr (Stiennon 2020's rule)
    train_on_prompt: bool = False    # count the prompt's tokens too
    all_turns: bool = False          # of a conversation: count every turn of the assistant, not the last alone
    epochs: float = 1.0              # passes over the data
    max_steps: int = 0               # train for so many steps, whatever --epochs; 0 = as many as they make
    batch_size: int = 32             # rows a step
    micro_batch_size: int = 0        # rows at a time in memory; 0 = batch_size
    lr: float = 1e-3                 # peak learning rate
    warmup_steps: int = 20           # linear warm-up
    lr_schedule: str = "cosine"      # cosine, linear or constant
    optimizer: str = "adamw"         # adamw, adam or rmsprop
    weight_decay: float = 0.0        # on matrices
    max_grad_norm: float = 1.0       # clip to this norm; 0 = off
    eval_fraction: float = 0.05      # share of --data held out when there is no --eval_data
    eval_every: int = 100            # steps between evaluations, the last step included; 0 = never
    save_every: int = 200            # steps between checkpoints; 0 = none


def sft_loss(logprobs, mask, count):
    """-sum of m_t log pi(y_t | x, y_<t), divided by `count`, the number of tokens of the whole batch. Scalar.

    logprobs [B, T] float, mask [B, T] bool; micro-batches of one batch share `count`, so that their losses add up.
    """
    return -(logprobs * mask).sum() / count


def train(config):
    run = Run(config, "sft", kind=("completion", "text"))
    if run.finished:
        return
    if config.init == "scratch":
        tokenizer = load_tokenizer(config.tokenizer)
        kv_heads = config.kv_heads or config.heads
        if min(config.width, config.layers, config.heads, kv_heads) < 1 or config.width % config.heads or config.heads % kv_heads:
            raise UserError(f"--width {config.width} --layers {config.layers} --heads {config.heads} --kv_heads {kv_heads}: "
                            f"the heads must divide the width, and the kv_heads the heads")
        shape = dict(family=config.family, vocab_size=tokenizer.vocab_size, context=config.context, width=config.width,
                     layers=config.layers, heads=config.heads, kv_heads=kv_heads, head_dim=config.width // config.heads,
                     bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
        model = Transformer(ModelConfig.for_family(**shape), config.seed)
    else:
        init = need_folder(config.init, "python train_sft.py --init scratch --kind text --lr 5e-3 --batch_size 16 --out out/base")
        tokenizer, model = load_tokenizer(init), Transformer.from_pretrained(init)
    run.prepare(model, tokenizer)

    # Records -> examples: token rows of which the part after the prompt is trained on.
    max_length = config.max_length or model.config.context
    limit = config.limit or ((40000 if config.kind == "text" else 8000) if config.data == "reviews" else None)
    records = load_records(config.data, config.kind, limit=limit, skip_bad=config.skip_bad, tokenizer=tokenizer)
    if config.eval_data:
        held_out = load_records(config.eval_data, config.kind, skip_bad=config.skip_bad, tokenizer=tokenizer)
    else:
        records, held_out = split_records(records, config.eval_fraction, config.seed)
    examples, eval_examples = (to_examples(r, tokenizer, config, max_length) for r in (records, held_out))

    optimizer = make_optimizer(model.parameters(), config.optimizer, config.lr, config.weight_decay)
    state = run.load_checkpoint({"model": model}, {"optimizer": optimizer})
    total = config.max_steps or steps_of(config.epochs, len(examples), config.batch_size)
    for step in range(state["step"], total):
        rows = batch_indices(len(examples), config.batch_size, step, config.seed)
        parts = [collate(part, tokenizer.pad_id, run.device)
                 for part in micro_batches([examples[i] for i in rows], config.micro_batch_size or config.batch_size)]
        count = sum(int(part.mask.sum()) for part in parts)
        loss_sum = 0.0
        for part in parts:
            with run.autocast():
                logprobs = model.logprobs(part.tokens, part.mask)                      # [B, T]
            loss = sft_loss(logprobs, part.mask, count)
            loss.backward()
            loss_sum += loss.item()
        lr = learning_rate(step, total, config.lr, config.warmup_steps, config.lr_schedule)
        norm = run.step({optimizer: lr}, config.max_grad_norm, step + 1, rows, loss_sum)

        metrics = {"loss": loss_sum, "lr": lr, "grad_norm": norm}
        if eval_examples and run.every(config.eval_every, step + 1, total):
            metrics["eval/loss"] = evaluate(model, eval_examples, tokenizer, run, config)
        run.log(step + 1, total, metrics, tokens=sum(int(part.lengths.sum()) for part in parts))
        if run.every(config.save_every, step + 1, total):
            run.save_checkpoint(step + 1, {"model": model}, {"optimizer": optimizer})
    run.finish(model, tokenizer)


def to_examples(records, tokenizer, config, max_length):
    if config.kind == "text":
        return pack_texts(tokenizer, [r["text"] for r in records], max_length) if records else []
    make = make_turns_example if config.all_turns else make_example
    max_prompt_length = config.max_prompt_length or max_length // 2
    examples = [make(tokenizer, r["prompt"], r["completion"], max_length, max_prompt_length, config.keep) for r in records]
    return [e._replace(prompt_length=1, given=()) for e in examples] if config.train_on_prompt else examples


@torch.no_grad()
def evaluate(model, examples, tokenizer, run, config):
    """Mean loss per token on held-out examples, nats."""
    total, count = 0.0, 0
    for part in micro_batches(examples, config.micro_batch_size or config.batch_size):
        batch = collate(part, tokenizer.pad_id, run.device)
        with run.autocast():
            total -= float(model.logprobs(batch.tokens, batch.mask).sum())
        count += int(batch.mask.sum())
    return total / count


if __name__ == "__main__":
    main(Config, train, __doc__)
