"""Cramming: train a language model from scratch, on one GPU, within a budget.

    python cram.py                                   # a laptop: prepares the embedded corpus, trains 5 minutes
    python cram.py --data data/c4 --budget 24h       # the real thing: one GPU, one day; --recipe cram is the paper's
    python cram.py --resume --out out/cram           # go on after a power cut with what is left of the budget
    python cram.py fill out/cram "returns a new [MASK] with the same shape."
    python cram.py plot out/a out/b --to curves.svg  # losses of runs against compute
    python cram.py bench --size base                 # how much of this machine the training uses

A masked language model reads rows of tokens, some of them hidden, and learns to name what was there. Rules and recipes
`bert` and `cram`: "Cramming: Training a Language Model on a Single GPU in One Day" (Geiping & Goldstein, arXiv
2212.14034), "the paper" below; [4.2] is its section 4.2."""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------ settings, the machine
def opt(default, help, *allowed, group=None):
    """A field that is also a flag: default, help, lowest and highest value or choices, and a title above it in -h."""
    kind = "choices" if allowed and isinstance(allowed[0], str) else "limits"
    return field(default=default, metadata={"help": help, "group": group, "choices": (), "limits": (), kind: allowed})

SIZES = {"tiny": (2, 128, 2, 512), "mini": (4, 256, 4, 1024), "small": (6, 512, 8, 2048),
         "base": (16, 768, 12, 3072), "large": (24, 1024, 16, 4096)}  # layers, width, heads, ffn_width

@dataclass
class Config:
    """Every setting of a run, with the values of the paper's final recipe, "crammed BERT"; a recipe changes some."""
    data: str = opt("data/docs", "folder made by prepare_data.py", group="where, and how long")
    out: str = opt("out/cram", "folder for checkpoint.pt, log.csv and curve.svg")
    budget: str = opt("5m", "what to spend: 90s, 5m, 24h, 2000steps, 50Mtokens or 1e15flops [2]")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt with what is left of its budget")
    overwrite: bool = opt(False, "replace the run that OUT holds")
    seed: int = opt(0, "seed of the weights, the masks, dropout and the random row orders", 0, 2**31)
    device: str = opt("auto", "auto, cuda, mps or cpu", group="the machine [4.1]")
    dtype: str = opt("auto", "precision of the matrix products", "auto", "bf16", "fp16", "fp32")
    compile: bool = opt("auto", "torch.compile the model, on a GPU if auto", "auto", True, False)
    size: str = opt("auto", "base on a GPU, tiny on a CPU", "auto", *SIZES, group="the shape [4.2]")
    recipe: str = opt("modern", "values for the fields below; the defaults shown are modern's", "bert", "cram", "modern")
    layers: int = opt(0, "transformer blocks; 0: from size (base: 16)", 0, 1000)
    width: int = opt(0, "hidden width; 0: from size (base: 768)", 0, 2**16)
    heads: int = opt(0, "attention heads; 0: from size (base: 12)", 0, 2**10)
    ffn_width: int = opt(0, "feed-forward width before the gate halves it; 0: from size (base: 3072)", 0, 2**18)
    norm: str = opt("pre", "LayerNorm before or after each part of a block", "pre", "post")
    shallow: float = opt(0.0, "share of the budget in which only the first half of the blocks, at least 2, is trained", 0, 0.99)
    gated: bool = opt(True, "feed-forward with a gate, which halves its width")
    positions: str = opt("sinusoidal", "how a token knows its place", "sinusoidal", "learned", "rotary")
    head: bool = opt(False, "dense layer, GELU, LayerNorm and a bias around the decoder")
    linear_bias: bool = opt(False, "biases in the linear layers")
    norm_bias: bool = opt(True, "biases in LayerNorm")
    zero_init: bool = opt(False, "output matrices of attention and feed-forward start at 0")
    dropout: float = opt(0.0, "on embedding, attention and feed-forward outputs [4.3]", 0, 0.99)
    init_std: float = opt(0.02, "standard deviation of the normal that fills every matrix at the start", 0, 1)
    mask_rate: float = opt(0.25, "share of positions to predict; auto: 0.4 from width 256, else 0.25", 0.001, 1, group="the objective [4.3]")
    mask_share: float = opt(0.8, "of those, the share shown as [MASK] ...", 0, 1)
    random_share: float = opt(0.1, "... and the share shown as a random token; the rest stays as it is", 0, 1)
    optimizer: str = opt("adamw", "muon: for the blocks' matrices only", "adamw", "muon", group="the optimiser [4.3]")
    muon_lr: float = opt(0.02, "peak learning rate of Muon", 1e-9, 10)
    lr: float = opt("auto", "peak learning rate of AdamW; auto: from width, 1e-3 for cram at base", 1e-9, 10)
    weight_decay: float = opt(0.01, "weight decay of the matrices; norms and biases have none", 0, 10)
    grad_clip: float = opt(0.5, "largest norm of the gradient; 0: no clipping", 0, 1e9)
    lr_start: float = opt(0.25, "share of the peak learning rate at the start", 0, 1)
    warmup: float = opt(0.75, "share of the budget over which the learning rate rises", 0, 1)
    cooldown: float = opt(0.25, "share of the budget over which it falls to 0 at the end", 0, 1)
    micro_batch: int = opt(128, "most rows in one forward and backward pass; a batch is made of such parts", 1, 2**16)
    batch_size: int = opt("auto", "rows in a step after the ramp; auto: 8192 for 1e10 tokens or more", 1, 2**24)
    batch_ramp: float = opt(0.6, "share of the budget in which the batch grows from one micro-batch; 0: none", 0, 1)
    shuffle: bool = opt(False, "read rows in random order, not as prepare_data.py sorted them [4.4]")
    val_rows: int = opt(512, "rows of the validation set, masked once at the default rate", 1, 2**24, group="watching")
    log_every: int = opt(10, "steps from one row of log.csv to the next", 1, 2**31)

RECIPES = {  # name: values that differ from Config's defaults; nothing does in cram
    "bert": {"norm": "post", "gated": False, "positions": "learned", "head": True, "linear_bias": True, "dropout": 0.1,
             "mask_rate": 0.15, "lr_start": 0.0, "warmup": 0.01, "cooldown": 0.99, "batch_ramp": 0.0},
    "modern": {"positions": "rotary", "norm_bias": False, "zero_init": True, "optimizer": "muon", "lr_start": 0.0,
               "warmup": 0.05, "cooldown": 0.5, "batch_ramp": 0.0, "shuffle": True, "shallow": 0.6, "mask_rate": "auto"},
}
BETAS, EPS = (0.9, 0.98), 1e-12  # AdamW's; LayerNorm has the same epsilon [4.3]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # of products; the rest is fp32 [4.1]

def fail(message):
    """Ends the program on a user's mistake: one sentence on stderr, exit code 1, no traceback."""
    raise SystemExit(f"error: {message}")

