"""Rewards: functions (prompts, responses, texts) -> float32 tensor [N]."""

import importlib.util
import traceback
from pathlib import Path

import torch

from nanorlhf import reviews
from nanorlhf.data import (Example, collate, decode_response, encode_prompt, encode_response, micro_batches, tokenizer_of)
from nanorlhf.model import RewardModel
from nanorlhf.run import UserError, local_folder, need_fit


def reads_text(spec):
    """Whether a reward is a function of texts, and no model."""
    return spec == "gold" or ".py:" in spec


def load_reward(spec, tokenizer, device, batch_size=128):
    """The function reward(prompts, responses, texts=None) -> float32 tensor [N] that `spec` names. prompts, responses: lists of
    ids; texts: the prompts as records hold them (None: their ids decoded, which will not do for conversations).

    `gold`; `file.py:function` with function(prompts: list[str], completions: list[str]) -> list[float]; or a reward model's
    folder or hub name. A model with the policy's tokenizer and chat template reads exactly what the policy wrote; another is
    given the texts in its own tokens.
    """
    if spec == "gold":
        return _text_reward(lambda ps, cs: [reviews.gold_reward(p, c) for p, c in zip(ps, cs)], tokenizer, spec)
    if ".py:" in spec:
        return _text_reward(_user_function(spec), tokenizer, spec)
    try:
        folder = local_folder(spec)
    except UserError as error:
        raise UserError(f"--reward {spec}: neither `gold`, nor file.py:function, nor a reward model: {error}")
    if not (folder / "config.json").exists():
        raise UserError(f"--reward {spec}: not a reward-model folder (train_rm.py makes one), `gold` or file.py:function")
    model, own = RewardModel.from_pretrained(folder).to(device).eval(), tokenizer_of(folder, tokenizer)
    context = model.config.context
    need_fit(model, own)
    same = own.same_ids(tokenizer) and own.chat_template == tokenizer.chat_template

    @torch.no_grad()
    def reward(prompts, responses, texts=None):
        if not same:
            texts = texts or [tokenizer.decode(p) for p in prompts]
            ended = [r[-1:] == [tokenizer.eos_id] for r in responses]
            responses = [encode_response(own, decode_response(tokenizer, r, t), t)[:None if e else -1]
                         for r, e, t in zip(responses, ended, texts)]
            prompts = [encode_prompt(own, t, max(1, context - len(r))) for r, t in zip(responses, texts)]
        examples = [Example(p + r, len(p)) for p, r in zip(prompts, responses)]
        out = torch.empty(len(examples))
        order = iter(micro_batches(range(len(examples)), batch_size, length=lambda i: len(examples[i].tokens)))
        for rows in order:
            batch = collate([examples[i] for i in rows], own.pad_id, device)
            out[list(rows)] = model.score(batch.tokens, batch.lengths).cpu()
        return out
    return reward


def _text_reward(function, tokenizer, spec):
    def reward(prompts, responses, texts=None):
        texts = texts or [tokenizer.decode(p) for p in prompts]
        try:
            values = function(texts, [decode_response(tokenizer, r, t) for r, t in zip(responses, texts)])
        except Exception as error:                        # the user's code: say where in it, in one line
            raise UserError(f"--reward {spec}: {_where(error)}")
        try:
            values = torch.tensor([float(v) for v in values])
        except (TypeError, ValueError):
            raise UserError(f"--reward {spec}: did not return a list of numbers")
        if len(values) != len(prompts) or not torch.isfinite(values).all():
            raise UserError(f"--reward {spec}: {len(prompts)} finite numbers expected, got {len(values)}: {values.tolist()[:4]}")
        return values
    return reward


def _where(error):
    """An exception in one line: what it is, and the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(frame.filename).name}:{frame.lineno})"


def _user_function(spec):
    file, name = spec.rsplit(":", 1)
    if not Path(file).is_file():
        raise UserError(f"--reward {spec}: no file {file}")
    module_spec = importlib.util.spec_from_file_location("user_reward", file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward {spec}: {_where(error)}")
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: {file} has no function {name}")
    return getattr(module, name)
