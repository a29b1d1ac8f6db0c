"""Decoding with a KV cache: generate() draws samples; beam_search() finds likely (or diverse) continuations.

`python -m nanorlhf.generate RUN [RUN...] --prompt "..."` prints samples from any checkpoint folders, for comparison.
"""

import dataclasses
import math

import numpy as np
import torch

from nanorlhf.data import encode_prompt
from nanorlhf.errors import UserError
from nanorlhf.kernels import filter_logits, sample
from nanorlhf.model import Cache, Transformer


@dataclasses.dataclass
class Samples:
    """Responses without their prompts, right padded. Row p*num_samples + i is sample i of prompt p; EOS is included."""
    tokens: torch.Tensor      # [R, T] int64
    logprobs: torch.Tensor    # [R, T] float32, under the distribution sampled from; 0 outside the mask
    mask: torch.Tensor        # [R, T] bool: response tokens up to and including EOS
    finished: torch.Tensor    # [R] bool: ended by EOS or a stop string, not by max_new_tokens

    def responses(self):
        """Returns the rows as lists of ids, without padding."""
        return [row[:n].tolist() for row, n in zip(self.tokens.cpu(), self.mask.sum(1).tolist())]


@torch.no_grad()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, num_samples=1, seed=0, stop=(),
             tokenizer=None, batch_size=256, first_row=0):
    """Samples num_samples responses of at most max_new_tokens tokens to each prompt. prompts: lists of ids, none empty.

    temperature 0 is greedy; top_k 0 and top_p 1 are off. stop: strings that end a response when its text, special tokens
    included, contains one (needs the tokenizer; the text up to and including the string is kept). Any of the tokenizer's
    end_ids ends a response (without a tokenizer: of config.json's), and ids beyond its vocabulary are never drawn. Row r uses
    only the random stream (seed, first_row + r), so its draws depend neither on its neighbours nor on batch_size, the number of
    rows decoded at once, and a caller that splits its prompts over several calls can number them through. Raises UserError if
    a prompt leaves no room in the context.
    """
    if stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer")
    fits = num_samples >= 1 and (temperature == 0 or 1e-3 <= temperature < math.inf) and top_k >= 0 and 0 <= top_p <= 1
    if not fits or not 0 <= seed < 2**64 or "" in stop:
        raise UserError(f"num_samples {num_samples}, temperature {temperature}, top_k {top_k}, top_p {top_p}, seed {seed}, stop "
                        f"{list(stop)}: need at least 1 sample, a temperature of 0 or from 1e-3, a top_k and seed of at least 0, "
                        f"a top_p in [0, 1] and no empty stop string")
    check_prompts(model, prompts, max_new_tokens)
    device = model.embed.weight.device
    R = len(prompts) * num_samples
    uniform = np.empty((R, max_new_tokens), dtype=np.float32)
    for row in range(R):
        stream = np.random.Generator(np.random.Philox(key=[seed, first_row + row]))
        uniform[row] = stream.random(max_new_tokens, dtype=np.float32)
    uniform = torch.from_numpy(uniform).to(device)
    pad = model.config.pad_id or 0
    out = Samples(torch.full((R, max_new_tokens), pad, device=device), torch.zeros(R, max_new_tokens, device=device),
                  torch.zeros(R, max_new_tokens, dtype=torch.bool, device=device),
                  torch.zeros(R, dtype=torch.bool, device=device))
    by_length = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))             # so that a chunk has little padding
    size = max(1, batch_size // num_samples)
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    for first in range(0, len(prompts), size):
        chunk = by_length[first:first + size]
        rows = torch.tensor([p * num_samples + i for p in chunk for i in range(num_samples)], device=device)
        _decode(model, [prompts[p] for p in chunk], rows, uniform[rows], num_samples, out, options, stop, tokenizer)
    longest = int(out.mask.sum(1).max()) if R else 0
    return Samples(out.tokens[:, :longest], out.logprobs[:, :longest], out.mask[:, :longest], out.finished)


def repeated(items, num_samples):
    """Repeats each item num_samples times, [a, b] -> [a, a, ..., b, b, ...]: from one per prompt to one per sample."""
    return [item for item in items for _ in range(num_samples)]


def check_prompts(model, prompts, max_new_tokens):
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} new tokens: must be at least 1")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: begin it with a token (encode_prompt gives one)")
        if len(prompt) + max_new_tokens > model.config.context:
            raise UserError(f"prompt {i} has {len(prompt)} tokens: with {max_new_tokens} new ones it does not fit the "
                            f"context of {model.config.context}")