def parse_flags(cls, argv, description):
    """The flags typed in `argv` for the fields of the dataclass `cls`, as {field: value}; a tuple takes many words."""
    style = partial(argparse.RawDescriptionHelpFormatter, width=120, max_help_position=32)
    group = parser = argparse.ArgumentParser(None, "%(prog)s [flags]", description, allow_abbrev=False, formatter_class=style)
    parser.error = lambda message: fail(f"{message} (-h lists all flags)")
    for f in fields(cls):
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        words = {tuple: {"nargs": "+"}, bool: {"nargs": "?", "const": True}}.get(f.type, {})
        default = RECIPES[Config.recipe].get(f.name, f.default) if cls is Config else f.default
        shown = " ".join(default) if f.type is tuple else default
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, type=partial(convert, f, default), **words,
                           help=f"{f.metadata['help']} (default: {shown})".replace("%", "%%").replace(" (default: )", ""),
                           metavar="|".join(map(str, f.metadata["choices"])).lower() or {bool: "true|false"}.get(f.type, f.name.upper()))
    return vars(parser.parse_args(argv))

def convert(f, default, word):
    """A word of the command line as a value that the field `f` allows, `default` always; or else argparse's error."""
    choices, limits = f.metadata["choices"], f.metadata["limits"]
    read = {tuple: str, bool: lambda word: {"true": True, "false": False}[word.lower()]}.get(f.type, f.type)
    with suppress(ValueError, KeyError):
        value = word if word == default else read(word)
        if value == default or (value in choices if choices else not limits or limits[0] <= value <= limits[1]):
            return value
    expected = ", ".join(map(str, choices)) or {int: "a whole number", float: "a number"}.get(f.type, "true or false")
    span = f" from {limits[0]:g} to {limits[1]:g}" if limits else ""
    raise argparse.ArgumentTypeError(f"got {word!r}, expected {expected}{span}")

def make_config(given):
    """A checked Config from the flags that were typed: they win over the recipe, the recipe over the defaults."""
    cfg = Config(**{**RECIPES.get(given.get("recipe", Config.recipe), {}), **given})
    parse_budget(cfg.budget)
    cfg.size = ("base" if choose_device(cfg)[0].type == "cuda" else "tiny") if cfg.size == "auto" else cfg.size
    for name, value in zip(("layers", "width", "heads", "ffn_width"), SIZES[cfg.size], strict=True):
        setattr(cfg, name, getattr(cfg, name) or value)
    cfg.lr = (2e-3 if cfg.optimizer == "muon" else 1e-3) * (768 / cfg.width) ** 0.75 if cfg.lr == "auto" else cfg.lr
    cfg.mask_rate = (0.4 if cfg.width >= 256 else 0.25) if cfg.mask_rate == "auto" else cfg.mask_rate  # Wettig et al. 2023
    for name, other in (("mask_share", "random_share"), ("warmup", "cooldown")):  # above 1 the lr would not reach its peak
        if (total := getattr(cfg, name) + getattr(cfg, other)) > 1:
            fail(f"{name} {getattr(cfg, name)} and {other} {getattr(cfg, other)} sum to {total:g}: expected at most 1")
    if "muon_lr" in given and cfg.optimizer == "adamw":
        fail("muon_lr does nothing with the optimizer adamw: leave it out, or add --optimizer muon")
    if cfg.width % (2 * cfg.heads) or cfg.ffn_width % 2:
        fail(f"width {cfg.width}, heads {cfg.heads}, ffn_width {cfg.ffn_width}: expected even ones, the width even for each head")
    return cfg

