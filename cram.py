"""Cramming: train a masked language model from scratch, on one GPU, within a budget.

    python cram.py                                # prepares a small corpus, trains for 5 minutes
    python cram.py --data data/c4 --budget 24h    # the real thing: one GPU, one day
    python cram.py fill out/cram "raises an [MASK] if it fails."

The model reads rows of tokens, some of them hidden, and learns to name what was there.
The recipe is that of Geiping & Goldstein, arXiv 2212.14034: "the paper"; [4.2] is its section 4.2.
"""

import argparse
import base64
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tiktoken
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

# ---- Settings ------------------------------------------------------------------------------------
SIZES = {  # layers, width; heads are 64 wide, the feed-forward is 4 times as wide as the model
    "tiny": (2, 128), "mini": (4, 256), "small": (6, 512), "base": (16, 768), "large": (24, 1024),
}  # fmt: skip


@dataclass
class Config:  # auto: chosen by make_config and plan, from machine, recipe, size and budget
    data: str = "data/docs"  # folder made by prepare_data.py
    out: str = "out/cram"  # folder for checkpoint.pt, log.csv and curve.svg
    budget: str = "5m"  # 90s, 5m, 24h, 2000steps, 50Mtokens or 1e15flops [2]
    evals: int = 5  # evaluations at equal shares of it, and one before the first step
    resume: bool = False  # go on from OUT/checkpoint.pt with what is left of its budget
    overwrite: bool = False  # replace the run that OUT holds
    seed: int = 0  # of the weights, the masks, dropout and the order of the rows
    # the machine [4.1]
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # to compute in; weights are fp32
    compile: bool = "auto"  # torch.compile: slow to start, then faster; auto: on CUDA
    # the shape [4.2]
    size: Literal["auto", "tiny", "mini", "small", "base", "large"] = "auto"  # base on CUDA
    recipe: Literal["modern", "cram", "bert"] = "modern"  # cram: the paper's; bert: its baseline
    layers: int = "auto"  # this and the next three: from size
    width: int = "auto"
    heads: int = "auto"
    ffn_width: int = "auto"  # before the gate halves it
    norm: Literal["pre", "post"] = "pre"  # LayerNorm before or after each part of a block
    gated: bool = True  # feed-forward with a gate
    positions: Literal["rotary", "sinusoidal", "learned"] = "rotary"
    head: bool = False  # dense layer, GELU, LayerNorm and a bias around the decoder
    linear_bias: bool = False  # biases in the linear layers
    norm_bias: bool = False  # biases in LayerNorm; the embedding's then has a weight too
    zero_init: bool = True  # output matrices of attention and feed-forward start at 0
    neighbours: bool = True  # a learnt bias of q and k: rotary heads start out at a neighbour
    unigram_bias: bool = True  # the decoder starts out knowing how frequent each token is
    dropout: float = 0.0
    shallow: float = "auto"  # share of budget with 1/4, then 1/2 of the blocks; auto: 0.8 or 0
    # the objective and the optimiser [4.3]
    mask_rate: float = 0.35  # share of positions to predict
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: AdamW but for the blocks' matrices
    lr: float = "auto"  # peak rate of AdamW; auto: from recipe and width
    muon_lr: float = 0.02  # peak rate of Muon
    weight_decay: float = 0.01  # of the matrices; norms and biases have none
    grad_clip: float = 0.5  # largest norm of the gradient; 0: no clipping
    lr_start: float = 0.0  # share of the peak rate at the start
    warmup: float = 0.05  # share of the budget over which the rate rises
    cooldown: float = 0.5  # share of the budget over which it falls to 0 at the end
    batch_size: int = "auto"  # rows in a step; auto: from the tokens that the budget will buy
    batch_ramp: float = 0.0  # share of the budget over which the batch grows; 0: no ramp
    micro_batch: int = 128  # rows in one forward and backward pass: a matter of memory only
    shuffle: bool = True  # read rows in random order, not as prepare_data.py sorted them [4.4]


RECIPES = {  # what differs from the defaults above
    "modern": {},
    "cram": {
        "positions": "sinusoidal", "norm_bias": True, "zero_init": False, "neighbours": False,
        "unigram_bias": False, "shallow": 0.0, "mask_rate": 0.25, "optimizer": "adamw",
        "lr_start": 0.25, "warmup": 0.75, "cooldown": 0.25, "batch_ramp": 0.6, "shuffle": False,
    },
    "bert": {
        "norm": "post", "gated": False, "positions": "learned", "head": True, "linear_bias": True,
        "norm_bias": True, "zero_init": False, "neighbours": False, "unigram_bias": False,
        "shallow": 0.0, "mask_rate": 0.15, "optimizer": "adamw", "grad_clip": 0.0,
        "warmup": 0.03, "cooldown": 0.97, "shuffle": False,
    },
}  # fmt: skip
LR_AT_BASE = {"modern": 2e-3, "cram": 1e-3, "bert": 5e-4}  # peak rate of AdamW at width 768
SHARES = ("mask_rate", "dropout", "shallow", "lr_start", "warmup", "cooldown", "batch_ramp")


