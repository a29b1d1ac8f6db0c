"""Decoding with a KV cache: generate() draws samples; beam_search() finds likely (or diverse) continuations.

`python -m nanorlhf.generate RUN [RUN...] --prompt "..."` prints samples from any checkpoint folders, for comparison.
"""

import contextlib
import dataclasses
import math

import numpy as np
import torch

from nanorlhf import ranks
from nanorlhf.data import encode_prompt, of_each, to_device
from nanorlhf.errors import UserError
from nanorlhf.formats.checkpoints import check_finite
from nanorlhf.kernels import filter_logits, packing_pays, sample, static_shapes
from nanorlhf.model import Cache, Transformer

GRAPHS = True  # a GPU replays decoding steps as a graph


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
             tokenizer=None, batch_size=512, first_row=0):
    """Samples num_samples responses of at most max_new_tokens tokens to each prompt. prompts: lists of ids, none empty.

    temperature 0 is greedy; top_k 0 and top_p 1 are off. stop: strings that end a response when its text, special tokens
    included, contains one (needs the tokenizer; the text up to and including the string is kept). Any of the tokenizer's
    end_ids ends a response (without a tokenizer: of config.json's), and ids beyond its vocabulary are never drawn. Row r uses
    only the random stream (seed, first_row + r), so its draws depend neither on its neighbours nor on batch_size, the number of
    rows decoded at once, and a caller that splits its prompts over several calls can number them through. Raises UserError if
    a prompt leaves no room in the context. The prompts are dealt out to the ranks; each returns the samples of all. A sharded
    model is gathered for the time of the call if it takes at most half of the free memory, else layer by layer at every step.
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
    mine = ranks.deal(range(len(prompts)), lambda p: len(prompts[p]))
    uniform = np.zeros((R + 1, max_new_tokens), dtype=np.float32)                      # row R is for what does not count
    for row in (p * num_samples + i for p in mine for i in range(num_samples)):
        stream = np.random.Generator(np.random.Philox(key=[seed, first_row + row]))
        uniform[row] = stream.random(max_new_tokens, dtype=np.float32)
    uniform = torch.from_numpy(uniform).to(device)
    pad = model.config.pad_id or 0
    out = Samples(torch.full((R + 1, max_new_tokens), pad, device=device), torch.zeros(R + 1, max_new_tokens, device=device),
                  torch.zeros(R + 1, max_new_tokens, dtype=torch.bool, device=device),
                  torch.zeros(R + 1, dtype=torch.bool, device=device))
    by_length = sorted(mine, key=lambda p: len(prompts[p]))                            # so that a chunk has little padding
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    with ready(model, R, max_new_tokens) as in_step:
        size, n = batch_shape(model, max(map(len, prompts), default=1), num_samples, max_new_tokens, batch_size)
        chunks = [by_length[i:i + size] for i in range(0, len(by_length), size)]
        jobs = [(chunk, range(i, min(i + n, num_samples))) for chunk in chunks for i in range(0, num_samples, n)]
        for (chunk, samples), counts in ranks.in_step(jobs, ([0], [0]), in_step):
            rows = to_device([p * num_samples + i if counts else R for p in chunk for i in samples], device)
            _decode(model, [prompts[p] for p in chunk], rows, uniform[rows], len(samples), out, options, stop, tokenizer, in_step)
    out = Samples(out.tokens[:R], out.logprobs[:R], out.mask[:R], out.finished[:R])
    ranks.add_up_rows([out.tokens.sub_(pad), out.logprobs, out.mask, out.finished])
    out.tokens += pad
    longest = int(out.mask.sum(1).max()) if R else 0
    return Samples(out.tokens[:, :longest], out.logprobs[:, :longest], out.mask[:, :longest], out.finished)


def free_memory(device):
    """Returns the bytes that new tensors may take on the device; None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


