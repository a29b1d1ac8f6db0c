"""THE model file: one decoder transformer, its twins with a scalar head, the KV cache, loading and saving.

Every model family is this one decoder with another ModelConfig; there are no subclasses. formats/checkpoints.py maps a
family's config.json to ModelConfig, and the names in its files to our parameters. Weights are float32 in memory; lower
precision is autocast.

Letters: B batch, T time, D width, V vocabulary, H heads, K key-value heads, E head width.
"""

import contextlib
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanorlhf import ranks
from nanorlhf.errors import UserError
from nanorlhf.formats.checkpoints import FAMILIES, load_weights, read_config, read_constants, save_weights, tensor_index
from nanorlhf.kernels import decode_attention, matmul32, pack, packed_linear, static_shapes, token_logprobs
from nanorlhf.training import seed_for


@dataclasses.dataclass
class ModelConfig:
    vocab_size: int
    family: str = "gpt2"            # a key of checkpoints.FAMILIES: the format in which checkpoints are written
    context: int = 1024             # longest sequence, in tokens
    width: int = 768                # D
    layers: int = 12
    heads: int = 12                 # H
    kv_heads: int = 12              # K; grouped-query attention if fewer than H
    head_dim: int = 64              # E
    ffn: int = 3072                 # inner width of the MLP
    norm: str = "layernorm"         # or rmsnorm
    norm_eps: float = 1e-5
    residual: str = "sequential"    # "parallel": attention and MLP read the same x, through two norms; "parallel, one norm"
    positions: str = "learned"      # or rotary
    position_offset: int = 0        # learned positions: the row that position 0 has in the table (2 in OPT)
    rotary_dim: int = 0             # number of leading dimensions of each head that are rotated; 0 = all
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    activation: str = "gelu_tanh"   # a key of ACTIVATIONS
    gated: bool = False             # the MLP computes act(gate(x)) * up(x), as in SwiGLU
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False           # RMSNorm of width E on queries and keys, before they are rotated
    tied: bool = True               # the output head uses the embedding's weight
    head_bias: bool = False         # an untied output head has a bias
    bos_id: int | None = None
    eos_id: int | None = None
    end_ids: tuple = ()             # all ids that end a response, if there are several; eos_id is the one that training appends
    pad_id: int | None = None
    init_std: float = 0.02

    @classmethod
    def for_family(cls, family, width, **fields):
        """Returns a new model's config in a family's style. The MLP is 4 D wide, or gated with about as many parameters."""
        if family not in FAMILIES:
            raise UserError(f"--family {family}: not one of {', '.join(FAMILIES)}")
        style = FAMILIES[family].style
        ffn = -(-8 * width // 3 // 16) * 16 if style.get("gated") else 4 * width
        return cls(family=family, width=width, **(dict(ffn=ffn) | style | fields))


ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def make_norm(c):
    return {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}[c.norm](c.width, eps=c.norm_eps)


class Linear(nn.Linear):
    packed = None                                 # the weight once more, of kernels.pack; within Transformer.packed

    def reset_parameters(self):                   # does nothing: Transformer draws all weights once, from its own generator
        pass

    def forward(self, x):
        return super().forward(x) if self.packed is None else packed_linear(x, self.weight, self.bias, self.packed)


class Embedding(nn.Embedding):
    def reset_parameters(self):                   # does nothing, as in Linear
        pass


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        self.qkv = Linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = Linear(c.heads * c.head_dim, c.width, bias=c.out_bias)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps) if c.qk_norm else None

    def forward(self, x, rope, cache, layer, allowed=None):
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)              # [B, H+2K, T, E]
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.float().split([self.heads, self.kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1).to(v.dtype)
        if rope is not None:
            qk = rotate(qk, *rope)                                                     # both at once
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        if cache is not None and cache.filled:                                         # one new token per row
            y = cache.attend(layer, q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, None]       # [B, 1, H*E]
        else:
            if cache is not None:
                cache.store_prompts(layer, k, v)
            # Padding is on the right, where no real position can see it, so the causal mask is the only one needed.
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None,
                                               enable_gqa=self.kv_heads != self.heads)
            y = y.transpose(1, 2).reshape(B, T, -1)
        return self.out(y)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gated, self.act = c.gated, ACTIVATIONS[c.activation]
        self.up = Linear(c.width, c.ffn * (2 if c.gated else 1), bias=c.mlp_bias)   # gate first, then up
        self.down = Linear(c.ffn, c.width, bias=c.mlp_bias)

    def forward(self, x):
        h = self.up(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return self.down(self.act(gate) * up)
        return self.down(self.act(h))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.parallel = c.residual != "sequential"
        self.norm1, self.attn, self.mlp = make_norm(c), Attention(c), MLP(c)
        self.norm2 = make_norm(c) if c.residual != "parallel, one norm" else None

    def forward(self, x, *context):               # context: what Attention takes after x
        if self.parallel:
            h = self.norm1(x)
            return x + self.attn(h, *context) + self.mlp(h if self.norm2 is None else self.norm2(x))
        x = x + self.attn(self.norm1(x), *context)
        return x + self.mlp(self.norm2(x))


def rope_frequencies(c):
    """Returns the rotation angle per position for each pair of the R rotary dimensions of a head, [R/2] float32 in radians.
    Llama 3's scaling stretches the long wavelengths."""
    R = c.rotary_dim or c.head_dim
    frequency = c.rope_theta ** -(torch.arange(0, R, 2, dtype=torch.int64).float() / R)
    if s := c.rope_scaling:
        original = s["original_max_position_embeddings"]
        wavelength = 2 * math.pi / frequency
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)            # 1 keeps the frequency, 0 divides it
        frequency = smooth * frequency + (1 - smooth) * frequency / s["factor"]
    return frequency