def fail(message):
    """Ends the program on a user's mistake: one sentence on stderr, exit code 1, no traceback."""
    show("")  # in the place of a moving line
    raise SystemExit(f"error: {message}")


def parse_flags(cls, argv, description, limits):
    """The flags typed for the dataclass `cls`, as {field: value}; limits: {field: (low, high)}."""
    parser = argparse.ArgumentParser(
        description=f"{description}\n{inspect.getsource(cls)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = lambda message: fail(f"{message} (-h lists all flags)")
    for f in fields(cls):
        how = {"type": partial(convert, f, limits), "help": argparse.SUPPRESS}
        if f.type is bool:
            how |= {"nargs": "?", "const": True}  # --resume alone means true
        elif f.type is list:
            how |= {"nargs": "+", "action": "extend"}
        parser.add_argument(f"--{f.name}", **how)
    return vars(parser.parse_args(argv))


def convert(f, limits, word):
    """A word of the command line as a value of the field `f`; argparse shows what is wrong."""
    choices = get_args(f.type)  # of a Literal
    if f.type in (str, list) or word in choices or (word == "auto" and f.default == "auto"):
        return word
    if f.type is bool and word in ("true", "false"):
        return word == "true"
    expected = " or ".join(choices or ("true", "false"))
    if f.type in (int, float):
        at_least = 1 if f.type is int and f.default != 0 else 0  # a seed may be 0, a count not
        low, high = limits.get(f.name, (at_least, 1e9))
        expected = f"{f.type.__name__} from {low:g} to {high:g}"
        with suppress(ValueError):
            value = f.type(word)
            if low <= value <= high:
                return value
    raise argparse.ArgumentTypeError(f"got {word!r}, expected {expected}")


def make_config(given):
    """A checked Config: what was typed wins over the recipe, the recipe over the defaults."""
    cfg = Config(**RECIPES[given.get("recipe", Config.recipe)] | given)
    fill_in(cfg, size="base" if choose_device(cfg)[0].type == "cuda" else "tiny")
    layers, width = SIZES[cfg.size]
    if cfg.recipe == "bert" and cfg.size == "base":
        layers = 12
    fill_in(cfg, layers=layers, width=width)
    fill_in(cfg, heads=max(1, cfg.width // 64), ffn_width=4 * cfg.width)
    fill_in(cfg, lr=LR_AT_BASE[cfg.recipe] * (768 / cfg.width) ** 0.75)
    cfg.neighbours = cfg.neighbours and cfg.positions == "rotary"  # it takes a rotation
    if cfg.width % (2 * cfg.heads):
        fail(f"width is {cfg.width}: expected a multiple of {2 * cfg.heads}, twice the heads")
    if cfg.ffn_width % 2:
        fail(f"ffn_width is {cfg.ffn_width}: expected an even number, for the gate halves it")
    return cfg


def fill_in(cfg, **values):
    """Gives the fields that are `auto` these values."""
    for name, value in values.items():
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, value)


def say(text="", end="\n"):
    """Prints at once. It never raises: what a closed pipe or a full disk refuses is lost."""
    try:
        print("\r\033[K" + text if os.isatty(1) else text, end=end, flush=True)
    except UnicodeError:  # a terminal that cannot show a letter
        say(text.encode("ascii", "backslashreplace").decode(), end)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(text):
    """Shows a line that the next one replaces, on a terminal; nothing in a file."""
    if os.isatty(1):  # Windows says so of NUL, too, which has no width
        say(text[: shutil.get_terminal_size().columns - 1], end="")


# ---- Text, tokens, rows --------------------------------------------------------------------------
DATA_FORMAT = 2  # of meta.json
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # the top end of the vocabulary, in this order
# What may become a token: words, digits, other characters, with the space before; all bounded.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?[a-z]{1,32}| ?[0-9]{1,3}| ?[^ a-z0-9]{1,32}| +"""


def normalise(text):
    """The paper's normalisation [4.4]: lower case, no accents, ASCII only, white space folded."""
    text = " ".join(unicodedata.normalize("NFD", text).split())  # NFD cuts accents off letters
    text = text.lower().encode("ascii", "ignore").decode()
    return " ".join(re.sub("[^ -~]", "", text).split())  # keeps " " to "~": what can be printed


def load_tokenizer(text, pattern):
    """A tiktoken.Encoding from a tokenizer.tiktoken file: a line is a base64 token and its rank."""
    lines = [line.split() for line in text.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("cram", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def load_data(folder):
    """(manifest, training rows, validation rows); rows: a memory map, uint16 (rows, seq_len)."""
    meta = {}
    with suppress(OSError, ValueError):  # not there, or damaged
        meta = json.loads(Path(folder, "meta.json").read_text())
    if meta.get("format") != DATA_FORMAT:
        fail(f"{folder} is no folder made by this version of prepare_data.py: prepare it first")
    for name, about in meta["files"].items():
        path = Path(folder, name)
        if not path.exists() or path.stat().st_size != about["bytes"]:
            fail(f"{path} is not the file of {about['bytes']} bytes it was: prepare it again")
    train, val = (np.memmap(Path(folder, name), "<u2", "r") for name in ("train.bin", "val.bin"))
    return meta, train.reshape(-1, meta["seq_len"]), val.reshape(-1, meta["seq_len"])


def mask_counts(cfg, seq_len):
    """How many tokens of a row are (predicted, shown as [MASK], shown as a random token) [4.3]."""
    count = max(1, round(cfg.mask_rate * seq_len))
    masked = round(0.8 * count)
    randoms = round(0.9 * count) - masked  # the rest stays as it is
    return count, masked, randoms


def mask_rows(rows, rng, cfg, vocab_size):
    """Hides part of `rows` (B, S): what is shown (B, S), positions to predict (B, K), tokens there
    (B, K). Numbers are drawn row by row, so it does not matter how the rows of a step are cut."""
    seq_len = rows.shape[1]
    count, masked, randoms = mask_counts(cfg, seq_len)
    noise = rng.random((len(rows), seq_len + randoms))  # S choose where, the rest become tokens
    where = noise[:, :seq_len].argsort(axis=1)[:, :count].copy()  # K positions, at random
    targets = np.take_along_axis(rows, where, axis=1)
    shown = targets.copy()
    shown[:, :masked] = vocab_size - 1  # [MASK], the last of the specials
    shown[:, masked : masked + randoms] = noise[:, seq_len:] * (vocab_size - len(SPECIALS))
    tokens = rows.copy()
    np.put_along_axis(tokens, where, shown, axis=1)
    return tokens, where, targets


def make_batches(rows, numbers, size, rng, cfg, vocab_size, device):
    """The rows with these numbers, masked, `size` at a time: (tokens, where, targets)."""
    for i in range(0, len(numbers), size):
        part = rows[numbers[i : i + size]].astype(np.int64)
        tensors = [torch.from_numpy(array) for array in mask_rows(part, rng, cfg, vocab_size)]
        if device.type == "cuda":  # from pinned memory the copy goes on in the background
            tensors = [tensor.pin_memory() for tensor in tensors]
        yield [tensor.to(device, non_blocking=device.type == "cuda") for tensor in tensors]


# ---- Model: B rows of S tokens, K of them to predict; width W, D a head --------------------------
def rotate(x, rotation):
    """Rotary positions (Su et al. 2021): turns the pairs (i, i + D/2) of x (..., S, D)."""
    cos, sin = rotation  # each (S, D / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def neighbour_bias(cfg, layer, rotation):
    """(2, heads, 1, D): what a block starts out adding to q and k, before they are rotated. That
    turns q's by its position i and k's by j: the score is largest where the angles agree, at j = i.
    With k's turned by d beforehand it is at j + d = i: so the head looks d to the left."""
    bias = torch.zeros(2, cfg.heads, 1, cfg.width // cfg.heads)
    bias[..., :8] = 2.0  # (2, 0) in the 8 fastest pairs, which tell neighbours apart
    for i in range(cfg.heads):
        head = layer * cfg.heads + i  # counted through all layers
        distance = head // 2 % 4 + 1  # 1 1 2 2 3 3 4 4 1 ...
        part = 1 if head % 2 == 0 else 0  # k, to look left; q, to look right
        bias[part, i] = rotate(bias[part, i], rotation[:, distance])
    return bias


class Block(nn.Module):
    """A transformer block: attention over all positions, then a feed-forward network [4.2]."""

    def __init__(self, cfg, layer, rotation):
        super().__init__()
        self.cfg = cfg
        inner = cfg.ffn_width // 2 if cfg.gated else cfg.ffn_width
        self.attn_norm = nn.LayerNorm(cfg.width, eps=1e-12, bias=cfg.norm_bias)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=cfg.linear_bias)
        self.attn_out = nn.Linear(cfg.width, cfg.width, bias=cfg.linear_bias)
        self.ffn_norm = nn.LayerNorm(cfg.width, eps=1e-12, bias=cfg.norm_bias)
        self.ffn_in = nn.Linear(cfg.width, cfg.ffn_width, bias=cfg.linear_bias)
        self.ffn_out = nn.Linear(inner, cfg.width, bias=cfg.linear_bias)
        self.dropout = nn.Dropout(cfg.dropout)
        if cfg.neighbours:
            self.qk_bias = nn.Parameter(neighbour_bias(cfg, layer, rotation))

    def attention(self, x, mask, rotation, where=None):
        """x (B, S, W) -> (B, S, W) or, at `where`, (B, K, W); mask (B, 1, 1, S): where to look."""
        B, S, W = x.shape
        qkv = self.qkv(x).view(B, S, 3, self.cfg.heads, W // self.cfg.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, D)
        if self.cfg.neighbours:
            q = q + self.qk_bias[0]
            k = k + self.qk_bias[1]
        if self.cfg.positions == "rotary":
            q = rotate(q, rotation[:, :S])
            k = rotate(k, rotation[:, :S])
        if where is not None:  # after rotate, which counts positions: (B, heads, K, D)
            q = q.gather(2, where[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        dropout = self.cfg.dropout if self.training else 0.0
        if x.device.type == "cpu" and S <= 256:  # on a CPU, in bf16, a fifth faster than the kernel
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, S or K, S)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            y = F.dropout(scores.softmax(-1).to(v.dtype), dropout) @ v
        else:  # the same, in one kernel
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.dropout(self.attn_out(y.transpose(1, 2).reshape(B, -1, W)))

    def feed_forward(self, x):
        """x (B, S or K, W) -> the same."""
        x = self.ffn_in(x)
        if self.cfg.gated:  # helps at equal cost, though it halves the width [4.2]
            value, gate = x.chunk(2, dim=-1)
            x = value * F.gelu(gate)
        else:
            x = F.gelu(x)
        return self.dropout(self.ffn_out(x))

    def forward(self, x, mask, rotation, where=None):
        pre = self.cfg.norm == "pre"  # stable at higher learning rates [4.2]
        y = self.attention(self.attn_norm(x) if pre else x, mask, rotation, where)
        if where is not None:
            x = x.gather(1, where[:, :, None].expand(-1, -1, x.shape[2]))  # (B, K, W)
        x = x + y if pre else self.attn_norm(x + y)
        y = self.feed_forward(self.ffn_norm(x) if pre else x)
        return x + y if pre else self.ffn_norm(x + y)


class Model(nn.Module):
    """The masked language model [4.2]; its decoder is the embedding's matrix."""

    def __init__(self, cfg, vocab_size, seq_len):
        super().__init__()
        self.cfg = cfg
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.embedding = nn.Embedding(vocab_size, cfg.width)
        dim = cfg.width // cfg.heads if cfg.positions == "rotary" else cfg.width
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)  # from fast to slow
        angle = torch.arange(seq_len)[:, None] * frequencies  # (S, dim / 2)
        self.register_buffer("rotation", torch.stack((angle.cos(), angle.sin())), persistent=False)
        if cfg.positions == "sinusoidal":
            table = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # sin, cos, sin ...
            self.register_buffer("positions", table, persistent=False)
            self.position_scale = nn.Parameter(torch.tensor(cfg.width**-0.5))
        elif cfg.positions == "learned":
            self.positions = nn.Parameter(torch.empty(seq_len, cfg.width))
            self.position_scale = 1.0
        norm = partial(nn.LayerNorm, cfg.width, eps=1e-12, bias=cfg.norm_bias)
        self.embedding_norm = norm(elementwise_affine=cfg.norm_bias)  # so ModernBERT can hold it
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg, i, self.rotation) for i in range(cfg.layers))
        self.final_norm = norm() if cfg.norm == "pre" else nn.Identity()
        self.head = nn.Identity()
        self.decoder_bias = None
        if cfg.head:
            self.head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), norm())
        if cfg.head or cfg.unigram_bias:
            self.decoder_bias = nn.Parameter(torch.zeros(vocab_size))
        for name, p in self.named_parameters():  # the norms' weights stay 1
            if cfg.zero_init and name.endswith("_out.weight"):
                nn.init.zeros_(p)  # so a block starts as the identity
            elif p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 1 and name.endswith("bias"):  # qk_bias has four dimensions and stays
                nn.init.zeros_(p)

    def encode(self, tokens, mask=None, depth=None, where=None):
        """tokens (B, S) -> (B, S, W) or, at `where`, (B, K, W); mask (B, S): false at padding."""
        x = self.embedding(tokens)
        if self.cfg.positions != "rotary":
            x = x + self.position_scale * self.positions[: tokens.shape[1]]
        x = self.dropout(self.embedding_norm(x))
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, S)
        blocks = self.blocks[:depth]
        for block in blocks:
            x = block(x, mask, self.rotation, where if block is blocks[-1] else None)
        return self.final_norm(x)

    def forward(self, tokens, where, targets=None, depth=None):
        """Logits (B, K, vocab) at the positions `where` (B, K), or their mean loss on `targets`."""
        # Sparse prediction [4.2]: the decoder, and most of the last block, work there alone.
        x = self.encode(tokens, depth=depth, where=where)  # (B, K, W)
        logits = F.linear(self.head(x), self.embedding.weight, self.decoder_bias)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def flops_per_token(self, depth=None):
        """FLOPs to train on a token: 6 a weight, 2 of them forward; scores: 12 S W a block."""
        predicted = mask_counts(self.cfg, self.seq_len)[0] / self.seq_len  # share of the tokens
        decoder = 6 * predicted * self.vocab_size * self.cfg.width
        weights = sum(p.numel() for p in self.blocks[0].parameters() if p.ndim == 2)
        qkv = 6 * self.blocks[0].qkv.weight.numel()
        rest = 6 * weights - qkv + 12 * self.seq_len * self.cfg.width  # behind qkv
        depth = len(self.blocks[:depth])  # the last block does the rest for predicted tokens only
        return depth * qkv + (depth - 1 + predicted) * rest + decoder