@contextlib.contextmanager
def ready(model, rows, steps):
    """Within it the model is ready to decode `rows` rows of `steps` tokens: gathered if it is sharded, with half of the free
    memory for it, and on a CPU packed, if that pays. Yields True if all ranks must run the model equally often."""
    device = model.embed.weight.device
    free = free_memory(device) if ranks.sharded else None
    with contextlib.ExitStack() as stack:
        if device.type == "cpu" and not (ranks.sharded or model.compiled or torch.is_autocast_enabled("cpu")):
            stack.enter_context(torch.inference_mode())                                # a twentieth of a step less than no_grad
            if packing_pays(rows, steps, model.parameters()):
                stack.enter_context(model.packed())
        yield stack.enter_context(ranks.gathered(model, free and free // 2))


def batch_shape(model, longest, num_samples, max_new_tokens, batch_size):
    """Returns (prompts, samples of each) that are decoded at once: about batch_size rows, or fewer if their cache and logits
    would take more than 0.8 of the free memory. longest: of the prompts, in tokens."""
    c, device = model.config, model.embed.weight.device
    prompts, free = max(1, batch_size // num_samples), free_memory(device)
    if free is None:
        return prompts, num_samples
    number = 2 if torch.is_autocast_enabled(device.type) else 4
    token = 2 * c.layers * c.kv_heads * c.head_dim * number                            # bytes of a token's keys and values
    row = token * max_new_tokens + 4 * 4 * c.vocab_size                                # logits, and copies in `sample`
    budget = int(0.8 * free)
    fit = budget // (token * longest + num_samples * row)
    if fit >= 1:
        return min(prompts, fit), num_samples
    return 1, max(1, (budget - token * longest) // row)


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


def prefill(model, prompts, num_samples, max_new_tokens, in_step=False):
    """Runs each prompt once. Returns the cache and the logits of the first new token, [P, V] float32.

    A few prompts run at once: if they are sorted by length, they need little padding, and what a layer holds of them stays
    small (on a CPU, near its cache). in_step: all ranks run the model equally often.
    """
    device = model.embed.weight.device
    lengths = [len(p) for p in prompts]
    cache = Cache(to_device(lengths, device), num_samples, max_new_tokens, static_shapes(device) or model.compiled)
    size, logits = max(1, (2**9 if device.type == "cpu" else 2**14) // max(lengths)), []
    parts = [prompts[i:i + size] for i in range(0, len(prompts), size)]
    for part, counts in ranks.in_step(parts, parts[0], in_step):
        T = max(map(len, part))
        hidden = model(to_device([p + [0] * (T - len(p)) for p in part], device), cache if counts else None)
        last = to_device([i * T + len(p) - 1 for i, p in enumerate(part)], device)
        logits += [model.logits(hidden.flatten(0, 1)[last]).float()] if counts else []
    logits = torch.cat(logits)
    check_finite({"its output": logits}, "the model's weights are too large, or it diverged in training")
    return cache, logits


def _vocabulary(model, tokenizer):
    """Returns (ids that end a response, number of ids that may be drawn)."""
    if tokenizer:
        return list(tokenizer.end_ids), min(model.vocab, tokenizer.vocab_size)
    return list(model.config.end_ids) or [i for i in [model.config.eos_id] if i is not None], model.vocab


class Decoding:
    """A batch of R rows that is being decoded. All that a step reads and writes lies on the device, the step's number included,
    and a step has the same shapes at any time, so that a GPU can replay it as a graph."""

    def __init__(self, model, cache, rows, uniform, vocabulary, options):
        """rows [R]: the rows' numbers in the result; uniform [R, T]; vocabulary: of `_vocabulary`; options: of `sample`."""
        self.model, self.cache, self.rows, self.uniform, self.options = model, cache, rows, uniform, options
        self.head, (ends, self.V) = model.output_head(), vocabulary
        R, T, device = *uniform.shape, uniform.device
        self.ends = to_device(torch.tensor(ends, dtype=torch.long), device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)                       # number of tokens drawn
        self.token = torch.zeros(R, dtype=torch.long, device=device)                   # the last ones
        self.alive = torch.ones(R, dtype=torch.bool, device=device)                    # not ended yet
        self.tokens = torch.zeros(R, T, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(R, T, device=device)
        self.mask = torch.zeros(R, T, dtype=torch.bool, device=device)
        self.forget_graph()

    def draw(self, logits):
        """Draws each row's next token from logits [R, V]."""
        uniform = self.uniform.index_select(1, self.t)[:, 0]
        token, logprob = sample(logits[:, :self.V], uniform, **self.options)
        for buffer, new in ((self.tokens, token), (self.logprobs, logprob), (self.mask, self.alive)):
            buffer.index_copy_(1, self.t, new[:, None])
        self.token.copy_(token)
        self.alive &= (token[:, None] != self.ends).all(1)
        self.t += 1

    def step(self):
        """Runs the model on the last tokens and draws the next."""
        self.draw(self.model.logits(self.model(self.token[:, None], self.cache)[:, 0], self.head).float())

    def forget_graph(self):
        self.graph, self.eager_steps = None, 0

    def advance(self):
        """Does a step. A GPU records the third as a graph and replays it from then on: one launch instead of hundreds. The first
        two are done as they are, because libraries prepare themselves in them. What a sharded model gathers is not recorded."""
        if not (GRAPHS and self.token.is_cuda) or ranks.sharded or self.eager_steps < 2:
            self.eager_steps += 1
            return self.step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):    # records the step, without doing it
                self.step()
        self.graph.replay()

    def write(self, out):
        """Writes what was drawn into the result; a row's draws after its end stay out of it."""
        out.tokens[self.rows] = torch.where(self.mask, self.tokens, out.tokens[self.rows])
        out.logprobs[self.rows] = torch.where(self.mask, self.logprobs, 0.0)
        out.mask[self.rows], out.finished[self.rows] = self.mask, ~self.alive

    def compact(self, out):
        """Takes rows that have ended out of the batch and the cache, if that saves enough. Returns whether any row is left."""
        grid = self.alive.view(-1, self.cache.n)
        most, prompts = int(grid.sum(1).max()), grid.any(1).nonzero()[:, 0]
        if 0 < len(prompts) * most <= 0.75 * len(self.rows):                           # worth copying the cache
            self.write(out)
            first = (~grid).to(torch.uint8).argsort(dim=1, stable=True)[prompts, :most]      # alive ones first
            kept = (prompts[:, None] * self.cache.n + first).flatten()
            self.cache.keep(prompts, kept, most)
            for name in ("rows", "uniform", "token", "alive", "tokens", "logprobs", "mask"):
                setattr(self, name, getattr(self, name)[kept])
            self.forget_graph()
        return most > 0


def _decode(model, prompts, rows, uniform, n, out, options, stop, tokenizer, in_step):
    """Decodes one batch into rows `rows` of `out`; with in_step, until the batches of all ranks have ended."""
    T = uniform.shape[1]
    cache, logits = prefill(model, prompts, n, T, in_step)
    batch = Decoding(model, cache, rows, uniform, _vocabulary(model, tokenizer), options)
    check_every = 16 if cache.static else 1                                            # each check makes a GPU wait
    batch.draw(logits.repeat_interleave(n, 0))
    for t in range(1, T + 1):
        if stop:
            batch.alive &= ~_stopped(batch.tokens[:, :t], stop, tokenizer)
        if t == T:
            break
        if t % check_every == 0:
            left = bool(batch.alive.all()) or batch.compact(out)
            if not (ranks.any_of(left) if in_step else left):
                break
        batch.advance()
    batch.write(out)


def _stopped(tokens, stop, tokenizer):
    """Returns [R] bool: the row's text has a stop string that ends in the last of its tokens [R, t]. Decodes only the tail that
    can matter."""
    back = max(len(s.encode()) for s in stop) + 5                                      # a token is at least one byte
    texts = [tokenizer.decode(tail, start=False, special=True) for tail in tokens[:, -back:].tolist()]
    return torch.tensor([any(s in text for s in stop) for text in texts], device=tokens.device)


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
    with ready(model, len(prompts) * num_beams, max_new_tokens) as in_step:
        return of_each(prompts, max(1, batch_size // num_beams), lambda chunk: _beams(
            model, chunk, max_new_tokens, num_beams, num_groups, diversity_penalty, temperature, length_penalty, tokenizer,
            in_step), len)


def _beams(model, prompts, T, n, groups, penalty, temperature, length_penalty, tokenizer, in_step):
    P, b, (ends, V) = len(prompts), n // groups, _vocabulary(model, tokenizer)
    cache, logits = prefill(model, prompts, n, T, in_step)
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
        left = t + 1 < T and bool((scores > -torch.inf).any())
        if not (ranks.any_of(left) if in_step else left):
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
    from nanorlhf.options import INTERVAL_OF, OneLineParser, check_number, one_line_errors
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
    parser.add_argument("--stop", action="append", default=[],
                        help="string that ends a response; \\n is a newline (several may be given)")
    options = parser.parse_args()
    if options.system is not None and not options.chat:
        parser.error("--system needs --chat")
    system = [{"role": "system", "content": options.system}] if options.system else []
    stop = [text.replace("\\n", "\n") for text in options.stop]
    with one_line_errors(options, lambda: "give the same command again"):
        for option in ("max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "seed"):
            check_number(option, value := getattr(options, option), type(value), INTERVAL_OF[option])
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
                                 options.top_k, options.top_p, options.num_samples, options.seed, stop, tokenizer)
                for ids, finished in zip(found.responses(), found.finished.tolist()):
                    print(f"--- {run}\n{tokenizer.decode(ids, start=False)}{'' if finished else ' [...]'}")


if __name__ == "__main__":
    main()