def rotate(x, cos, sin):
    """Applies rotary position embedding, in the rotate-half layout, to the first R dimensions of each head.
    x [B, H, T, E]; cos, sin [B or 1, 1, T, R], the first half of sin negated: the halves (a, b) of the R dimensions become
    (a cos - b sin, b cos + a sin)."""
    R = cos.shape[-1]
    turned = x[..., :R].float()
    turned = torch.addcmul(turned * cos, turned.roll(R // 2, dims=-1), sin).to(x.dtype)
    return turned if R == x.shape[-1] else torch.cat([turned, x[..., R:]], dim=-1)


class Cache:
    """Keys and values of R = P*n rows: n samples for each of P prompts.

    A prompt's are stored once for its n samples, and each row's own tokens apart; on a CPU, if n = 1, both share a buffer, which
    is faster. All rows of a batch have decoded the same number of tokens, so a new token goes into the same slot in every row,
    however long its prompt is. Where a key is stored does not matter, because its position is already encoded in it.
    """

    def __init__(self, lengths, num_samples, max_new_tokens, static):
        self.lengths, self.n, self.static = lengths, num_samples, static               # prompt lengths [P]
        self.shared = num_samples > 1 or self.static                                   # prompts are stored apart
        self.longest, self.stored = int(lengths.max()), 0                              # prompts stored so far
        self.start = 0 if self.shared else self.longest
        self.capacity = self.start + max_new_tokens
        self.slot = torch.full((1,), self.start, device=lengths.device)                # the next one, on the device
        self.prefix, self.own = [], []                                                 # per layer: keys, values
        slots = torch.arange(self.longest if self.shared else self.capacity, device=lengths.device)
        padding = (slots >= lengths[:, None]) & (slots < self.longest)
        self.padding_bias = torch.zeros(padding.shape, device=slots.device).masked_fill_(padding, -torch.inf)[:, None, None]

    @property
    def filled(self):                             # all prompts are stored
        return self.stored >= len(self.lengths)

    def store_prompts(self, layer, k, v):
        """Stores the next prompts' keys and values, [P', K, S, E] each. Padding between S and the longest prompt stays 0."""
        _, K, S, E = k.shape
        if self.stored == 0:
            P = len(self.lengths)
            self.own.append([k.new_zeros(P * self.n, K, self.capacity, E) for _ in "kv"])
            if self.shared:
                self.prefix.append([k.new_zeros(P, K, self.longest, E) for _ in "kv"])
        for buffer, new in zip((self.prefix if self.shared else self.own)[layer], (k, v)):
            buffer[self.stored:self.stored + len(k), :, :S] = new

    def positions(self):
        """Returns the position of the token being decoded, [R, 1]."""
        return (self.lengths - self.start + self.slot).repeat_interleave(self.n)[:, None]

    def attend(self, layer, q, k, v):
        """Stores each row's new key and value, [R, K, E]. Returns the attention of the queries [R, H, E] over all keys so far,
        [R, H*E]."""
        keys, values = self.own[layer]
        prefix = (*self.prefix[layer], self.lengths, self.padding_bias[:, :, None]) if self.shared else None
        if self.static:
            keys[:, :, self.slot], values[:, :, self.slot] = k[:, :, None], v[:, :, None]
            return decode_attention(q, keys, values, last=self.slot, prefix=prefix)
        end = int(self.slot) + 1
        keys[:, :, end - 1], values[:, :, end - 1] = k, v
        bias = None if self.shared else self.padding_bias[..., :end]
        return decode_attention(q, keys[:, :, :end], values[:, :, :end], bias, prefix=prefix)

    def keep(self, prompts, rows, n):
        """Keeps only these prompts [P'] and rows [P'*n], n per prompt, in this order. Both are indices of current ones."""
        if len(prompts) != len(self.lengths):
            self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
            self.lengths, self.padding_bias = self.lengths[prompts], self.padding_bias[prompts]
        used = slice(0, int(self.slot))
        for layer, (k, v) in enumerate(self.own):
            new = [(x.new_zeros if self.static else x.new_empty)(len(rows), *x.shape[1:]) for x in (k, v)]
            new[0][:, :, used], new[1][:, :, used] = k[rows, :, used], v[rows, :, used]
            self.own[layer] = new
        self.n = n


class Transformer(nn.Module):
    """The decoder. model(tokens [B, T]) -> hidden [B, T, D] after the final norm; model.logits(hidden) -> [..., V]."""

    def __init__(self, config, seed=0, head=True):
        super().__init__()
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.width)
        self.positions = Embedding(c.context + c.position_offset, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = make_norm(c)
        self.head = Linear(c.width, c.vocab_size, bias=c.head_bias) if head and not c.tied else None
        self.compiled = False                     # by compile_layers
        self.checkpointing = False                # keep a layer's input only, and compute the layer again in the backward pass
        self.packed_head = None                   # as in Linear
        self.vocab = c.vocab_size                 # ids that may be predicted: check_fit lowers it to the tokenizer's
        if self.embed.weight.is_meta:             # load_weights will fill the model
            return
        self.make_rope()
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() > 1:                       # as in GPT-2: divided by sqrt(number of residuals) in residual projections
                scale = math.sqrt(2 * c.layers) if name.endswith(("attn.out.weight", "mlp.down.weight")) else 1
                nn.init.normal_(p, std=c.init_std / scale, generator=generator)
            else:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)

    def make_rope(self):
        if self.config.positions == "rotary":
            self.register_buffer("frequency", rope_frequencies(self.config), persistent=False)

    def forward(self, tokens, cache=None, packed=None):
        T = tokens.shape[1]
        decoding = cache is not None and cache.filled
        if not decoding and not packed and T > self.config.context:
            raise UserError(f"{T} tokens do not fit this model's context of {self.config.context}")
        allowed = None                                                         # causal
        if packed:
            at, s = packed.positions, packed.segments                          # [P, T]
            visible = (s[:, None, :] == 0) | (s[:, None, :] == s[:, :, None])  # the prompt, and what is of the same response
            allowed = (visible & torch.ones(T, T, dtype=torch.bool, device=s.device).tril())[:, None]   # [P, 1, T, T]
        else:
            at = cache.positions() if decoding else torch.arange(T, device=tokens.device)[None]   # [R, 1] or [1, T]
        x = self.embed(tokens)
        if self.positions is not None:
            x, rope = x + self.positions(at + self.config.position_offset), None
        else:
            angle = at[:, None, :, None].float() * self.frequency              # [R or 1, 1, T, half of a head's rotated dims]
            cos, sin = angle.cos(), angle.sin()
            rope = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        stack = self.training_stack if cache is None else self.decoding_stack if decoding else self.stack
        x = stack(x, rope, cache, allowed)
        if decoding:
            cache.slot += 1                       # each row has one token more
        elif cache is not None:
            cache.stored += len(x)
        return self.norm(x)

    def stack(self, x, rope, cache, allowed):
        for layer, block in enumerate(self.blocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, cache, layer, allowed, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer, allowed)
        return x

    training_stack = decoding_stack = stack       # the same code; --compile compiles each for itself

    def compile_layers(self):
        """Compiles the layers for training and, on a CPU, for decoding steps; a GPU replays those as a graph anyway."""
        self.training_stack = torch.compile(self.training_stack, dynamic=True)
        if not static_shapes(self.embed.weight.device):
            self.decoding_stack = torch.compile(self.decoding_stack, dynamic=True)
        self.compiled = True

    # Rows of an embedding beyond the tokenizer's ids are padding. They take no part in sampling, nor in log-probabilities.
    @property
    def head_weight(self):                        # [V, D]
        return (self.embed if self.head is None else self.head).weight[:self.vocab]

    @property
    def head_bias(self):                          # [V] or None
        return None if self.head is None or self.head.bias is None else self.head.bias[:self.vocab]

    def output_head(self):
        """Returns (weight [V, D], bias [V] or None, the packed weight or None) for `logits`, the weight rounded to the dtype that
        autocast asks for. A caller that needs logits step by step gets them once."""
        weight, device = self.head_weight, self.embed.weight.device.type
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))
            weight = weight.float() if device == "cpu" else weight                     # where the product is in float32
        return weight, self.head_bias, self.packed_head

    @contextlib.contextmanager
    def packed(self):
        """Within it, on a CPU, large weights are held twice, once as `kernels.pack` makes them, and the model only decodes."""
        layers = [m for m in self.blocks.modules() if isinstance(m, Linear)]
        try:
            for layer in layers:
                layer.packed = pack(layer.weight)
            self.packed_head = pack(self.head_weight)
            yield
        finally:
            for layer in layers:
                layer.packed = None
            self.packed_head = None

    def logits(self, hidden, head=None):
        """hidden [..., D] -> [..., V], float32 also under autocast, as in `token_logprobs`: in bf16, logits far from 0 lose the
        differences that a distribution is made of. head: a result of `output_head`."""
        weight, bias, packed = head or self.output_head()
        device = hidden.device.type
        if not torch.is_autocast_enabled(device):
            return packed_linear(hidden, weight, bias, packed)
        with torch.autocast(device, enabled=False):
            hidden = hidden.to(torch.get_autocast_dtype(device))
            z = matmul32(hidden.flatten(0, -2), weight.T).view(*hidden.shape[:-1], -1)
            return z if bias is None else z + bias

    def logprobs(self, tokens, mask, temperature=1.0, entropy=False, where=None, packed=None):
        """Returns log p(token t | tokens before t) under softmax(logits / temperature) where the mask is True, 0 elsewhere.

        tokens [B, T]; mask [B, T] bool, False at t = 0. The result is float32 [B, T], aligned with tokens; with entropy=True
        the entropies come as a second tensor. Every token's log-probability in a loss or a KL penalty comes from here,
        for the reference, old and new policy alike. Only masked positions reach the output head. where [N]: the positions of
        True in mask.flatten(), as in Batch (None: found here, which makes a GPU wait). packed: the Packed of the same Batch;
        then a prompt that several rows share is computed once, with the same result up to rounding.
        """
        if where is None:
            where = F.pad(mask[:, 1:], (1, 0)).flatten().nonzero()[:, 0]               # nothing predicts the token at t = 0
        hidden = self(tokens) if packed is None else self(packed.tokens, packed=packed)
        hidden = hidden.flatten(0, 1).index_select(0, where - 1 if packed is None else packed.before)    # the token before each
        values = token_logprobs(hidden, self.head_weight, tokens.flatten()[where], self.head_bias, temperature, entropy)
        if not torch.is_grad_enabled():
            ranks.shard_again(self)
        out = [torch.zeros(tokens.numel(), dtype=v.dtype, device=v.device).scatter(0, where, v).view(tokens.shape)
               for v in (values if entropy else (values,))]
        return tuple(out) if entropy else out[0]

    @classmethod
    def from_pretrained(cls, folder):
        """Loads a checkpoint folder or Hub name. UserError names the tensors that are missing, extra or misshaped."""
        fields, _ = read_config(folder)
        with torch.device("meta"):
            model = cls(ModelConfig(**fields))
        load_weights(model, folder, head="causal")
        return model

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors in the family's own layout, which transformers and vLLM load."""
        save_weights(self, folder)