def prefill(model, prompts, num_samples, max_new_tokens):
    """Runs each prompt once. Returns the cache and the logits of the first new token, [P, V] float32.

    A few prompts run at once: if they are sorted by length, they need little padding, and what a layer holds of them stays
    small (on a CPU, near its cache).
    """
    device = model.embed.weight.device
    lengths = [len(p) for p in prompts]
    cache = Cache(torch.tensor(lengths, device=device), num_samples, max_new_tokens)
    size, logits = max(1, (2**9 if device.type == "cpu" else 2**14) // max(lengths)), []
    for first in range(0, len(prompts), size):
        part = prompts[first:first + size]
        last = torch.tensor([len(p) - 1 for p in part], device=device)
        tokens = torch.tensor([p + [0] * (max(map(len, part)) - len(p)) for p in part], device=device)
        hidden = model(tokens, cache)
        logits.append(model.logits(hidden[torch.arange(len(part), device=device), last]).float())
    return cache, torch.cat(logits)


def _vocabulary(model, tokenizer):
    """Returns (ids that end a response, number of ids that may be drawn)."""
    if tokenizer:
        return list(tokenizer.end_ids), min(model.vocab, tokenizer.vocab_size)
    return list(model.config.end_ids) or [i for i in [model.config.eos_id] if i is not None], model.vocab


def _decode(model, prompts, rows, uniform, n, out, options, stop, tokenizer):
    """Decodes one batch into rows `rows` of `out`. When enough rows have finished, they leave the batch and the cache."""
    ends, V = _vocabulary(model, tokenizer)
    ends, T = torch.tensor(ends, dtype=torch.long, device=rows.device), uniform.shape[1]
    cache, logits = prefill(model, prompts, n, T)
    logits = logits.repeat_interleave(n, 0)                                            # [R, V]
    alive = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    check_every = 1 if rows.device.type == "cpu" else 16                               # each check makes a GPU wait
    steps = []                                                                         # drawn, but not yet written to out
    for t in range(T):
        token, logprob = sample(logits[:, :V], uniform[:, t], **options)
        steps.append((token, logprob, alive))
        alive = alive & (token[:, None] != ends).all(1)
        if stop:
            steps = _write(out, rows, t + 1, steps)
            alive = alive & ~_stopped(out, rows, t, stop, tokenizer)
        if t + 1 == T:
            break
        if (t + 1) % check_every == 0 and not bool(alive.all()):
            grid = alive.view(-1, n)
            most, prompts_left = int(grid.sum(1).max()), grid.any(1).nonzero()[:, 0]
            if most == 0:
                break
            if len(prompts_left) * most <= 0.75 * len(rows):                           # worth copying the cache
                steps = _write(out, rows, t + 1, steps)
                out.finished[rows[~alive]] = True
                first = (~grid).to(torch.uint8).argsort(dim=1, stable=True)[prompts_left, :most]   # alive ones first
                kept = (prompts_left[:, None] * n + first).flatten()
                cache.keep(prompts_left, kept, most)
                n, rows, alive, token, uniform = most, rows[kept], alive[kept], token[kept], uniform[kept]
        logits = model.logits(model(token[:, None], cache)[:, 0]).float()
    _write(out, rows, t + 1, steps)
    out.finished[rows] |= ~alive


def _write(out, rows, end, steps):
    """Writes the last steps, up to position `end`, into `out`, except draws of finished rows; returns [], the new steps."""
    if steps:
        token, logprob, alive = (torch.stack(column, 1) for column in zip(*steps))
        span = slice(end - len(steps), end)
        out.tokens[rows, span] = torch.where(alive, token, out.tokens[rows, span])
        out.logprobs[rows, span] = torch.where(alive, logprob, 0.0)
        out.mask[rows, span] = alive
    return []


def _stopped(out, rows, t, stop, tokenizer):
    """Returns [R] bool: the row's text has a stop string that ends in token t. Decodes only the tail that can matter."""
    back = max(len(s.encode()) for s in stop) + 4                                      # a token is at least one byte
    tails = out.tokens[rows, max(0, t - back):t + 1].tolist()
    texts = [tokenizer.decode(tail, start=False, special=True) for tail in tails]
    return torch.tensor([any(s in text for s in stop) for text in texts], device=rows.device)


@torch.no_grad()
def beam_search(model, prompts, max_new_tokens, num_beams=4, num_groups=1, diversity_penalty=0.0, temperature=1.0,
                length_penalty=1.0, tokenizer=None, batch_size=64):
    """Returns the num_beams best hypotheses of each prompt, best first: per prompt a list of lists of ids, EOS included.

    Beam search over sums of log softmax(logits / temperature). A finished hypothesis scores sum / length^length_penalty, and
    so does a beam that reaches max_new_tokens. With num_groups > 1 it is diverse beam search (Vijayakumar 2016, arXiv
    1610.02424): the groups advance in turn, and a group's scores lose diversity_penalty for every beam of an earlier group
    that took the same token at this step. RRHF's BP is num_groups=1; its DP is num_groups=num_beams=4, penalty 1.0,
    temperature 0.8. A group stops when it has as many hypotheses as beams and none is worse than its best living beam at the
    current length. With length_penalty > 0 a longer one might still have been better; transformers stops there too. With a
    tokenizer, ids beyond its vocabulary are never taken.
    """
    check_prompts(model, prompts, max_new_tokens)
    if num_beams < 1 or num_groups < 1 or not 0 < temperature < math.inf:
        raise UserError(f"{num_beams} beams, {num_groups} groups, temperature {temperature}: each must be above 0")
    if num_beams % num_groups:
        raise UserError(f"{num_beams} beams do not divide into {num_groups} groups")
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    results = [None] * len(prompts)
    size = max(1, batch_size // num_beams)
    for first in range(0, len(prompts), size):
        chunk = order[first:first + size]
        found = _beams(model, [prompts[p] for p in chunk], max_new_tokens, num_beams, num_groups, diversity_penalty,
                       temperature, length_penalty, tokenizer)
        for p, hypotheses in zip(chunk, found):
            results[p] = hypotheses
    return results


def _beams(model, prompts, T, n, groups, penalty, temperature, length_penalty, tokenizer):
    P, b, (ends, V) = len(prompts), n // groups, _vocabulary(model, tokenizer)
    cache, logits = prefill(model, prompts, n, T)
    device = logits.device
    logits = logits.repeat_interleave(n, 0)
    scores = torch.zeros(P, groups, b, device=device)
    scores[:, :, 1:] = -torch.inf                                                      # a group's beams start alike
    tokens = torch.zeros(P, n, 0, dtype=torch.long, device=device)
    finished = [[[] for _ in range(groups)] for _ in range(P)]                         # (score, ids) per prompt and group
    everyone = torch.arange(P, device=device)
    for t in range(T):
        logp = filter_logits(logits[:, :V], temperature).log_softmax(-1).view(P, groups, b, V)
        taken = torch.zeros(P, V, device=device)
        parents = torch.zeros(P, n, dtype=torch.long, device=device)
        chosen = torch.zeros(P, n, dtype=torch.long, device=device)
        for g in range(groups):
            candidate = scores[:, g, :, None] + logp[:, g]                             # [P, b, V], the score of each beam
            ranked = candidate - penalty * taken[:, None]                              # what beams are chosen by
            some = min(b * (1 + len(ends)), b * V)                                     # enough: b per EOS can end, b go on
            top = ranked.view(P, -1).topk(some, dim=1).indices
            worth = candidate.view(P, -1).gather(1, top)
            for p in range(P):
                k = 0
                for rank, (index, value) in enumerate(zip(top[p].tolist(), worth[p].tolist())):
                    beam, token = g * b + index // V, index % V
                    if value == -torch.inf or k == b:
                        continue
                    if token in ends:
                        if rank < b:
                            ids = tokens[p, beam].tolist() + [token]
                            finished[p][g].append((value / len(ids) ** length_penalty, ids))
                        continue
                    parents[p, g * b + k], chosen[p, g * b + k], scores[p, g, k] = beam, token, value
                    taken[p, token] += 1
                    k += 1
                scores[p, g, k:] = -torch.inf
        tokens = torch.cat([tokens.gather(1, parents[..., None].expand_as(tokens)), chosen[..., None]], -1)
        for p in range(P):      # a group that is done leaves at once, so that no prompt's result depends on the others
            for g, f in enumerate(finished[p]):
                if len(f) >= b and sorted(s for s, _ in f)[-b] >= float(scores[p, g].max()) / (t + 1) ** length_penalty:
                    scores[p, g] = -torch.inf
        if t + 1 == T or bool((scores == -torch.inf).all()):
            break
        cache.keep(everyone, (everyone[:, None] * n + parents).flatten(), n)
        logits = model.logits(model(chosen.view(-1, 1), cache)[:, 0]).float()
    results = []
    for p in range(P):
        best = []
        for g in range(groups):
            alive = [(float(s) / tokens.shape[2] ** length_penalty, tokens[p, g * b + k].tolist())
                     for k, s in enumerate(scores[p, g]) if s > -torch.inf]
            best += sorted(finished[p][g] + alive, key=lambda pair: -pair[0])[:b]
        results.append([ids for _, ids in sorted(best, key=lambda pair: -pair[0])])
    return results


def main():
    from nanorlhf.files import local_folder
    from nanorlhf.formats.chat import ASSISTANT, transcript
    from nanorlhf.model import check_fit, pick_device
    from nanorlhf.options import OneLineParser, one_line_errors
    from nanorlhf.tokenizer import load_tokenizer
    parser = OneLineParser(prog="python -m nanorlhf.generate", description="Prints samples of checkpoint folders.")
    parser.add_argument("runs", nargs="+", help="checkpoint folders")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue (several may be given)")
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message in a conversation")
    parser.add_argument("--system", help="system message of the conversation (with --chat)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest response in tokens (default: 64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = greedy (default: 1)")
    parser.add_argument("--top_k", type=int, default=0, help="0 = off (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 = off (default)")
    parser.add_argument("--num_samples", type=int, default=2, help="samples per prompt (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--stop", action="append", default=[], help="string that ends a response (several may be given)")
    options = parser.parse_args()
    if options.system is not None and not options.chat:
        parser.error("--system needs --chat")
    system = [{"role": "system", "content": options.system}] if options.system else []
    with one_line_errors(options, lambda: "give the same command again"):
        device = pick_device("auto")
        models = [(r, Transformer.from_pretrained(r).to(device), load_tokenizer(local_folder(r))) for r in options.runs]
        for _, model, tokenizer in models:
            check_fit(model, tokenizer)
        for prompt in options.prompt:
            print(f"\n=== {prompt}")
            if options.chat:
                prompt = transcript([*system, {"role": "user", "content": prompt}], "--prompt or --system") + ASSISTANT
            for run, model, tokenizer in models:
                found = generate(model, [encode_prompt(tokenizer, prompt)], options.max_new_tokens, options.temperature,
                                 options.top_k, options.top_p, options.num_samples, options.seed, options.stop, tokenizer)
                for ids, finished in zip(found.responses(), found.finished.tolist()):
                    print(f"--- {run}\n{tokenizer.decode(ids, start=False)}{'' if finished else ' [...]'}")


if __name__ == "__main__":
    main()