def choose_device(cfg):
    """(torch.device, dtype name, reason): what was asked for, or what this machine does best."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if cfg.device == "auto" else cfg.device)
        if device.type == "cuda":  # under torchrun each process has its own
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index)
            device = torch.device("cuda", torch.cuda.current_device())
        torch.empty(1, device=device), getattr(torch, device.type).synchronize  # it is there, and can be waited for
    except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
        fail(f"device {cfg.device!r} cannot be used here ({str(error).splitlines()[0]}): use --device auto; torchrun: a GPU a process")
    if cfg.dtype != "auto":
        return device, cfg.dtype, "as asked"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return device, "fp16", "with loss scaling"
    flags = Path("/proc/cpuinfo").read_text().split() if device.type == "cpu" and sys.platform == "linux" else ()
    native = device.type == "cuda" or {"amx_bf16", "avx512_bf16", "bf16"} & set(flags)
    return (device, "bf16", "native here") if native else (device, "fp32", "no native bf16 here")

def time_of(work, device, repeats=3):
    """Seconds that work() takes on the device, after a first call that warms up (and compiles)."""
    synchronize = getattr(torch, device.type).synchronize  # a clock read while work is queued would lie
    work()
    synchronize()
    start = time.monotonic()
    for _ in range(repeats):
        work()
    synchronize()
    return max(1e-9, time.monotonic() - start) / repeats

def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product here in this dtype: what MFU is a share of, measured, not looked up."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    return 2 * n**3 / time_of(lambda: a @ a, device, repeats=20)

# ---------------------------------------------------------------------------------------------- model
class Block(nn.Module):
    """A transformer block: attention over all positions, then a feed-forward network [4.2]."""
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.pre_norm, self.gated, width = cfg.heads, cfg.norm == "pre", cfg.gated, cfg.width
        self.attn_norm, self.ffn_norm = (nn.LayerNorm(width, eps=EPS, bias=cfg.norm_bias) for _ in range(2))
        self.qkv, self.attn_out = (nn.Linear(width, n * width, bias=cfg.linear_bias) for n in (3, 1))
        self.ffn_in = nn.Linear(width, cfg.ffn_width, bias=cfg.linear_bias)
        self.ffn_out = nn.Linear(cfg.ffn_width // (1 + cfg.gated), width, bias=cfg.linear_bias)
        self.dropout = nn.Dropout(cfg.dropout)
    def attention(self, x, mask, rotation):
        """x (B, S, width); mask None or (B, 1, 1, S), true where a position may be looked at -> as x."""
        B, S, W = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, heads, S, W / heads)
        if rotation is not None:
            q, k = rotate(q, rotation[:, :S]), rotate(k, rotation[:, :S])
        if x.device.type == "cpu" and S <= 256:  # in bf16 the plain formula is a fifth faster here, compiled a third
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, heads, S, S)
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            a = scores.softmax(-1).to(v.dtype) @ v  # not causal: each position sees all
        else:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.dropout(self.attn_out(a.transpose(1, 2).reshape(B, S, W)))
    def feed_forward(self, x):
        """x (B, S, width) -> as x. A gate helps at equal cost, if the width is not raised to make up for it [4.2]."""
        value, gate = self.ffn_in(x).chunk(2, dim=-1) if self.gated else (1.0, self.ffn_in(x))  # (B, S, inner); no gate: 1
        return self.dropout(self.ffn_out(value * F.gelu(gate)))
    def forward(self, x, mask, rotation):
        if self.pre_norm:  # [4.2]: stable at higher learning rates
            x = x + self.attention(self.attn_norm(x), mask, rotation)
            return x + self.feed_forward(self.ffn_norm(x))
        x = self.attn_norm(x + self.attention(x, mask, rotation))
        return self.ffn_norm(x + self.feed_forward(x))

def rotate(x, rotation):
    """Rotary positions (Su et al., arXiv 2104.09864): turns pairs (i, i + D/2) of x (..., S, D) by angles (S, D/2)."""
    (cos, sin), (a, b) = rotation, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

class Model(nn.Module):
    """The masked language model [4.2], with the decoder tied to the embedding."""
    def __init__(self, cfg, vocab_size, seq_len):
        super().__init__()
        self.cfg, self.vocab_size, self.seq_len, self.depth = cfg, vocab_size, seq_len, cfg.layers  # depth: blocks in use
        self.embedding, rotary = nn.Embedding(vocab_size, cfg.width), cfg.positions == "rotary"
        dim = cfg.width // cfg.heads if rotary else cfg.width
        angle = torch.arange(seq_len)[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)  # (S, dim / 2)
        self.register_buffer("rotation", torch.stack((angle.cos(), angle.sin())) if rotary else None, persistent=False)
        if cfg.positions == "learned":
            self.positions = nn.Parameter(torch.empty(seq_len, cfg.width))
        elif cfg.positions == "sinusoidal":
            self.register_buffer("positions", torch.stack((angle.sin(), angle.cos()), 2).flatten(1), persistent=False)
            self.position_scale = nn.Parameter(torch.tensor(cfg.width**-0.5))  # the table's one learned factor
        norm = partial(nn.LayerNorm, cfg.width, eps=EPS, bias=cfg.norm_bias)
        self.embedding_norm, self.dropout = norm(), nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.final_norm = norm() if cfg.norm == "pre" else nn.Identity()
        self.head = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), norm()) if cfg.head else nn.Identity()
        self.decoder_bias = nn.Parameter(torch.zeros(vocab_size)) if cfg.head else None
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.0 if cfg.zero_init and name.endswith("_out.weight") else cfg.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
    def encode(self, tokens, mask=None):
        """tokens (B, S); mask None or (B, S), false at padding -> hidden states (B, S, width)."""
        x = self.embedding(tokens)
        if self.rotation is None:
            x = x + getattr(self, "position_scale", 1) * self.positions[: x.shape[1]]
        x = self.dropout(self.embedding_norm(x))
        for block in self.blocks[: self.depth]:
            x = block(x, None if mask is None else mask[:, None, None, :], self.rotation)
        return self.final_norm(x)
    def forward(self, tokens, where, targets=None):
        """Logits (B, K, vocab) at positions `where` (B, K) of tokens (B, S), or their mean loss on targets (B, K)."""
        x = self.encode(tokens)
        # Sparse prediction [4.2]: only the masked positions go through the decoder, the costliest matrix of all.
        x = self.head(x.gather(1, where[:, :, None].expand(-1, -1, x.shape[2])))  # (B, K, width)
        logits = F.linear(x, self.embedding.weight, self.decoder_bias)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    def flops_per_token(self):
        """Model FLOPs to train on a token: 6 for each weight of blocks and decoder that it meets, and 12 S W of attention a block."""
        c, weights = self.cfg, sum(p.numel() for p in self.blocks[: self.depth].parameters() if p.ndim == 2)
        decoder = mask_counts(c, self.seq_len)[0] / self.seq_len * self.vocab_size * c.width
        return 6 * (weights + decoder) + 12 * self.depth * c.width * self.seq_len

# ------------------------------------------------------------------------------------- data and masks
FILES = ("train.bin", "val.bin", "tokenizer.tiktoken")
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # the top end of the vocabulary, in this order
DATA_FORMAT, CHECKPOINT_FORMAT = 1, 4

def sha256(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def load_data(folder):
    """(manifest, tokenizer file's text, training rows, validation rows), checksums verified; rows: mapped uint16 (rows, seq_len)."""
    folder, again = Path(folder), f"prepare it again: python prepare_data.py --source ... --out {folder}"
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta = {DATA_FORMAT: meta}[meta["format"]]  # of another version: a KeyError
        expected = {name: meta["files"][name]["sha256"] for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{folder} is no finished data folder (its meta.json is missing, or of another version): {again}")
    for name in FILES:
        if not (folder / name).is_file() or sha256(folder / name) != expected[name]:
            fail(f"{folder / name} does not match the manifest (it is missing, or its checksum is another): {again}")
    rows = (np.memmap(folder / name, "<u2", "r").reshape(-1, meta["seq_len"]) for name in FILES[:2])
    return meta, (folder / "tokenizer.tiktoken").read_text(), *rows

def mask_counts(cfg, seq_len):
    """How many tokens of any row are (predicted, shown as [MASK], shown as a random token) [4.3]."""
    count = max(1, round(cfg.mask_rate * seq_len))
    masked = round(cfg.mask_share * count)
    return count, masked, round((cfg.mask_share + cfg.random_share) * count) - masked

def uniform(seed, reads, count):
    """Random numbers (B, count) in [0, 1): a hash of seed, column and `reads` (B,), each row's number in the order of reading,
    and of nothing else, so a row's masks are the same in any micro-batch, in a resumed run and on any number of GPUs."""
    x = (seed * 2**32 + reads[:, None]) * 0x1E3779B97F4A7C15 + torch.arange(count, device=reads.device) * 0x3F58476D1CE4E5B9
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):  # splitmix64's finaliser, in signed int64
        x = (x ^ ((x >> shift) & (1 << 64 - shift) - 1)) * factor  # >> copies the sign bit in from the left; & clears the copies
    return (x & 0xFFFFFF).float() / 2**24

def mask_rows(rows, reads, cfg, vocab_size):
    """Hides part of `rows` (B, S), seeded by `reads` (B,): (tokens shown (B, S), positions to predict (B, K), tokens there (B, K))."""
    count, masked, randoms = mask_counts(cfg, rows.shape[1])
    noise, for_tokens = uniform(cfg.seed, reads, rows.shape[1] + randoms).split((rows.shape[1], randoms), dim=1)
    where = noise.topk(count).indices  # the K largest, by size: a random choice of K positions in random order
    targets = rows.gather(1, where)
    shown = targets.clone()
    shown[:, :masked] = vocab_size - 1  # [MASK], the last of the specials
    shown[:, masked : masked + randoms] = (for_tokens * (vocab_size - len(SPECIALS))).long()  # never a special one
    return rows.scatter(1, where, shown), where, targets

def row_at(read, total, planned, cfg):
    """Which of `total` rows is the `read`-th that a run reads, if it expects to read `planned`."""
    # Unless cfg.shuffle: first the order on disk [4.4], all of it or rows evenly from all of it; then shuffled passes.
    first = 0 if cfg.shuffle else min(total, planned)
    if read < first:
        return read * total // first
    return shuffled(total, cfg.seed, (read - first) // total)[(read - first) % total]

@lru_cache(maxsize=2)
def shuffled(total, seed, number):
    """The order of the rows (total,) in shuffled pass `number`, counted from 0."""
    return np.random.default_rng((seed, number)).permutation(np.arange(total, dtype=np.uint32))

def next_batch(rows, run, cfg, vocab_size, device, reads):
    """mask_rows of the run's rows number reads.start to reads.stop - 1, in its order of reading, on the device."""
    tokens = torch.from_numpy(rows[[row_at(read, len(rows), run.planned_rows, cfg) for read in reads]].astype(np.int64))
    tokens = tokens.pin_memory() if device.type == "cuda" else tokens  # lets the copy below go on in the background
    torch.manual_seed((cfg.seed * 1_000_003 + reads[0]) & 0xFFFFFFFF)  # dropout's seed: a resumed run drops the same
    return mask_rows(tokens.to(device, non_blocking=True), torch.arange(reads.start, reads.stop, device=device), cfg, vocab_size)

@torch.no_grad()
def evaluate(model, batches, device, dtype):
    """Mean loss in nats over `batches` of (tokens, where, targets): the same rows and masks every time."""
    model.eval()
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        total = sum(model(*batch) * len(batch[0]) for batch in batches)
    model.train()
    return total.item() / sum(len(batch[0]) for batch in batches)

# -------------------------------------------------------------------------------- budget and schedule
def parse_budget(text):
    """'5m' -> (300.0, 'seconds'). Units: s m h; steps, tokens and flops, which may have k, M, G or B before."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)(?:([smh])|([kMGB]?)(steps|tokens|flops))", text)
    scale = {"s": 1, "m": 60, "h": 3600, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
    amount = float(match[1]) * scale[match[2] or match[3]] if match else 0
    if not 0 < amount < math.inf:
        fail(f"budget {text!r} is not understood: expected one like 90s, 5m, 24h, 2000steps, 50Mtokens or 1e15flops")
    return amount, match[4] or "seconds"

def lr_at(p, cfg):
    """Share of the peak learning rate at progress p in [0, 1]: up, level and down to 0; cram's is a triangle [4.3]."""
    rise = cfg.lr_start + (1 - cfg.lr_start) * p / cfg.warmup if p < cfg.warmup else 1.0
    return min(rise, (1 - p) / cfg.cooldown if cfg.cooldown else 1.0)

def batch_at(p, cfg):
    """Rows in the step at progress p: whole micro-batches, from one of them to batch_size over the ramp [4.3]."""
    if p >= cfg.batch_ramp:
        return cfg.batch_size
    return cfg.micro_batch * round(1 + (cfg.batch_size // cfg.micro_batch - 1) * p / cfg.batch_ramp)

def depth_at(p, cfg):
    """Blocks in use at progress p. In modern the later ones join as the identity (Gong et al. 2019 copied them)."""
    return min(cfg.layers, max(2, cfg.layers // 2)) if p < cfg.shallow else cfg.layers  # one alone learns too little

def choose_batch(cfg, amount, unit, seq_len, flops_per_token, tokens_per_second):
    """Fills in cfg.batch_size where it is `auto`; returns the tokens that the budget is to buy.
    The paper's 8192 rows fit 1e10 tokens; fewer tokens get fewer rows, for a model learns little in a few dozen steps."""
    if unit == "steps":  # the tokens depend on the batch, so it cannot depend on them
        rows = 32 if cfg.batch_size == "auto" else cfg.batch_size
        tokens = amount * seq_len * (rows - cfg.batch_ramp / 2 * (rows - min(rows, cfg.micro_batch)))  # the mean batch, with its ramp
    else:
        tokens = amount * {"seconds": tokens_per_second, "tokens": 1, "flops": 1 / flops_per_token}[unit]
        rows = 2 ** max(4 if cfg.optimizer == "muon" else 3, min(13, round(13 + math.log2(max(tokens, 1) / 1e10))))
    cfg.batch_size = rows if cfg.batch_size == "auto" else cfg.batch_size
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch_size)
    return tokens

# ------------------------------------------------------------------------------- checkpoint, log, picture
COLUMNS = tuple("step seconds progress tokens exaflops lr batch_rows train_loss val_loss grad_norm tokens_per_s mfu".split())

@dataclass
class Run:
    """The numbers that change as a run goes on; with the tensors, they are all that a checkpoint must keep."""
    step: int = 0  # optimiser steps done
    reads: int = 0  # rows read: the position in the data, and the seed of the next masks
    flops: float = 0.0  # model FLOPs spent
    seconds: float = 0.0  # spent at the last save
    logged: int = 0  # step of the last row of the log
    evals: int = 0  # how many of the planned evaluations are behind (one step may pass several)
    val_loss: float = math.nan  # of the last evaluation
    batch_rows: int = 0  # of the last step
    grad_norm: float = 0.0  # of the last finite step, before clipping
    loss_sum: float = 0.0  # of the steps since the last row of the log ...
    loss_count: int = 0  # ... and how many they are
    planned_rows: int = 2**62  # that the budget was expected to buy, at the start
    skipped: int = 0  # steps whose loss or gradient was not finite
    reserve: float = 0.0  # seconds kept for the last evaluation and save

def write_whole(path, write, keep=False):
    """Calls write(file) on a file that then replaces `path`: a kill leaves old or new. keep: the old one as NAME.prev.X."""
    path, part = Path(path), Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut after the rename leaves an empty file under the good name
        if keep and path.exists():
            os.replace(path, path.with_suffix(f".prev{path.suffix}"))
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # behind its RuntimeError torch.save hides a full disk
        part.unlink(missing_ok=True)
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None

def load_checkpoint(folder):
    """The state that train saved in `folder`, and its `path`; stops where there is none, or the file is damaged or another."""
    path, previous = Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint.prev.pt"
    path = previous if previous.is_file() and not path.exists() else path  # killed between two renames
    if not path.is_file():
        fail(f"{path} does not exist: train first, with python cram.py --out {folder}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # plain types and tensors, never code
        return {CHECKPOINT_FORMAT: state}[state["format"]] | {"path": str(path)}  # of another version: a KeyError
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        instead = f"mv {previous} {path} takes the one before it" if path != previous and previous.is_file() else "use a copy, or train again"
        fail(f"{path} is damaged, or no checkpoint of this version of cram.py ({type(error).__name__}): {instead}")

def load_model(folder, trained=True, **overrides):
    """(Model, tokenizer, state) from the checkpoint in `folder` alone; trained=False: with new, random weights."""
    from prepare_data import load_tokenizer  # not at the top, for it imports this file
    state = load_checkpoint(folder)
    model = Model(Config(**{**state["config"], **overrides}), state["meta"]["vocab_size"], state["meta"]["seq_len"])
    model.load_state_dict(state["model"] if trained else model.state_dict())
    return model, load_tokenizer(state["tokenizer"], state["meta"]["pattern"]), state

def read_log(path):
    """The rows of a log.csv, each {column: text}; a line that a power cut or a full disk cut short is left out."""
    header, *rows = [line.split(",") for line in Path(path).read_text(errors="replace").rpartition("\n")[0].splitlines()] or [()]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows if len(row) == len(COLUMNS) == len(header)]

def open_log(path, step):
    """log.csv, open for appending behind its header and its rows up to `step`: where a resumed run goes on."""
    rows = [row.values() for row in read_log(path) if int(row["step"]) <= step] if step and path.is_file() else []
    write_whole(path, lambda file: file.write("".join(",".join(row) + "\n" for row in (COLUMNS, *rows)).encode()))
    return open(path, "a", buffering=1)  # a row is on the disk as soon as it is written

SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {0}" font-family="sans-serif" font-size="13">
<style>text{{fill:#333}} rect{{fill:#fff}} @media (prefers-color-scheme: dark) {{text{{fill:#ddd}} rect{{fill:#161b22}}}}
path{{fill:none;stroke-linecap:round;stroke-width:1.5}} .grid{{stroke:#8883}} .dash{{stroke-dasharray:6 4}}
.line{{opacity:.7}} .dots{{stroke-width:7}} .mid{{text-anchor:middle}}</style><rect width="900" height="{0}"/>"""
COLOURS = ("#3b8eea", "#e0791f", "#2fa35b", "#e5484d", "#a06cd5", "#1aa6a6", "#d65f9e", "#888888")  # the last: levels
AXES = {"exaflops": ("exaFLOP", 1), "tokens": ("tokens, millions", 1e-6), "seconds": ("seconds", 1)}

def draw(path, series, x_label, log):
    """Writes an SVG of `series`, each (label or "", colour, style: line, dots or dash, [(x, nats), ...]); log: of x."""
    xs, ys = zip(*(pair for *_, pairs in series for pair in pairs), strict=True)
    left, right, low, high = min(xs) if log else 0, max(xs) + 1e-9, min(ys) - 0.05, max(ys) + 0.05
    def across(x):
        return round(50 + 580 * (math.log(x / left) / math.log(right / left) if log else x / right), 1)
    def up(y):
        return round(360 - 348 * (y - low) / (high - low), 1)
    out, key = [f'<text class="mid" x="340" y="400">{x_label}</text><text x="10" y="16">nats</text>'], 10
    by = 1 if high - low > 3 else 0.5 if high - low > 1 else 0.1  # nats from one grid line to the next
    for y in np.arange(math.ceil(low / by) * by, high, by):
        out.append(f'<path class="grid" d="M50 {up(y)}H630"/><text x="42" y="{up(y)}" dy=".3em" text-anchor="end">{y:.4g}</text>')
    numbers = [digit * 10.0**power for power in range(-30, 31) for digit in ((1, 2, 5) if right > 10 * left else (1, 2, 3, 5, 7))]
    inside = [x for x in numbers if left <= x <= right] or [left, right]
    for x in inside if log else np.arange(0, right, min(x for x in numbers if 8 * x > right)):  # not log: 8 at most
        out.append(f'<path class="grid" d="M{across(x)} 12V360"/><text class="mid" x="{across(x)}" y="378">{x:.3g}</text>')
    for label, colour, style, pairs in series:
        line = ("h0M" if style == "dots" else "L").join(f"{across(x)} {up(y)}" for x, y in pairs)
        if label:
            key += 20
            line = f"652 {key}h20" + f"M{line}" * bool(pairs)
            out.append(f'<text x="682" y="{key + 4}">{label.replace("&", "&amp;").replace("<", "&lt;")}</text>')
        out.append(f'<path class="{style}" stroke="{COLOURS[colour]}" d="M{line}h0"/>')
    write_whole(path, lambda file: file.write("\n".join((SVG_HEAD.format(max(410, key + 20)), *out, "</svg>\n")).encode()))

def power_law(points):
    """(lower envelope [(C, L), ...] of `points`, least squares (L0, a, b) of L = L0 + a C^-b, L0 >= 0; None below 4 points)."""
    points = sorted(points)
    envelope = [(c, loss) for i, (c, loss) in enumerate(points) if all(loss < lower for _, lower in points[:i])]
    (c, loss), fits = np.array(envelope).reshape(-1, 2).T, []
    for b in np.geomspace(0.01, 3, 600) if len(envelope) >= 4 else ():  # given b, the rest is linear
        power = (c / c[-1]) ** -b
        floor, a = np.linalg.lstsq(np.stack((np.ones_like(c), power), 1), loss)[0]
        floor, a = (floor, a) if floor >= 0 else (0.0, power @ loss / (power @ power))
        fits.append((((floor + a * power - loss) ** 2).sum(), floor, a * c[-1] ** b, b))
    return envelope, min(fits)[1:] if fits else None

@dataclass
class Plot:
    """The settings of `plot`."""
    to: str = opt("curves.svg", "the picture to write")
    x: str = opt("exaflops", "what a run has spent", *AXES)
    log: bool = opt(True, "logarithmic x axis")
    unigram: float = opt(0.0, "level of the unigram line in nats; 0: from checkpoint.pt beside the logs", 0, 100)

def plot(outs, ask):
    """plot OUT [OUT ...] [flags]: the losses of runs (folders, log.csv files, or folders of such) against what they have
    spent, a colour each; dots: validation; a power law L = L0 + a C^-b through their lower envelope, drawn if x is logarithmic."""
    series, points, levels, (x_label, unit) = [], [], {ask.unigram} - {0.0}, AXES[ask.x]
    for i, out in enumerate(outs):
        paths = [*Path(out).glob("log.csv")] or sorted(Path(out).rglob("*.csv")) or [Path(out)] * Path(out).is_file()
        rows = [row for path in paths for row in read_log(path) if float(row[ask.x])]  # 0 has no logarithm
        training, validation = ([(float(row[ask.x]) * unit, float(row[loss])) for row in rows if row[loss] not in ("", "nan")]
                                for loss in ("train_loss", "val_loss"))
        if not training + validation:
            fail(f"{out} has no log with a loss: expected a run's folder, its log.csv, or a folder of such")
        series += [("", i % 7, "line", training)] * (len(paths) == 1) + [("/".join(Path(out).absolute().parts[-2:]), i % 7, "dots", validation)]
        points += validation
        folders = {path.parent for path in paths if not ask.unigram and (path.parent / "checkpoint.pt").exists()}
        levels |= {load_checkpoint(folder)["meta"]["unigram_nats"] for folder in folders}
    ends = [end(x for *_, pairs in series for x, _ in pairs) for end in (min, max)]
    series += [(f"unigram model {level:.3f}", 7, "dash", [(x, level) for x in ends]) for level in sorted(levels)]
    envelope, law = power_law(points)
    text = "L = {:.3g} + {:.3g} C^-{:.3g}".format(*law) if law else "no power law: it needs four"
    if law and ask.log:
        cs = np.geomspace(envelope[0][0], envelope[-1][0], 50)
        series.append((text, 7, "dash", list(zip(cs, law[0] + law[1] * cs ** -law[2], strict=True))))
    draw(ask.to, series, x_label, ask.log)
    return f"{ask.to}: {len(points)} validation losses, {len(envelope)} on the lower envelope: {text}"

# ---------------------------------------------------------------------------------------------- train
def resume_config(given):
    """(Config, state) of the run in given["out"]; stops with a list of the typed flags that differ from the run's."""
    may_change = ("data", "out", "resume", "overwrite", "device", "dtype", "compile", "log_every")  # and micro_batch, see train
    saved = (state := load_checkpoint(out := given.get("out", Config.out)))["config"] | {"out": out}  # it may have moved
    differ = [f"{name} was {saved[name]} and is now {value}" for name, value in given.items()
              if name not in (*may_change, "micro_batch") and value not in (saved[name], "auto")]
    if differ:
        fail(f"cannot resume: {'; '.join(differ)}. Leave these flags out, or start a new run with another --out")
    return Config(**saved | {name: value for name, value in given.items() if name in may_change}), state

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices: steps by the momentum with its singular values made about 1. As
    torch.optim.Muon, but in fp32 where there is no bf16: a CPU that emulates bf16 takes ten times as long for it."""
    def __init__(self, params, peak, weight_decay, dtype):
        super().__init__([{"params": params, "peak": peak, "weight_decay": weight_decay}], {})
        self.dtype = dtype
    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for p in (p for p in group["params"] if p.grad is not None):  # of the blocks in use
            momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            x, tall = p.grad.lerp(momentum, 0.95).to(self.dtype), p.shape[0] > p.shape[1]
            x = (x.mT if tall else x) / x.norm().clamp(min=1e-7)
            for _ in range(5):  # Newton-Schulz: an odd polynomial of x is that polynomial of its singular values
                xx = x @ x.mT
                x = 3.4445 * x + (2.0315 * xx @ xx - 4.775 * xx) @ x
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(x.mT if tall else x, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)

def make_optimizers(model, cfg, dtype):
    """[AdamW], or [Muon for the blocks' matrices, AdamW for the rest]; `peak` is a group's highest learning rate."""
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2] if cfg.optimizer == "muon" else []
    rest = [p for p in model.parameters() if p not in set(blocks)]  # `in` a list would compare the values
    groups = [{"params": [p for p in rest if (p.ndim >= 2) == decays], "peak": cfg.lr, "weight_decay": cfg.weight_decay * decays}
              for decays in (True, False)]  # matrices decay, norms and biases do not [4.3]
    adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
    return [Muon(blocks, cfg.muon_lr, cfg.weight_decay, DTYPES[dtype.replace("fp16", "fp32")]), adamw] if blocks else [adamw]

def build(cfg, vocab_size, seq_len, device, dtype):
    """(model, the same compiled if asked for, optimisers, fp16's loss scaler): what accumulate and update need."""
    torch.manual_seed(cfg.seed)
    model = Model(cfg, vocab_size, seq_len).to(device)
    able = device.type == "cuda" and torch.cuda.get_device_capability() >= (7, 0) and find_spec("triton") and which("cc")
    asked = able if cfg.compile == "auto" else cfg.compile
    forward = torch.compile(model, dynamic=False, fullgraph=True) if asked else model
    torch._dynamo.config.recompile_limit = 256  # of shapes: a part's rows may change all through the ramp; the default is 8
    return model, forward, make_optimizers(model, cfg, dtype), torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

def accumulate(model, load, parts, rows, micro, scaler, device, dtype):
    """Adds to .grad the gradient of the mean loss over `rows` rows, at most `micro` at a time; returns (loss, micro).
    load(part) gives a part's (tokens, where, targets). Nothing waits for the device. Too little memory halves `micro`."""
    while True:
        try:
            total = torch.zeros((), device=device)
            for part in parts:
                for piece in zip(*(tensor.split(micro) for tensor in load(part)), strict=True):
                    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
                        loss = model(*piece) * (len(piece[0]) / rows)
                    scaler.scale(loss).backward()
                    total += loss.detach()
            return total, micro
        except RuntimeError as error:
            if "memory" not in str(error):  # only CUDA has torch.OutOfMemoryError
                raise
            loss = total = None  # with them goes the graph that fills the memory
            model.zero_grad()
        if micro == 1:
            fail("one row at a time is too much for the memory of this device: choose a smaller --size")
        micro = math.ceil(min(micro, max(map(len, parts))) / 2)  # half of the most that were tried
        print(f"out of memory: on with {micro} rows at a time; the batch stays what it was", flush=True)

def measure(model, optimizers, scaler, cfg, loss):
    """Clips the gradient; returns [loss, gradient norm before clipping]. Only here does a step wait for the device."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    return torch.stack((loss, nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf))).tolist()

def update(optimizers, scaler, share, finite):
    """An optimiser step; none where the gradient is not finite (which in fp16 also makes the scale smaller)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group["peak"]
        if finite:
            scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()

def agreed(values, world, device):
    """The numbers `values` as rank 0 has them."""
    if world > 1:
        dist.broadcast(box := torch.tensor(values, dtype=torch.float64, device=device), 0)
    return box.tolist() if world > 1 else values

def sum_over_ranks(model, loss):
    """Replaces the gradient and the loss by their sums over all processes."""
    idle = set(model.blocks[model.depth :].parameters())
    for weight in (weight for weight in model.parameters() if weight not in idle):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad  # a process may have had no rows
        dist.all_reduce(weight.grad)
    dist.all_reduce(loss)

def train(given):
    """Trains within a budget and returns the last validation loss in nats; `given`: the flags that were typed. Progress
    p = spent / budget in [0, 1] drives learning rate, batch, depth and stop [2]; one clock counts everything below."""
    cfg, state = resume_config(given) if given.get("resume") else (make_config(given), None)
    out, (amount, unit), (device, dtype, reason) = Path(cfg.out), parse_budget(cfg.budget), choose_device(cfg)
    if not state and not cfg.overwrite and any(out.glob("checkpoint*.pt")):
        fail(f"{out} holds a run already: add --resume to go on with it, --overwrite to replace it, or another --out")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = None if rank else sys.stdout  # rank 0 speaks for all
    if cfg.data == Config.data and not (Path(cfg.data) / "meta.json").exists() and rank == 0:
        import prepare_data
        print(f"{cfg.data} is not there yet: preparing the embedded corpus", flush=True)
        prepare_data.main(["--out", cfg.data])
    agreed([0], world, device)  # the others wait for rank 0
    meta, vocabulary, train_rows, val_rows = load_data(cfg.data)
    if state and state["meta"]["files"] != meta["files"]:
        fail(f"cannot resume: {cfg.data} is not the data that this run was trained on; name its folder with --data")
    vocab_size, seq_len, unigram = meta["vocab_size"], meta["seq_len"], meta["unigram_nats"]
    start = time.monotonic() - (state["run"]["seconds"] if state else 0.0)
    model, forward, optimizers, scaler = build(cfg, vocab_size, seq_len, device, dtype)
    flops_per_token, machine_rate = model.flops_per_token(), matmul_rate(device, dtype)
    run, failures, signals = Run(**state["run"]) if state else Run(), [], []
    micro = given.get("micro_batch", cfg.micro_batch)  # rows at a time; cfg's is also the unit of the ramp
    val = torch.from_numpy(val_rows[: cfg.val_rows].astype(np.int64)).to(device)
    val = mask_rows(val, torch.arange(len(val), device=device), Config(), vocab_size)  # defaults: the losses of runs compare
    val = list(zip(*(part.split(64) for part in val), strict=True))
    def elapsed():
        return time.monotonic() - start
    def progress():
        """(share of the budget that is spent, signal that asks to stop or 0): rank 0 decides for all."""
        spent = {"seconds": elapsed(), "steps": run.step, "tokens": run.reads * seq_len, "flops": run.flops}[unit]
        return agreed([min(1.0, spent / (amount - run.reserve)), max(signals, default=0)], world, device)
    def gradient(rows):
        """The loss after accumulate on this process's share of the run's next `rows` rows."""
        nonlocal micro
        size, reads = min(math.ceil(rows / world), cfg.micro_batch), range(run.reads, run.reads + rows)
        parts = [reads[i : i + size] for i in range(rank * size, rows, world * size)]  # micro-batches are dealt out
        load = partial(next_batch, train_rows, run, cfg, vocab_size, device)
        loss, micro = accumulate(forward, load, parts, rows, micro, scaler, device, dtype)
        return loss
    def guarded(write, *args):
        """A full disk costs what did not fit, not the run; before the first step it stops it."""
        try:
            write(*args)
        except OSError as error:
            if not run.step:
                raise
            failures.append(error)
            print(f"\nwarning: step {run.step} could not be written ({error}); what was there is kept", flush=True)
    def save():
        """Writes the checkpoint and the picture; returns the seconds that it took."""
        run.seconds = elapsed()
        now = {"format": CHECKPOINT_FORMAT, "config": asdict(cfg), "run": asdict(run), "meta": meta,
               "tokenizer": vocabulary, "model": model.state_dict(), "scaler": scaler.state_dict(),
               "optimizers": [optimizer.state_dict() for optimizer in optimizers],
               "versions": {"python": sys.version, "torch": str(torch.__version__), "numpy": np.__version__}}
        if rank == 0:
            guarded(write_whole, out / "checkpoint.pt", lambda file: torch.save(now, file), True)
            with suppress(SystemExit):  # there may be no loss to draw yet
                guarded(plot, [out], Plot(f"{out}/curve.svg", "tokens", log=False, unigram=unigram))
        return elapsed() - run.seconds
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # empty but in fp16
    else:
        speed, left = 0.0, amount
        if unit == "seconds":  # what will they buy? A few passes, whose gradients are thrown away, tell
            rows = min(cfg.micro_batch, 128 if device.type == "cuda" else 32) * world
            speed = rows * seq_len / time_of(lambda: gradient(rows), device)
            model.zero_grad()
            evaluation = time_of(lambda: evaluate(model, val[:1], device, dtype), device)
            reserve = min(len(val) * evaluation, 0.2 * amount)  # the last one is part of the budget too
            left, speed, run.reserve = agreed((max(1.0, amount - reserve - elapsed()), speed, reserve), world, device)
        model.depth = depth_at(0, cfg)
        gain = 1 + cfg.shallow * (flops_per_token / model.flops_per_token() - 1)  # tokens for the price of one at full depth
        tokens = choose_batch(cfg, left, unit, seq_len, flops_per_token / gain, speed * gain)  # sets cfg.batch_size, too
        run.planned_rows = math.ceil(tokens / seq_len)
    planned_evals = min(20, int(0.02 * 3 * run.planned_rows / (64 * len(val))))  # 2% of the budget; a row costs a third of a trained one
    log = open_log(out / "log.csv", run.logged) if rank == 0 else open(os.devnull, "w")
    at_first = f" ({depth_at(0, cfg)} until {cfg.shallow:.0%})" if depth_at(0, cfg) < cfg.layers else ""
    print(f"""model    {cfg.recipe} {cfg.size}: {cfg.layers} layers{at_first}, width {cfg.width}, {cfg.heads} heads, feed-forward {cfg.ffn_width}; \
{sum(w.numel() for w in model.parameters()) / 1e6:.1f} M parameters, {flops_per_token / 1e6:.1f} MFLOP a token
machine  {f"{world} x " * (world > 1)}{device.type}, {dtype} ({reason}), {"eager" if forward is model else "compiled"}, {machine_rate / 1e9:.0f} GFLOP/s
data     {cfg.data}: {len(train_rows)} rows of {seq_len} tokens, vocabulary {vocab_size}, unigram line {unigram:.3f} nats
budget   {cfg.budget}, about {run.planned_rows * seq_len / 1e6:.3g} M tokens: learning rate {cfg.lr:.2g}, batch of {cfg.batch_size} rows
start    at step {run.step}, after {run.seconds:.0f} s""", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one is noted, a second one stops at once
        signal.signal(number, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))
    p, stop = progress()
    saving = save()  # seconds; a folder that cannot be written fails here, not after hours
    run.reserve = min(run.reserve + 2 * saving, 0.5 * amount) if unit == "seconds" and not run.step else run.reserve  # two end the run
    saved, shown, last, not_finite = p, (-1.0, 0.0), (elapsed(), run.reads, run.flops), 0  # at the last save, printed line, log row
    while True:
        # Evaluations and log rows depend on saved numbers alone, so a resumed run makes them at the same steps.
        evals, model.depth = int(p * (planned_evals + 1)), depth_at(p, cfg)
        evaluation_due = run.step > run.logged and (p >= 1 or evals > run.evals)
        save_due = evaluation_due or p >= saved + 0.05 or elapsed() >= run.seconds + 600  # before it evaluates: that may fail
        if p >= 1 or stop or (save_due and elapsed() >= run.seconds + 100 * saving):  # saving takes 1% at most
            saving, saved = save(), p
        if evaluation_due or (run.step > run.logged and run.step % cfg.log_every == 0):
            if evaluation_due:
                run.evals, run.val_loss = evals, evaluate(model, val, device, dtype)
            seconds, lr, loss = elapsed(), cfg.lr * lr_at(p, cfg), run.loss_sum / (run.loss_count or math.nan)
            speed = (run.reads - last[1]) * seq_len / (took := seconds - last[0] + 1e-9)
            row = (run.step, round(seconds, 2), p, run.reads * seq_len, run.flops / 1e18, lr, run.batch_rows, loss,
                   run.val_loss if evaluation_due else "", run.grad_norm, round(speed),
                   round((run.flops - last[2]) / took / (machine_rate * world), 4))  # in the order of COLUMNS
            guarded(log.write, ",".join(map(str, row)) + "\n")
            if evaluation_due or p >= shown[0] + 0.02 or seconds >= shown[1] + 60:
                shown = (p, seconds)
                left = max(0.0, amount - seconds if unit == "seconds" else seconds / p - seconds)
                print(f"{p:6.1%}  step {run.step}  loss {loss:.3f}{f'  val {run.val_loss:.3f}' * evaluation_due}  lr {lr:.1e}  batch {run.batch_rows}  "
                      f"{speed / 1e3:.1f}k tokens/s  {left / 60:.1f} min left", flush=True)
            last, run.logged, run.loss_count, run.loss_sum = (seconds, run.reads, run.flops), run.step, 0, 0.0
        if stop or p >= 1:
            break
        run.batch_rows = batch_at(p, cfg)
        loss = gradient(run.batch_rows)
        if world > 1:
            sum_over_ranks(model, loss)
        loss, norm = measure(model, optimizers, scaler, cfg, loss)
        run.step, run.reads = run.step + 1, run.reads + run.batch_rows
        run.flops += run.batch_rows * seq_len * model.flops_per_token()
        p, stop = progress()  # this step included, so that the last one of a budget brings the learning rate to 0
        finite = math.isfinite(loss + norm)
        update(optimizers, scaler, lr_at(p, cfg), finite)
        if finite:
            run.loss_sum, run.loss_count, run.grad_norm = run.loss_sum + loss, run.loss_count + 1, norm
        run.skipped, not_finite = run.skipped + (not finite), 0 if finite else not_finite + 1
        if not_finite >= 10 and scaler.get_scale() <= 1:  # fp16 may first need many smaller scales
            fail(f"no finite loss or gradient for {not_finite} steps up to step {run.step}, at learning rate "
                 f"{cfg.lr * lr_at(p, cfg):.2g}; {out}/checkpoint.pt holds the last good save: "
                 "--resume with --dtype fp32, or start again with a smaller --lr")
    if stop:
        print(f"\nstopped at step {run.step}, {p:.1%} of the budget. Go on with: python cram.py --resume --out {out}")
        raise SystemExit(128 + int(stop))
    if not run.step:
        fail(f"the budget of {cfg.budget} was spent before the first step: give a larger one, and --overwrite")
    save()
    print(f"finished {run.step} steps, {run.reads * seq_len / 1e6:.3g} M tokens, {elapsed():.1f} s: validation loss "
          f"{run.val_loss:.3f} nats, {unigram - run.val_loss:.3f} under the unigram line"
          f"{f' ({run.skipped} steps skipped: not finite)' if run.skipped else ''}\n"
          f'try      python cram.py fill {out} "a [MASK] of words."')
    if failures:
        fail(f"{len(failures)} times a file could not be written ({failures[-1]}): make room, then --resume --out {out}")
    return run.val_loss

# ------------------------------------------------------------------------------------------- commands
def fill(folder, text, top=5):
    """For every [MASK] in `text`, its `top` most likely tokens: a list of lists of (token's text, probability)."""
    from prepare_data import normalise
    model, tokenizer, _ = load_model(folder)
    sep, mask = (tokenizer.encode_single_token(name) for name in ("[SEP]", "[MASK]"))
    # In training a word's token includes the space before it, and so does the [MASK] that stands for it.
    first, *rest = re.split(r"\s*\[MASK\]", text, flags=re.IGNORECASE)
    tokens = [token for part in rest for token in (mask, *tokenizer.encode_ordinary(normalise("x" + part)[1:]))]  # behind the x a space stays
    tokens = [sep, *tokenizer.encode_ordinary(normalise(first)), *tokens, sep]  # a document stands between [SEP]s, as in training
    where = [i for i, token in enumerate(tokens) if token == mask]
    if not where or len(tokens) > model.seq_len:
        fail(f"the text has {len(where)} times [MASK] and {len(tokens)} tokens: expected [MASK] where a word is to be "
             f"found, and at most {model.seq_len} tokens")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens]), torch.tensor([where]))[0, :, : -len(SPECIALS)]  # (K, words)
    best = [part.tolist() for part in logits.softmax(-1).topk(top)]  # probabilities and tokens, each (K, top)
    return [[(tokenizer.decode([token]), p) for p, token in zip(*pair, strict=True)] for pair in zip(*best, strict=True)]

def bench(given):
    """Prints the speed of a training step on random tokens, medians of five; outside: what it takes beyond a ready batch."""
    cfg, seq_len, vocab_size = make_config(given), 128, 2**15
    device, dtype, reason = choose_device(cfg)
    size = cfg.micro_batch if device.type == "cuda" or "micro_batch" in given else 32
    rows = np.random.default_rng(0).integers(0, vocab_size - len(SPECIALS), (4096, seq_len), np.uint16)
    model, forward, optimizers, scaler = build(cfg, vocab_size, seq_len, device, dtype)
    load = partial(next_batch, rows, Run(), cfg, vocab_size, device)
    ready = load(range(size))
    _, micro = accumulate(forward, load, [range(size)], size, size, scaler, device, dtype)  # as many rows as fit
    def step(load):
        loss, _ = accumulate(forward, load, [range(size)], size, micro, scaler, device, dtype)
        update(optimizers, scaler, 0.1, math.isfinite(sum(measure(model, optimizers, scaler, cfg, loss))))
    whole, bare, per_tflop = np.median([(time_of(lambda: step(load), device), time_of(lambda: step(lambda _: ready), device),
                                         1e12 / matmul_rate(device, dtype)) for _ in range(5)], axis=0)
    tflops = size * seq_len * model.flops_per_token() / whole / 1e12
    peak = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()) if sys.platform == "linux" else [math.nan]
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * float(*peak)
    print(f"""model    {cfg.recipe} {cfg.size}, {model.flops_per_token() / 1e6:.1f} MFLOP a token, {size} rows of {seq_len} tokens
machine  {device.type}, {dtype} ({reason}), {"eager" if forward is model else "compiled"}; {memory / 1e9:.2f} GB at most
speed    {size * seq_len / whole:.0f} tokens/s, {tflops:.3g} TFLOP/s, MFU {tflops * per_tflop:.1%} of {1 / per_tflop:.3g} TFLOP/s
outside  {max(0.0, 1 - bare / whole):.1%} of the time is not forward, backward or optimiser""")

def main(argv):
    command, *rest = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    try:
        if command in ("train", "bench"):
            {"train": train, "bench": bench}[command](parse_flags(Config, rest, __doc__))
        elif command == "plot" and rest and (rest[0] == "--help" or not rest[0].startswith("--")):
            outs = rest[: next((i for i, word in enumerate(rest) if word.startswith("-")), None)]
            print(plot(outs, Plot(**parse_flags(Plot, rest[len(outs):], plot.__doc__))))
        elif command == "fill" and len(rest) == 2:
            for i, answers in enumerate(fill(*rest), 1):
                print(f"[MASK] {i}  " + "  ".join(f"{token.strip() or repr(token)} {p:.1%}" for token, p in answers))
        else:
            fail(f'{" ".join(argv)!r} is not understood: expected train, bench, plot OUT ... or fill OUT "a text with a [MASK]."')
    except OSError as error:  # a full disk, a folder that may not be written
        fail(f"{error}: the files that were there are kept")
    except KeyboardInterrupt:  # before the loop, which catches the first one
        raise SystemExit(130) from None

if __name__ == "__main__":
    main(sys.argv[1:])