class RewardModel(nn.Module):
    """The same trunk with a scalar head: model(tokens [B, T]) -> a scalar at every position [B, T], float32.

    A new head is drawn with std 1/sqrt(D+1), as in Stiennon 2020's code. It has no bias: pairwise data cannot identify one.
    score() reads the last real token (EOS, unless truncated) and applies the stored constants: (r - mean) / std.
    """

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.trunk = Transformer(config, seed, head=False)
        self.head = Linear(config.width, 1, bias=False)
        self.reward_mean, self.reward_std = 0.0, 1.0
        if not self.head.weight.is_meta:
            self.reset_head(seed)

    def reset_head(self, seed):
        generator = torch.Generator().manual_seed(seed_for(seed, "head"))
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(self.config.width + 1), generator=generator)

    def forward(self, tokens):
        hidden = self.trunk(tokens)
        with torch.autocast(tokens.device.type, enabled=False):                        # rewards may differ only slightly
            return self.head(hidden.float())[..., 0]

    def score(self, tokens, lengths):
        """Returns the reward of each row, [B], read at position lengths-1. tokens [B, T], lengths [B]."""
        raw = self(tokens).gather(1, (lengths - 1)[:, None])[:, 0]
        return (raw - self.reward_mean) / self.reward_std

    @classmethod
    def from_pretrained(cls, folder, fresh_head=False, seed=0):
        """Loads a reward model; with fresh_head also any language model, whose output head a new scalar head replaces."""
        fields, raw = read_config(folder)
        with torch.device("meta"):
            model = cls(ModelConfig(**fields))
        if "score.weight" in tensor_index(folder):
            load_weights(model, folder, head="score")
            model.reward_mean, model.reward_std = read_constants(folder, raw)
        elif fresh_head:
            load_weights(model.trunk, folder, head=None)
            model.head.to_empty(device="cpu")
            model.reset_head(seed)
        else:
            raise UserError(f"{folder} is no reward model (it has no score.weight): train one with train_rm.py")
        return model

    def save_pretrained(self, folder):
        """Writes the folder in the family's own layout, as a sequence classifier with one label. config.json holds the
        stored constants as reward_mean and reward_std; other software ignores them and gives the raw score."""
        save_weights(self, folder, classifier=True, extra=dict(
            id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, problem_type="regression",
            reward_mean=self.reward_mean, reward_std=self.reward_std))