# ---- Optimisers ----------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): orthogonalised steps for matrices; torch.optim's has bf16 only."""

    def __init__(self, params, peak, weight_decay, dtype):
        super().__init__(params, {"peak": peak, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        used = [p for p in group["params"] if p.grad is not None]  # later blocks have none
        for p in used:
            if p not in self.state:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"]
            momentum.lerp_(p.grad, 0.05)
            ahead = p.grad.lerp(momentum, 0.95)  # Nesterov's momentum
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5  # an output moves as far in any shape
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(orthogonalise(ahead.to(self.dtype)), alpha=-group["lr"] * scale)


def orthogonalise(x):
    """x (m, n) with singular values brought near 1: an odd polynomial of x acts on each of them."""
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # the products below are then of the smaller size
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = 3.4445 * x + (2.0315 * xx @ xx - 4.7750 * xx) @ x
    return x.mT if tall else x


def make_optimizers(model, cfg, dtype):
    """{"adamw": for all}, or {"adamw": for the rest, "muon": for the matrices of the blocks}."""
    inside, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.ndim != 2:
            vectors.append(p)  # norms and biases, which do not decay [4.3]
        elif cfg.optimizer == "muon" and name.startswith("blocks"):
            inside.append(p)
        else:
            matrices.append(p)
    decayed = {"params": matrices, "peak": cfg.lr, "weight_decay": cfg.weight_decay}
    plain = {"params": vectors, "peak": cfg.lr, "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, plain], betas=(0.9, 0.98), eps=1e-12, fused=True)
    if not inside:
        return {"adamw": adamw}
    dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    return {"adamw": adamw, "muon": Muon(inside, cfg.muon_lr, cfg.weight_decay, dtype)}


# ---- Budget and schedule: all of it follows progress p = spent / budget, from 0 to 1 -------------
def parse_budget(text):
    """'5m' -> (300.0, 'seconds'); other units are counted: '50Mtokens' -> (5e7, 'tokens')."""
    scales = {"s": 1, "m": 60, "h": 3600, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
    pattern = r"(\d+\.?\d*(?:e[+-]?\d+)?)(?:([smh])|([kMGB]?)(steps|tokens|flops))"
    match = re.fullmatch(pattern, text)
    amount = float(match[1]) * scales[match[2] or match[3]] if match else 0
    if not 1e-9 < amount < 1e30:  # far beyond, its logarithm fails in plan
        fail(f"budget {text!r} is not understood: expected one like 90s, 24h, 50Mtokens, 1e15flops")
    return amount, match[4] or "seconds"


def lr_at(p, cfg):
    """Share of the peak rate: up, level, down. A step at rate 0 only fills the averages."""
    up = cfg.lr_start + (1 - cfg.lr_start) * p / cfg.warmup if p < cfg.warmup else 1.0
    down = (1 - p) / cfg.cooldown if p > 1 - cfg.cooldown else 1.0
    return min(up, down)


def batch_at(p, cfg):
    """Rows in the step: over the ramp multiples of 8, up to batch_size, which then stays [4.3]."""
    if p >= cfg.batch_ramp:
        return cfg.batch_size
    return min(cfg.batch_size, 8 + int(cfg.batch_size * p / cfg.batch_ramp) // 8 * 8)


def depth_at(p, cfg):
    """Blocks in the step: a quarter, half, all. With zero_init and pre-norm they join smoothly."""
    if p >= cfg.shallow or cfg.layers < 4:  # of fewer a quarter would be none, and half too few
        return cfg.layers
    return cfg.layers // 4 if p < cfg.shallow / 2 else cfg.layers // 2


def plan(cfg, amount, unit, model, machine_rate):
    """Chooses batch_size and shallow, where auto, by the tokens that the budget will buy."""
    if unit == "steps":
        fill_in(cfg, batch_size=32, shallow=0.0)  # the tokens follow from it
        return
    tokens = amount
    if unit != "tokens":  # flops, or seconds at an MFU of 30%: that is near enough
        flops = amount * 0.3 * machine_rate if unit == "seconds" else amount
        tokens = flops / model.flops_per_token()
        weights = sum(p.numel() for p in model.blocks.parameters())
        fill_in(cfg, shallow=0.8 if cfg.layers >= 4 and tokens < 8 * weights else 0.0)
    rows = 2 ** round(13 + math.log2(tokens / 1e10))  # the paper's 8192 for 1e10, fewer for fewer
    rows = min(8192, max(rows, 16 if cfg.optimizer == "muon" else 8))
    fill_in(cfg, batch_size=rows, shallow=0.0)  # few blocks save flops, not tokens


# ---- The machine ---------------------------------------------------------------------------------
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(cfg):
    """(device, dtype): what was asked for, or what this machine does best."""
    name = cfg.device
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # under torchrun each process has its own
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        torch.ones(1, device=device).item()
    except Exception:  # each build of torch has its own way to say so
        fail(f"device {cfg.device!r} cannot be used here: try cuda, mps, cpu or fewer processes")
    if cfg.dtype != "auto":
        return device, cfg.dtype
    if device.type == "cuda":
        return device, "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    able = torch.cpu.get_capabilities()
    fast = device.type == "cpu" and (able.get("avx512_bf16") or able.get("amx_bf16"))
    return device, "bf16" if fast else "fp32"


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product here, measured: what the MFU is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=DTYPES[dtype])
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.2).median


def fit(model, cfg, rows, device, autocast):
    """(forward, rows): the model, compiled if it can be; the rows of a pass, fewer if need be."""
    wanted = device.type == "cuda" if cfg.compile == "auto" else cfg.compile
    forward = torch.compile(model) if wanted else model
    _reserve = [torch.empty_like(p) for p in list(model.parameters()) * 2]  # for the optimiser
    while forward is not model or device.type == "cuda":  # else there is no other way
        try:  # one pass; after a failure it goes on uncompiled, or with half the rows
            tokens = torch.zeros(rows, model.seq_len, dtype=torch.long, device=device)
            where = tokens[:, : mask_counts(cfg, model.seq_len)[0]].clone()  # zeros, too
            with autocast:  # in three tensors, as later, or that would be compiled anew
                forward(tokens, where, where.clone(), cfg.layers).backward()
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                fail("one row does not fit into the memory of this device: choose a smaller --size")
            rows //= 2
            torch.compiler.reset()  # or a second shape makes a slower graph, for any
        except Exception as error:  # the compilers behind torch.compile raise all kinds
            if forward is model:
                raise
            forward = model
            say(f"warning: not compiled ({type(error).__name__}: {error})".splitlines()[0])
    model.zero_grad()
    return forward, rows


def join_processes():
    """(rank, world): which process of how many torchrun has started, one a GPU; or (0, 1)."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    torch.distributed.init_process_group()
    if torch.distributed.get_rank() > 0:  # the first one decides, prints and saves
        sys.stdout = None
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def agree(values, world):
    """The list of values as the first process has them."""
    if world > 1:
        torch.distributed.broadcast_object_list(values)
    return values


# ---- Checkpoint and log --------------------------------------------------------------------------
FORMAT = 6  # of checkpoint.pt


@dataclass
class Run:
    """The numbers that change as a run goes on: with the tensors, all that a checkpoint keeps."""

    step: int = 0  # optimiser steps done
    reads: int = 0  # rows read: the position in the data
    flops: float = 0.0  # spent
    seconds: float = 0.0  # spent
    progress: float = 0.0  # spent / budget
    evals: int = 0  # evaluations done
    val_loss: float = math.nan  # of the last one
    losses: list = field(default_factory=list)  # of the steps since the last row of the log
    grad_norm: float = 0.0  # of the last step, before clipping
    log_size: int = 0  # bytes of log.csv: a resumed run cuts off what is beyond


def write_whole(path, write):
    """Calls write(file) on a file that then replaces `path`: a kill leaves the old or the new."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename leaves an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk in a RuntimeError
        part.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.__context__ or error})") from error


def checkpoint_path(folder):
    """The file that train saved in `folder`; the file itself will do too."""
    path = Path(folder)
    if path.suffix == ".pt" and not path.is_dir():
        return path
    return path / "checkpoint.pt"


def load_checkpoint(folder):
    """What train saved in `folder`, or in that file: plain types and tensors."""
    path = checkpoint_path(folder)
    if not path.exists():
        fail(f"{path} does not exist: train first, with --overwrite if log.csv is there")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # never runs code
        if state["format"] != FORMAT:
            raise ValueError
        state["config"].pop("copying", None)  # older runs have it: a way to start some heads
    except Exception as error:  # a damaged file raises all kinds
        fail(f"{path} is damaged, locked, or not from this version ({type(error).__name__})")
    return state


def save_checkpoint(path, cfg, run, meta, parts):
    """Replaces the checkpoint by one of plain types and tensors."""
    content = {"format": FORMAT, "config": asdict(cfg), "run": asdict(run), "meta": meta}
    content["tokenizer"] = (Path(cfg.data) / "tokenizer.tiktoken").read_text()
    content |= {name: part.state_dict() for name, part in parts.items()}
    write_whole(path, partial(torch.save, content))


def begin(given):
    """(Config, None) of a new run, or (Config, state) of the run in --out that is resumed."""
    out = Path(given.get("out", Config.out))
    if out.name == "checkpoint.pt":  # its folder is meant
        out = out.parent
    if not given.get("resume"):
        taken = [name for name in ("checkpoint.pt", "log.csv") if (out / name).exists()]
        if taken and not given.get("overwrite"):
            fail(f"{out} holds a run: --resume goes on with it, --overwrite replaces it")
        return make_config(given | {"out": str(out)}), None
    state = load_checkpoint(out)
    saved = state["config"] | {"out": str(out)}  # the folder may have moved
    may_change = {"data", "resume", "device", "dtype", "compile", "micro_batch"}
    for name in given.keys() - may_change - {"out"}:
        if given[name] not in (saved[name], "auto"):
            fail(f"--{name} was {saved[name]} and cannot change in a resumed run: leave it out")
    return Config(**saved | {name: given[name] for name in given.keys() & may_change}), state


def log_row(log, run, before, evaluated, cfg, seq_len, machine_rate):
    """Adds a row to log.csv and prints it: lr, batch_rows are to come. before: Run at the last."""
    p, seconds = run.progress, max(run.seconds - before.seconds, 1e-9)
    speed = round((run.reads - before.reads) * seq_len / seconds)
    loss = np.mean(run.losses) if run.losses else math.nan
    row = {
        "step": run.step, "seconds": round(run.seconds, 2), "progress": p,
        "tokens": run.reads * seq_len, "exaflops": run.flops / 1e18, "lr": cfg.lr * lr_at(p, cfg),
        "batch_rows": batch_at(p, cfg), "train_loss": loss,
        "val_loss": run.val_loss if evaluated else "", "grad_norm": run.grad_norm,
        "tokens_per_s": speed, "mfu": round((run.flops - before.flops) / seconds / machine_rate, 4),
    }  # fmt: skip
    if log.tell() == 0:
        log.write(",".join(row) + "\n")
    log.write(",".join(str(value) for value in row.values()) + "\n")
    text = f"{p:6.1%}  step {run.step}"
    if run.losses:
        left = run.seconds / p * (1 - p) / 60
        text += f"  loss {loss:.3f}  {speed} tokens/s  {left:.1f} min left"
    if evaluated:
        say(f"{text}  val {run.val_loss:.3f}")
    show(f"[{'#' * int(p * 20):20}] {text}")


# ---- Training ------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(model, rows, micro_batch, depth, device, autocast):
    """Mean loss in nats over `rows`, masked in one way for all runs: so their losses compare."""
    model.eval()
    numbers, rng = np.arange(len(rows)), np.random.default_rng(0)
    fixed = Config(mask_rate=0.25)  # whatever the run itself hides
    total = 0
    for batch in make_batches(rows, numbers, micro_batch, rng, fixed, model.vocab_size, device):
        with autocast:
            total += model(*batch, depth) * len(batch[0])
    model.train()
    return total.item() / len(rows)


def take_step(run, loss, rate, model, optimizers, scaler, cfg):
    """Clips the gradient and lets the optimisers use it, at `rate` of their peak learning rates."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
    loss, norm = torch.stack((loss, norm)).tolist()  # only here does a step wait for the device
    if not math.isfinite(loss + norm) and scaler.get_scale() <= 1:  # fp16 scales down first
        fail(f"no finite loss at step {run.step}: --resume --dtype fp32, or try a smaller --lr")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        if math.isfinite(norm):  # fp16 at first has too large a scale
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()
    run.losses.append(loss)
    run.grad_norm = norm


def train(given):
    """Trains until the budget is spent, or a signal asks to stop."""
    cfg, state = begin(given)  # state: of the run that is resumed, or None
    amount, unit = parse_budget(cfg.budget)
    device, dtype = choose_device(cfg)
    rank, world = join_processes()
    if rank == 0 and cfg.data == Config.data and not Path(cfg.data).exists():
        say(f"{cfg.data} is not there yet: preparing the embedded corpus")
        if run_script("prepare_data.py", "--out", cfg.data):
            raise SystemExit(1)  # it has said why
    agree([0], world)  # the other processes wait for the first
    meta, train_rows, val_rows = load_data(cfg.data)
    if state and state["meta"]["files"] != meta["files"]:
        fail(f"{cfg.data} is not the data of this run: name its folder with --data")
    vocab_size, seq_len = meta["vocab_size"], meta["seq_len"]
    path = Path(cfg.out) / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)

    # The clock starts here: all that follows, but the last evaluation and save, spends the budget.
    run = Run(**state["run"]) if state else Run()
    start = time.monotonic() - run.seconds
    torch.manual_seed(cfg.seed)
    model = Model(cfg, vocab_size, seq_len).to(device)
    order = np.arange(len(train_rows))  # of the rows, in every pass
    if cfg.shuffle:
        np.random.default_rng(cfg.seed).shuffle(order)
    if cfg.unigram_bias and not state:  # 1 more of each: 0 has no logarithm
        counts = 1 + np.bincount(train_rows[order[:10_000]].ravel(), minlength=vocab_size)
        model.decoder_bias.data.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    optimizers = make_optimizers(model, cfg, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")  # else it does nothing
    parts = {"model": model, "scaler": scaler, **optimizers}
    if state:
        for name, part in parts.items():
            if state[name]:  # empty: the scaler, if the run was not in fp16 before
                part.load_state_dict(state[name])
    autocast = torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")
    (machine_rate,) = agree([matmul_rate(device, dtype) * world], world)  # FLOP/s
    plan(cfg, amount, unit, model, machine_rate)
    if world > batch_at(0, cfg):
        fail(f"{world} processes: expected at most one for each of {batch_at(0, cfg)} rows")
    micro_batch = min(cfg.micro_batch, math.ceil(cfg.batch_size / world))
    forward, micro_batch = fit(model, cfg, micro_batch, device, autocast)
    draws = seq_len + mask_counts(cfg, seq_len)[2]  # numbers that mask_rows uses up for each row

    log_path = path.with_name("log.csv") if rank == 0 else Path(os.devnull)
    mode = "w" if cfg.overwrite or rank else "x"  # x: of two that start at once one fails
    log = open(log_path, "a" if state else mode, buffering=1)
    if log.tell() > run.log_size:  # rows from after the save
        log.truncate(run.log_size)
        log.seek(run.log_size)
    before = replace(run)  # at the last row of the log; after a resume, at the save
    saved_at = run.seconds
    signals = []  # that asked to stop: Ctrl-C, kill, a terminal or a pipe that has gone
    for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE"} & set(dir(signal)):
        number = getattr(signal, name)
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda got, _: signals.append(got))
    say(f"model    {cfg.recipe} {cfg.size}: {cfg.layers} layers, width {cfg.width}")
    say(f"machine  {world} x {device.type}, {dtype}, {machine_rate / 1e9:.0f} GFLOP/s (matmul)")
    say(f"data     {cfg.data}: unigram line {meta['unigram_nats']:.3f} nats")
    say(f"budget   {cfg.budget}: lr {cfg.lr:.2g}, batch {cfg.batch_size}, shallow {cfg.shallow:g}")

    while True:
        # Look: save, evaluate, log. What is due follows from numbers that the checkpoint keeps.
        # It is saved before what is due counts as done, so a resumed run does that again.
        if run.progress < 1:  # else the run had finished before it was resumed
            run.seconds = time.monotonic() - start
        spent = {"seconds": run.seconds, "steps": run.step, "tokens": run.reads * seq_len}
        spent["flops"] = run.flops
        p = min(1.0, spent[unit] / amount)
        p, stop = agree([p, max(signals, default=0)], world)
        run.progress = p
        depth = depth_at(p, cfg)
        eval_due = p * cfg.evals >= run.evals
        save_due = eval_due or stop or run.seconds > saved_at + 600
        if rank == 0 and save_due:
            run.log_size = log.tell()
            save_checkpoint(path, cfg, run, meta, parts)
            saved_at = run.seconds
        if eval_due:
            run.val_loss = evaluate(model, val_rows[:512], micro_batch, depth, device, autocast)
            run.evals = math.floor(p * cfg.evals) + 1  # a long step may pass several
        if eval_due or len(run.losses) == 10:
            log_row(log, run, before, eval_due, cfg, seq_len, machine_rate)
            run.losses.clear()
            before = replace(run)
        if p >= 1 or stop:
            break

        # Learn: one step of the optimisers at progress p; each process takes its share of the rows.
        rows = batch_at(p, cfg)
        first, last = rank * rows // world, (rank + 1) * rows // world
        numbers = order[np.arange(run.reads + first, run.reads + last) % len(order)]
        rng = np.random.default_rng((cfg.seed, run.step))
        rng.bit_generator.advance(first * draws)  # past the masks of the processes before this one
        torch.manual_seed((cfg.seed * 1_000_003 + run.step) * world + rank)  # of dropout
        loss = torch.zeros((), device=device)
        for batch in make_batches(train_rows, numbers, micro_batch, rng, cfg, vocab_size, device):
            with autocast:
                part = forward(*batch, depth) * (len(batch[0]) / rows)  # its share of the mean
            scaler.scale(part).backward()
            loss += part.detach()
        if world > 1:
            for tensor in (loss, *(w.grad for w in model.parameters() if w.grad is not None)):
                torch.distributed.all_reduce(tensor)
        run.step += 1
        run.reads += rows
        run.flops += rows * seq_len * model.flops_per_token(depth)
        take_step(run, loss, lr_at(p, cfg), model, optimizers.values(), scaler, cfg)

    if stop:
        program = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
        again = f"{program} cram.py --resume --out {shlex.quote(cfg.out)}"
        say(f"stopped at step {run.step}, {p:.1%} of the budget; go on with: {again}")
        raise SystemExit(128 + stop)
    if rank == 0:
        run.log_size = log.tell()
        save_checkpoint(path, cfg, run, meta, parts)
        how = ("--to", f"{cfg.out}/curve.svg", "--x", "tokens", "--log", "false")
        run_script("assets/plot.py", cfg.out, *how, stdout=subprocess.DEVNULL)
        spent = f"{run.step} steps, {run.reads * seq_len / 1e6:.3g} M tokens, {run.seconds:.1f} s"
        say(f"finished {spent}: validation loss {run.val_loss:.3f} nats")


def run_script(path, *words, **how):
    """Runs a script that stands beside this one; returns its exit code."""
    script = Path(__file__).resolve().parent / path
    return subprocess.run([sys.executable, script, *words], check=False, **how).returncode


# ---- Commands ------------------------------------------------------------------------------------
def load_model(folder, **overrides):
    """(Model, tokenizer, state) from the checkpoint in `folder` alone; overrides: Config fields."""
    state = load_checkpoint(folder)
    meta = state["meta"]
    model = Model(Config(**state["config"] | overrides), meta["vocab_size"], meta["seq_len"])
    model.load_state_dict(state["model"])
    return model.eval(), load_tokenizer(state["tokenizer"], meta["pattern"]), state


def main(argv):
    command, *rest = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    try:
        if command == "train":
            train(parse_flags(Config, rest, __doc__, dict.fromkeys(SHARES, (0, 1))))
        elif command in ("fill", "plot", "bench", "export"):
            raise SystemExit(run_script(f"assets/{command}.py", *rest))
        else:
            fail(f"no command {command!r}: expected train, fill, plot, bench or export")
    except RuntimeError as error:
        if not re.search("(out of|enough|allocate) memory", str(error)):  # only CUDA has a type
            raise
        fail("out of memory: --resume with a smaller --micro_batch, or start a smaller --size")
    except OSError as error:  # a full disk, a folder that may not be written
        fail(f"{error}: what was saved before is kept")
    except KeyboardInterrupt:  # before the loop: in it, signals only ask to stop
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