class ValueModel(nn.Module):
    """The value V(s_t) at every position, [B, T]: a trunk and a scalar head with a bias."""

    def __init__(self, trunk, weight, bias=0.0):
        super().__init__()
        self.trunk = trunk
        self.head = Linear(weight.shape[1], 1, device=weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.fill_(bias)

    def forward(self, tokens):
        hidden = self.trunk(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.head(hidden.float())[..., 0]

    @classmethod
    def from_pretrained(cls, folder):
        """Loads a reward model or a language model. A reward model's normalisation goes into the head, so that V starts as
        the (normalised) reward of the text so far (Stiennon 2020). A language model gets a head of zeros (Ziegler 2019)."""
        if "score.weight" in tensor_index(folder):
            rm = RewardModel.from_pretrained(folder)
            return cls(rm.trunk, rm.head.weight.detach() / rm.reward_std, -rm.reward_mean / rm.reward_std)
        rm = RewardModel.from_pretrained(folder, fresh_head=True)
        return cls(rm.trunk, torch.zeros_like(rm.head.weight))


def freeze(model, dtype="float32"):
    """Turns a model's gradients off. With dtype "bfloat16" the layers' matrices, which autocast would round in every pass, are
    held rounded: the same results in about half of the memory. Embeddings and norms stay float32. Returns the model."""
    model.requires_grad_(False)
    if dtype == "bfloat16":
        for module in getattr(model, "trunk", model).blocks.modules():
            if isinstance(module, Linear):
                module.bfloat16()
    return model


# ---- Models, tokenizers and devices that fit together ---------------------------------------------------------------


def freeze_layers(trunk, share):
    """Turns the gradients of the embeddings and of the lowest share of the layers off, rounded down, as Kirk 2023 did with 80%.
    That saves gradients, optimizer state and activations. A head that is tied to the embedding is frozen with it."""
    if not share:
        return
    count = int(share * len(trunk.blocks) + 1e-9)
    if not count:
        raise UserError(f"--frozen_layers {share:g} of {len(trunk.blocks)} layers is none")
    for module in (trunk.embed, trunk.positions, *trunk.blocks[:count]):
        if module is not None:
            module.requires_grad_(False)


def check_fit(model, tokenizer):
    """Checks that every token id has an embedding, and limits the output head to the tokenizer's ids. Returns the trunk."""
    trunk = getattr(model, "trunk", model)
    if trunk.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"the {type(model).__name__} of {trunk.config.vocab_size} tokens does not fit the tokenizer of "
                        f"{tokenizer.vocab_size}: they do not belong together")
    trunk.vocab = tokenizer.vocab_size
    return trunk


def pick_device(name):
    """Returns the torch.device of that name; `auto` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cpu" and device.index:
            raise ValueError("there is one")
    except Exception as error:                    # each kind of device that is not here has an exception of its own
        raise UserError(f"--device {name}: torch cannot use it here ({type(error).__name__})")
    return device
