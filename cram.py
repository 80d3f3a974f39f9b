"""Cramming: train a language model from scratch, on one GPU, within a budget.

    python cram.py                                   # a laptop: prepares the embedded corpus, trains 5 minutes
    python cram.py --budget 60steps --out out/smoke  # a smoke test, seconds
    python cram.py --data data/mine --budget 24h     # the real thing: one GPU, one day, the paper's recipe
    python cram.py --resume --out out/cram           # go on after a power cut with what is left of the budget
    python cram.py fill out/cram "returns a new [MASK] with the same shape."

A masked language model reads rows of tokens in which a quarter of the positions are hidden, and learns to name
what was there. The rules and the recipe are those of "Cramming: Training a Language Model on a Single GPU in One
Day" (Geiping & Goldstein, arXiv 2212.14034), "the paper" below; [4.2] is its section 4.2. Read from top to bottom:
settings, machine, tokenizer, model, data, budget, checkpoint and log, the loop, the commands.
"""

import argparse
import base64
import csv
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import numpy as np
import tiktoken
import torch
from torch import nn
from torch.nn import functional as F

# ------------------------------------------------------------------------------------------- settings

def opt(default, help):
    """A dataclass field that is also a command-line flag: `help` is what -h shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting of a run; the defaults are the paper's final recipe, "crammed BERT"."""

    # where, and how long
    data: str = opt("data/docs", "folder made by prepare_data.py")
    out: str = opt("out/cram", "folder for checkpoint.pt, log.csv and curve.svg")
    budget: str = opt("5m", "what to spend: 90s, 5m, 24h, 2000steps, 50Mtokens or 1e15flops [2]")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt with what is left of its budget")
    overwrite: bool = opt(False, "replace the run that OUT holds")
    seed: int = opt(0, "seed of the weights, the masks and the row order after the first pass")
    # the machine [4.1]
    device: str = opt("auto", "auto, cuda, mps or cpu")
    dtype: str = opt("auto", "precision of the matrix products: auto, bf16, fp16 or fp32")
    compile: bool | str = opt("auto", "torch.compile the model: true, false or auto (on a GPU)")
    # the shape [4.2]
    size: str = opt("auto", "tiny, mini, small, base, large or auto (base on a GPU, tiny on a CPU)")
    recipe: str = opt("cram", "a named set of values for the settings below: cram")
    layers: int = opt(0, "transformer blocks; 0: from size (base: 16)")
    width: int = opt(0, "hidden width; 0: from size (base: 768)")
    heads: int = opt(0, "attention heads; 0: from size (base: 12)")
    ffn_width: int = opt(0, "feed-forward width before the gate halves it; 0: from size (base: 3072)")
    dropout: float = opt(0.0, "on embedding, attention and feed-forward outputs [4.3]")
    norm_eps: float = opt(1e-12, "epsilon of LayerNorm")
    init_std: float = opt(0.02, "standard deviation of the normal that fills every matrix at the start")
    # the objective [4.3]
    mask_rate: float = opt(0.25, "share of positions to predict, the same number in every row")
    mask_share: float = opt(0.8, "of those, the share shown as [MASK] ...")
    random_share: float = opt(0.1, "... and the share shown as a random token; the rest stays as it is")
    # the optimiser [4.3]
    lr: float | str = opt("auto", "peak learning rate; auto: 1e-3 for base, more for a narrower model")
    beta1: float = opt(0.9, "AdamW's decay of the mean gradient")
    beta2: float = opt(0.98, "AdamW's decay of the mean squared gradient")
    adam_eps: float = opt(1e-12, "AdamW's epsilon")
    weight_decay: float = opt(0.01, "AdamW's weight decay, none on norms and biases")
    grad_clip: float = opt(0.5, "largest norm of the gradient; 0: no clipping")
    lr_start: float = opt(0.25, "share of the peak learning rate at the start of the triangle")
    lr_peak: float = opt(0.75, "share of the budget at which the learning rate peaks")
    micro_batch: int = opt(128, "most rows in one forward and backward pass; a batch is made of such parts")
    batch_size: int | str = opt("auto", "rows in a step after the ramp; auto: 8192 for 1e10 tokens, less for less")
    batch_ramp: float = opt(0.6, "share of the budget in which the batch grows from one micro-batch; 0: none")
    # watching
    val_rows: int = opt(512, "rows of the validation set, masked once at the default rate")
    log_every: int = opt(10, "steps from one row of log.csv to the next")


RECIPES = {"cram": {}}  # name: values that differ from Config's defaults
SIZES = {"tiny": (2, 128, 2, 512), "mini": (4, 256, 4, 1024), "small": (6, 512, 8, 2048),
         "base": (16, 768, 12, 3072), "large": (24, 1024, 16, 4096)}  # layers, width, heads, ffn_width
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fail(message):
    """Ends the program on a user's mistake: one sentence on stderr, exit code 1, no traceback."""
    raise SystemExit(f"error: {message}")


def show(text):
    """A line on a terminal that the next one replaces; nothing in a log file."""
    if sys.stdout.isatty():
        print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)


def parse_flags(cls, argv, description):
    """The flags typed in `argv` for the fields of the dataclass `cls`, as {field: value}; a tuple takes many words."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=style)
    for f in fields(cls):
        kinds = get_args(f.type) or (str if f.type is tuple else f.type,)
        extra = {"nargs": "+"} if f.type is tuple else {"nargs": "?", "const": True} if bool in kinds else {}
        shown = " ".join(f.default) if f.type is tuple else f.default
        text = f"{f.metadata['help']} (default: {shown or repr(shown)})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", metavar=f.name.upper(), help=text, default=argparse.SUPPRESS,
                            type=functools.partial(convert, kinds), **extra)
    return vars(parser.parse_args(argv))


def convert(kinds, word):
    """A word of the command line as one of `kinds`; str beside another kind stands for the word auto."""
    if kinds == (str,) or (str in kinds and word == "auto"):
        return word
    try:
        return {"true": True, "false": False}[word.lower()] if bool in kinds else kinds[0](word)
    except (KeyError, ValueError):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "auto"}
        raise argparse.ArgumentTypeError(f"got {word!r}, expected {' or '.join(names[k] for k in kinds)}") from None


def make_config(given):
    """A checked Config from the flags that were typed: they win over the recipe, the recipe over the defaults."""
    recipe = given.get("recipe", Config.recipe)
    if recipe not in RECIPES:
        fail(f"unknown recipe {recipe!r}: expected {', '.join(RECIPES)}")
    cfg = Config(**{**RECIPES[recipe], **given})
    if cfg.size == "auto":
        cfg.size = "base" if choose_device(cfg)[0].type == "cuda" else "tiny"
    if cfg.size not in SIZES:
        fail(f"unknown size {cfg.size!r}: expected auto, {', '.join(SIZES)}")
    for name, value in zip(("layers", "width", "heads", "ffn_width"), SIZES[cfg.size], strict=True):
        setattr(cfg, name, getattr(cfg, name) or value)
    if cfg.batch_size != "auto":
        cfg.micro_batch = min(cfg.micro_batch, cfg.batch_size)
    return check_config(cfg)


LIMITS = {  # what is expected: (of which settings, lowest, highest)
    "a number above 0": ("layers width heads ffn_width lr micro_batch batch_size val_rows log_every", 1e-30, math.inf),
    "a number from 0": ("seed norm_eps init_std adam_eps weight_decay grad_clip", 0, math.inf),
    "a share from 0 to 1": ("lr_start mask_share random_share batch_ramp", 0, 1),
    "a share from 0 to less than 1": ("dropout beta1 beta2", 0, 1 - 1e-9),
    "a share between 0 and 1": ("mask_rate lr_peak", 1e-9, 1 - 1e-9),
}


def check_config(cfg):
    """Returns `cfg`, or stops with a sentence about the first setting that makes no sense."""
    parse_budget(cfg.budget)
    for expected, (names, low, high) in LIMITS.items():
        for name in names.split():
            if getattr(cfg, name) != "auto" and not low <= getattr(cfg, name) <= high:
                fail(f"{name} is {getattr(cfg, name)}: expected {expected}")
    if cfg.mask_share + cfg.random_share > 1:
        fail(f"mask_share and random_share sum to {cfg.mask_share + cfg.random_share}: expected at most 1")
    if cfg.width % (2 * cfg.heads) or cfg.ffn_width % 2:
        fail(f"width {cfg.width}, heads {cfg.heads}, ffn_width {cfg.ffn_width}: expected width to split into even heads, ffn_width in 2")
    if cfg.batch_size != "auto" and cfg.batch_size % cfg.micro_batch:
        fail(f"batch_size {cfg.batch_size} is no multiple of micro_batch {cfg.micro_batch}: change either")
    return cfg


# ---------------------------------------------------------------------------------------- the machine

def choose_device(cfg):
    """(torch.device, dtype name, reason): what was asked for, or what this machine does best."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if cfg.device == "auto" else cfg.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fail(f"device {cfg.device!r} cannot be used here ({str(error).splitlines()[0]}): use --device auto")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # for cuda:1 too, what speaks of the current device means this one
    if cfg.dtype not in ("auto", *DTYPES):
        fail(f"unknown dtype {cfg.dtype!r}: expected auto, {', '.join(DTYPES)}")
    if cfg.dtype != "auto":
        return device, cfg.dtype, "as asked"
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return device, *(("bf16", "native to this GPU") if native else ("fp16", "no bf16 here, so with loss scaling"))
    cpu = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if device.type == "cpu" and {"amx_bf16", "avx512_bf16", "bf16"} & set(cpu):
        return device, "bf16", "native to this CPU"
    return device, "fp32", "no native bf16 found"


def clock(device):
    """A monotonic clock in seconds, read when the device has done all of its queued work: an honest one."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.monotonic()


def time_of(work, device, repeats=3):
    """Seconds that work() takes on the device, after a first call that warms up (and compiles)."""
    work()
    start = clock(device)
    for _ in range(repeats):
        work()
    return max(1e-9, clock(device) - start) / repeats


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product here in this dtype: what MFU is a share of, measured, not looked up."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(DTYPES[dtype])
    return 2 * n**3 / time_of(lambda: a @ a, device, repeats=20)


def autocast(device, dtype):
    """The context in which matrix products run in `dtype`; weights, norms and the loss stay in fp32 [4.1]."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32")


# ------------------------------------------------------------------------------------------ tokenizer

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")  # the top end of the vocabulary, in this order
# What may become a token: a contraction, a word, up to three digits or other characters, each with the space
# before it. Text is normalised first, so it holds only lower-case ASCII and single spaces. The bounds keep a
# million times the same letter from being one word, on which byte-pair encoding would take for ever.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?[a-z]{1,32}| ?[0-9]{1,3}| ?[^ a-z0-9]{1,32}| +"""
CONTROL = bytes(c for c in (*range(32), 127) if not chr(c).isspace())


def normalise(text):
    """The paper's normalisation [4.4]: NFD, lower case, no accents, ASCII only, runs of white space folded."""
    if not text.isascii():  # NFD cuts an accent off its letter and split() knows all spaces; then ASCII drops the rest
        text = " ".join(unicodedata.normalize("NFD", text).split())
    return " ".join(text.lower().encode("ascii", "ignore").translate(None, CONTROL).decode().split())


def load_tokenizer(text, pattern=PATTERN):
    """A tiktoken.Encoding from the text of a tokenizer.tiktoken file: base64 token, space, rank on each line."""
    pairs = (line.split() for line in text.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("cram", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)


# ---------------------------------------------------------------------------------------------- model

class Block(nn.Module):
    """A pre-norm transformer block: attention over all positions, then a gated feed-forward network [4.2]."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.attn_norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, bias=False)
        self.attn_out = nn.Linear(cfg.width, cfg.width, bias=False)
        self.ffn_norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.ffn_in = nn.Linear(cfg.width, cfg.ffn_width, bias=False)
        self.ffn_out = nn.Linear(cfg.ffn_width // 2, cfg.width, bias=False)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x, mask):
        """x (B, S, width); mask None or (B, 1, 1, S), true where a position may be looked at -> as x."""
        B, S, W = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(B, S, 3, self.heads, W // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, S, W / heads)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # not causal: each position sees all
        x = x + self.dropout(self.attn_out(a.transpose(1, 2).reshape(B, S, W)))
        value, gate = self.ffn_in(self.ffn_norm(x)).chunk(2, dim=-1)  # each (B, S, ffn_width / 2)
        return x + self.dropout(self.ffn_out(value * F.gelu(gate)))


class Model(nn.Module):
    """The paper's masked language model [4.2]: pre-norm, no biases but in the norms, decoder tied to embedding."""

    def __init__(self, cfg, vocab_size, seq_len):
        super().__init__()
        self.cfg, self.vocab_size, self.seq_len = cfg, vocab_size, seq_len
        self.embedding = nn.Embedding(vocab_size, cfg.width)
        # Scaled sinusoidal positions: a fixed table (S, width), sin on even columns and cos on odd ("Attention Is
        # All You Need", 3.5), times one learned number, which starts at 1/sqrt(width).
        angle = torch.arange(seq_len)[:, None] * 10000.0 ** (-torch.arange(0, cfg.width, 2) / cfg.width)
        self.register_buffer("positions", torch.stack((angle.sin(), angle.cos()), 2).flatten(1), persistent=False)
        self.position_scale = nn.Parameter(torch.tensor(cfg.width**-0.5))
        self.embedding_norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.final_norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=cfg.init_std)

    def encode(self, tokens, mask=None):
        """tokens (B, S); mask None or (B, S), false at padding -> hidden states (B, S, width)."""
        x = self.embedding(tokens) + self.position_scale * self.positions[: tokens.shape[1]]
        x = self.dropout(self.embedding_norm(x))
        mask = None if mask is None else mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.final_norm(x)

    def forward(self, tokens, where, targets=None):
        """Logits (B, K, vocab) at positions `where` (B, K) of tokens (B, S), or their mean loss on targets (B, K)."""
        x = self.encode(tokens)
        # Sparse prediction [4.2]: only the masked positions go through the decoder, the costliest matrix of all.
        x = x.gather(1, where[:, :, None].expand(-1, -1, x.shape[2]))  # (B, K, width)
        logits = F.linear(x, self.embedding.weight)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def flops_per_token(self):
        """Model FLOPs to train on a token: 6 per matrix weight that it passes, and 12 S W a layer of attention."""
        c = self.cfg
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        decoder = mask_counts(c, self.seq_len)[0] / self.seq_len * self.vocab_size * c.width
        return 6 * (weights + decoder) + 12 * c.layers * c.width * self.seq_len


# ------------------------------------------------------------------------------------- data and masks

FILES = ("train.bin", "val.bin", "tokenizer.tiktoken")
DATA_FORMAT = 1


def sha256(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_data(folder):
    """(manifest, text of the tokenizer file, rows to train on, rows to validate on) of a folder made by
    prepare_data.py; rows are memory-mapped uint16 arrays (rows, seq_len); sizes and checksums are checked."""
    folder, again = Path(folder), f"prepare it again: python prepare_data.py --source ... --out {folder}"
    if not (folder / "meta.json").is_file():
        found = "is unfinished, for it has no meta.json" if folder.is_dir() else "does not exist"
        fail(f"data folder {folder} {found}: {again}")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        known = meta["format"] == DATA_FORMAT and all(meta[k] for k in ("seq_len", "vocab_size", "unigram_nats", "pattern"))
        expected = [(folder / name, meta["files"][name]["bytes"], meta["files"][name]["sha256"]) for name in FILES]
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        fail(f"{folder / 'meta.json'} is not a manifest of prepare_data.py: {again}")
    for path, size, digest in expected:
        found = path.stat().st_size if path.is_file() else 0
        if found != size or sha256(path) != digest:
            what = f"it has {found} bytes, expected {size}" if found != size else "its checksum is another"
            fail(f"{path} does not match the manifest ({what}): {again}")
    rows = [np.memmap(folder / name, "<u2", "r").reshape(-1, meta["seq_len"]) for name in FILES[:2]]
    return meta, (folder / "tokenizer.tiktoken").read_text(), *rows


def mask_counts(cfg, seq_len):
    """How many tokens of any row are (predicted, shown as [MASK], shown as a random token) [4.3]."""
    count = max(1, round(cfg.mask_rate * seq_len))
    masked = round(cfg.mask_share * count)
    return count, masked, round((cfg.mask_share + cfg.random_share) * count) - masked


def mask_rows(rows, cfg, vocab_size, generator):
    """Hides part of `rows` (B, S): (tokens shown (B, S), positions to predict (B, K), the tokens there (B, K))."""
    count, masked, randoms = mask_counts(cfg, rows.shape[1])
    # The top K of uniform noise, by size, is a random choice of K positions in random order.
    where = torch.rand(rows.shape, generator=generator, device=rows.device).topk(count).indices
    targets = rows.gather(1, where)
    shown = targets.clone()
    shown[:, :masked] = vocab_size - 1  # [MASK], the last of the specials
    words, shape = vocab_size - len(SPECIALS), (len(rows), randoms)  # a random token is never a special one
    shown[:, masked : masked + randoms] = torch.randint(words, shape, generator=generator, device=rows.device)
    return rows.scatter(1, where, shown), where, targets


def row_numbers(start, count, total, planned, seed):
    """Which of `total` rows are reads `start` to `start + count` of a run that expects `planned` reads: (count,)."""
    # The first pass keeps the order on disk [4.4]; where the budget buys less than a pass, it takes rows evenly from
    # all of that order. Later passes are shuffled, each in its own way.
    step = max(1.0, total / planned)
    length = int(total / step)  # rows in the first pass
    reads = np.arange(start, start + count)
    numbers = (reads * step).astype(np.int64)
    for number in np.unique((reads[reads >= length] - length) // total):
        now = (reads >= length) & ((reads - length) // total == number)
        numbers[now] = shuffled(total, seed, int(number))[(reads[now] - length) % total]
    return numbers


@functools.lru_cache(maxsize=2)
def shuffled(total, seed, number):
    """The order of the rows (total,) in later pass `number`."""
    return np.random.default_rng((seed, number)).permutation(np.arange(total, dtype=np.uint32))


@torch.no_grad()
def evaluate(model, batches, device, dtype):
    """Mean loss in nats over `batches` of (tokens, where, targets): the same rows and masks every time."""
    model.eval()
    with autocast(device, dtype):
        total = sum(model(*batch) * len(batch[0]) for batch in batches)
    model.train()
    return total.item() / sum(len(batch[0]) for batch in batches)


# -------------------------------------------------------------------------------- budget and schedule

def parse_budget(text):
    """'5m' -> (300.0, 'seconds'). Units: s m h; steps, tokens and flops, which may have k, M, G or B before."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)(?:([smh])|([kMGB]?)(steps|tokens|flops))", text)
    amount = float(match[1]) if match else 0
    if not 0 < amount < math.inf:
        fail(f"budget {text!r} is not understood: expected one like 90s, 5m, 24h, 2000steps, 50Mtokens or 1e15flops")
    scale = {"s": 1, "m": 60, "h": 3600, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}[match[2] or match[3]]
    return amount * scale, match[4] or "seconds"


def lr_at(p, cfg):
    """Learning rate at progress p in [0, 1]: a triangle, from a share of the peak up to it and down to 0 [4.3]."""
    rise = cfg.lr_start + (1 - cfg.lr_start) * p / cfg.lr_peak
    return cfg.lr * min(rise, (1 - p) / (1 - cfg.lr_peak))


def batch_at(p, cfg):
    """Rows in the step at progress p: whole micro-batches, from one of them to batch_size over the ramp [4.3]."""
    share = min(1.0, p / cfg.batch_ramp) if cfg.batch_ramp else 1.0
    return cfg.micro_batch * round(1 + (cfg.batch_size // cfg.micro_batch - 1) * share)


def choose_batch_and_lr(cfg, amount, unit, seq_len, flops_per_token, tokens_per_second):
    """Fills in cfg.batch_size and cfg.lr where they are `auto`; returns the tokens that the budget is to buy.

    The paper's values fit 1e10 tokens at width 768. The batch is in proportion to the tokens, from 8 rows up, or a
    short run takes too few steps to leave the unigram plateau; a narrower model takes a higher learning rate. Both
    by experiment: "Short budgets" in the README.
    """
    if unit == "steps":  # the tokens depend on the batch, so it cannot depend on them
        rows = 32 if cfg.batch_size == "auto" else cfg.batch_size
        tokens = amount * seq_len * (rows - cfg.batch_ramp / 2 * (rows - min(rows, cfg.micro_batch)))
    else:
        tokens = amount * {"seconds": tokens_per_second, "tokens": 1, "flops": 1 / flops_per_token}[unit]
        rows = 2 ** max(3, min(13, round(13 + math.log2(max(tokens, 1) / 1e10))))
    if cfg.batch_size == "auto":
        cfg.batch_size = rows if rows <= cfg.micro_batch else rows // cfg.micro_batch * cfg.micro_batch
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch_size)
    cfg.lr = 1e-3 * (768 / cfg.width) ** 0.75 if cfg.lr == "auto" else cfg.lr
    return tokens


# ------------------------------------------------------------------------------- checkpoint, log, picture

CHECKPOINT_FORMAT = 1
COLUMNS = ("step", "seconds", "progress", "tokens", "exaflops", "lr", "batch_rows", "train_loss", "val_loss",
           "grad_norm", "tokens_per_s", "mfu")


@dataclass
class Run:
    """The numbers that change as a run goes on; with the tensors, they are all that a checkpoint must keep."""

    step: int = 0  # optimiser steps done
    reads: int = 0  # rows read: the position in the data, and the seed of the next masks
    seconds: float = 0.0  # spent at the last save
    saved: float = -1.0  # progress at the last save
    logged: int = 0  # step of the last row of the log
    evals: int = 0  # evaluations done
    val_loss: float = math.nan  # of the last evaluation
    lr: float = 0.0  # of the last step, as the next two
    batch_rows: int = 0
    grad_norm: float = 0.0  # before clipping
    loss_sum: float = 0.0  # of the micro-batches since the last row of the log ...
    loss_count: int = 0  # ... and how many they are
    planned_rows: int = 1  # that the budget was expected to buy, at the start
    planned_evals: int = 0
    val_rows: int = 0
    reserve: float = 0.0  # seconds kept for the last evaluation and save
    save_seconds: float = 0.0  # what the last save took


def write_whole(path, write):
    """Calls write(file) on a file that replaces `path` once it is whole and on the disk: a kill leaves old or new."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # or a power cut after the rename leaves an empty file under the good name
    os.replace(part, path)


def load_checkpoint(folder):
    """The state that train saved in `folder`; stops where there is none, or the file is damaged or something else."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        fail(f"{path} does not exist: train first, with python cram.py --out {folder}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # plain types and tensors, never code
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(state["format"])
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
        fail(f"{path} is damaged, or no checkpoint of this version of cram.py ({type(error).__name__}): use a copy, "
             "the version that wrote it, or train again")
    return state


def load_model(folder, trained=True, **overrides):
    """(Model, tokenizer, state) from the checkpoint in `folder` alone; trained=False: with new, random weights."""
    state = load_checkpoint(folder)
    cfg = Config(**{**state["config"], **overrides})
    model = Model(cfg, state["meta"]["vocab_size"], state["meta"]["seq_len"])
    if trained:
        model.load_state_dict(state["model"])
    return model, load_tokenizer(state["tokenizer"], state["meta"]["pattern"]), state


def open_log(path, step):
    """log.csv, open for appending, with a header and its rows up to `step`: where a resumed run goes on."""
    lines = path.read_text().splitlines()[1:] if step and path.is_file() else []
    rows = [line for line in lines if line.count(",") == len(COLUMNS) - 1]  # a power cut may leave a piece of one
    rows = [",".join(COLUMNS), *(row for row in rows if int(row.split(",")[0]) <= step)]
    write_whole(path, lambda file: file.write("".join(row + "\n" for row in rows).encode()))
    return open(path, "a", newline="")


def show_progress(row, left):
    """One line about a row of the log: rewritten in place on a terminal, a line of its own in a file."""
    val = f" val {row['val_loss']:.3f}" if row["val_loss"] else ""
    line = (f"[{'#' * int(20 * row['progress']):.<20}] {row['progress']:6.1%} step {row['step']} loss "
            f"{row['train_loss']:.3f}{val} lr {row['lr']:.1e} batch {row['batch_rows']} "
            f"{row['tokens_per_s'] / 1e3:.1f}k tokens/s {timedelta(seconds=int(left))} left")
    show(line)
    if val or not sys.stdout.isatty():
        print("" if sys.stdout.isatty() else line, flush=True)


SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 400" font-family="sans-serif" font-size="13">
<style>text{fill:#333} .paper{fill:#fff} .c0{stroke:#1f6fb4} .c1{stroke:#d4600c} .c2{stroke:#777}
@media (prefers-color-scheme: dark) {
text{fill:#ddd} .paper{fill:#161b22} .c0{stroke:#6cb2f5} .c1{stroke:#ffa05c} .c2{stroke:#aaa}}
path{fill:none;stroke-width:1.6;stroke-linecap:round} .grid{stroke:#8884;stroke-width:1}
.dash{stroke-dasharray:6 4} .dots{stroke-width:7}</style><rect class="paper" width="720" height="400"/>"""


def ticks(low, high):
    """Round numbers, six or fewer, from low to high."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    unit = next(unit * m for m in (0.2, 0.5, 1, 2) if (high - low) / (unit * m) <= 6)
    return [round(k * unit, 9) for k in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def draw_curves(path, curves, x_label):
    """Writes an SVG of curves, each (label, [(x, loss in nats), ...], style): line, dots, or dash for one level."""
    points = [point for _, pairs, _ in curves for point in pairs]
    x_max, ys = max(x for x, _ in points) or 1, [y for _, y in points]
    low, high = min(ys) - 0.1, max(ys) + 0.1

    def at(x, y):
        return f"{60 + 640 * x / x_max:.1f} {350 - 330 * (y - low) / (high - low):.1f}"

    out = [SVG_HEAD]
    for y in ticks(low, high):
        height = at(0, y).split()[1]
        out.append(f'<path class="grid" d="M60 {height}H700"/><text x="22" y="{float(height) + 4}">{y:g}</text>')
    for x in ticks(0, x_max):
        out.append(f'<text x="{at(x, 0).split()[0]}" y="370" text-anchor="middle">{x:g}</text>')
    out.append(f'<text x="380" y="391" text-anchor="middle">{x_label}</text><text x="22" y="14">nats</text>')
    for i, (label, pairs, style) in enumerate(curves):
        pairs = [(0, pairs[0][1]), (x_max, pairs[0][1])] if style == "dash" else pairs
        line = "M" + ("h0M" if style == "dots" else "L").join(at(*pair) for pair in pairs) + "h0"
        key = f"M540 {30 + 20 * i}h0" if style == "dots" else f"M530 {30 + 20 * i}h20"
        out += [f'<path class="c{i % 3} {style}" d="{d}"/>' for d in (line if pairs else "", key)]
        out.append(f'<text x="558" y="{34 + 20 * i}">{label}</text>')
    write_whole(path, lambda file: file.write("\n".join([*out, "</svg>\n"]).encode()))


def draw_run(folder, unigram):
    """folder/curve.svg from the rows of folder/log.csv, if there are any yet."""
    rows = list(csv.DictReader((Path(folder) / "log.csv").read_text().splitlines()))
    curves = [(label, [(float(row["tokens"]) / 1e6, float(row[name])) for row in rows if row[name]], style)
              for label, name, style in (("training", "train_loss", "line"), ("validation", "val_loss", "dots"))]
    if rows:
        curves.append(("unigram model", [(0, unigram)], "dash"))
        draw_curves(Path(folder) / "curve.svg", curves, "tokens, millions")


# ---------------------------------------------------------------------------------------------- train

MAY_CHANGE = {"data", "out", "resume", "overwrite", "device", "dtype", "compile", "log_every"}  # in a resumed run


def resume_config(given):
    """(Config, state) of the run in given["out"]; stops with a list of the typed flags that differ from the run's."""
    state = load_checkpoint(given.get("out", Config.out))
    saved = state["config"]
    if "micro_batch" in given:
        given = {**given, "micro_batch": min(given["micro_batch"], saved["batch_size"])}
    differ = [f"{name} was {saved[name]} and is now {value}" for name, value in given.items()
              if name not in MAY_CHANGE and value not in (saved[name], "auto")]
    if differ:
        fail(f"cannot resume: {'; '.join(differ)}. Leave these flags out, or start a new run with another --out")
    changed = {name: value for name, value in given.items() if name in MAY_CHANGE}
    return check_config(Config(**{**saved, **changed})), state


def make_optimizer(model, cfg):
    """AdamW with the paper's constants; matrices decay, norms and the position scale do not [4.3]."""
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)


def train(given):
    """Trains within a budget and returns the last validation loss in nats; `given`: the flags that were typed.

    The clock starts before the first batch is read and before anything is compiled; evaluation, checkpoints and
    compilation count. Progress p = spent / budget in [0, 1] drives the learning rate, the batch and the stop [2].
    """
    cfg, state = resume_config(given) if given.get("resume") else (make_config(given), None)
    out, (amount, unit), (device, dtype, reason) = Path(cfg.out), parse_budget(cfg.budget), choose_device(cfg)
    if not state and not cfg.overwrite and (out / "checkpoint.pt").exists():
        fail(f"{out} holds a run already: add --resume to go on with it, --overwrite to replace it, or another --out")
    if cfg.data == Config.data and not (Path(cfg.data) / "meta.json").exists():
        import prepare_data  # not at the top, for it imports this file
        print(f"{cfg.data} is not there yet: preparing the embedded corpus", flush=True)
        prepare_data.main(["--out", cfg.data])
    meta, ranks, train_rows, val_rows = load_data(cfg.data)
    if state and state["meta"]["files"] != meta["files"]:
        fail(f"cannot resume: {cfg.data} is not the data that this run was trained on; name its folder with --data")
    vocab_size, seq_len, unigram = meta["vocab_size"], meta["seq_len"], meta["unigram_nats"]
    out.mkdir(parents=True, exist_ok=True)
    start = clock(device) - (state["run"]["seconds"] if state else 0.0)
    torch.manual_seed(cfg.seed)
    model = Model(cfg, vocab_size, seq_len).to(device)
    can_compile = device.type == "cuda" and torch.cuda.get_device_capability() >= (7, 0) and find_spec("triton")
    compiled = bool(can_compile) if cfg.compile == "auto" else cfg.compile
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    flops_per_token, machine_rate = model.flops_per_token(), matmul_rate(device, dtype)
    masks = torch.Generator(device)
    run = Run(**state["run"]) if state else Run(val_rows=min(cfg.val_rows, len(val_rows)))
    # The validation rows are masked once, on the CPU, with default settings and one seed: figures of runs compare,
    # if val_rows is the same (a short time budget gets fewer).
    val = mask_rows(torch.from_numpy(val_rows[: cfg.val_rows].astype(np.int64)), Config(), vocab_size,
                    torch.Generator().manual_seed(0))
    val = list(zip(*(part.to(device).split(64) for part in val), strict=True))[: math.ceil(run.val_rows / 64)]

    def loss_of(rows):
        """The mean loss over the run's next `rows` rows, with masks drawn for them."""
        numbers = row_numbers(run.reads, rows, len(train_rows), run.planned_rows, cfg.seed)
        tokens = torch.from_numpy(train_rows[numbers].astype(np.int64))  # (rows, seq_len)
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # so that the copy to the GPU does not wait for its work
        # Seeded by the position in the data: a resumed run draws the masks that an uninterrupted one would.
        masks.manual_seed((cfg.seed * 1_000_003 + run.reads) & 0xFFFFFFFF)
        with autocast(device, dtype):
            return forward(*mask_rows(tokens.to(device, non_blocking=True), cfg, vocab_size, masks))

    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"][0])  # what dropout draws from
        if len(state["rng"]) == 1 + torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng"][1:])
    else:
        speed, left = 0.0, amount
        if unit == "seconds":  # what will they buy? A few passes, whose gradients are thrown away, tell
            rows = min(cfg.micro_batch, 128 if device.type == "cuda" else 32)
            speed = rows * seq_len / time_of(lambda: loss_of(rows).backward(), device)
            model.zero_grad()
            # The last evaluation is part of the budget too; where it would take a tenth, it gets fewer rows.
            seconds = time_of(lambda: evaluate(model, val[:1], device, dtype), device, 1)
            val = val[: max(1, int(0.1 * amount / seconds))]
            run.val_rows, run.reserve = sum(len(batch[0]) for batch in val), min(seconds * len(val), 0.1 * amount)
            left = max(1.0, amount - run.reserve - (clock(device) - start))
        tokens = choose_batch_and_lr(cfg, left, unit, seq_len, flops_per_token, speed)
        run.planned_rows = math.ceil(tokens / seq_len)
        # A row costs a third of its training to evaluate: so many evaluations stay under 2% of the budget together.
        run.planned_evals = min(20, int(0.02 * 3 * run.planned_rows / run.val_rows))
        torch.manual_seed(cfg.seed)
    log = open_log(out / "log.csv", run.logged)

    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"""model    {cfg.recipe} {cfg.size}: {cfg.layers} layers, width {cfg.width}, {cfg.heads} heads, feed-forward \
{cfg.ffn_width}; {size:.1f} M parameters, {flops_per_token / 1e6:.1f} MFLOP a token
machine  {device.type}, {dtype} ({reason}), {"compiled" if compiled else "eager"}, {machine_rate / 1e9:.0f} GFLOP/s
data     {cfg.data}: {len(train_rows)} rows of {seq_len} tokens, vocabulary {vocab_size}, unigram line {unigram:.3f} nats
budget   {cfg.budget}, about {run.planned_rows * seq_len / 1e6:.3g} M tokens: learning rate {cfg.lr:.2g}, \
batch {cfg.micro_batch} to {cfg.batch_size} rows, validation on {run.val_rows} rows
start    at step {run.step}, after {run.seconds:.0f} s""", flush=True)

    def elapsed():
        return clock(device) - start

    def progress():
        if unit == "seconds":
            return min(1.0, elapsed() / (amount - run.reserve))
        tokens = run.reads * seq_len
        return min(1.0, {"steps": run.step, "tokens": tokens, "flops": tokens * flops_per_token}[unit] / amount)

    def check_finite(name, value):
        if not math.isfinite(value):
            fail(f"the {name} is {value} at step {run.step}, learning rate {run.lr:.2g}; {out}/checkpoint.pt holds the "
                 "last good save: try a smaller --lr, or --dtype fp32")

    def save():
        run.loss_sum, run.grad_norm = loss_sum.item(), grad_norm.item()
        check_finite("loss", run.loss_sum)
        if not scaler.is_enabled():  # fp16 overflows now and then: its scaler skips such a step
            check_finite("gradient", run.grad_norm)
        run.seconds, run.saved = elapsed(), p
        now = {"format": CHECKPOINT_FORMAT, "config": asdict(cfg), "run": asdict(run),
               "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
               "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()], "meta": meta, "tokenizer": ranks,
               "versions": {"python": sys.version, "torch": str(torch.__version__), "numpy": np.__version__}}
        write_whole(out / "checkpoint.pt", lambda file: torch.save(now, file))
        draw_run(out, unigram)
        run.save_seconds = elapsed() - run.seconds

    def interrupt(number, _):
        interrupted.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one stops at once
    interrupted, handlers = [], {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    # Summed on the device, so that no micro-batch waits for a number to come back.
    loss_sum, grad_norm = torch.tensor(run.loss_sum, device=device), torch.tensor(run.grad_norm, device=device)
    p = progress()
    if not state:
        save()  # shows that the folder can be written, and how long it takes: the end makes two, around an evaluation
        run.reserve = min(run.reserve + 2 * run.save_seconds, 0.5 * amount) if unit == "seconds" else 0.0
    last_seconds, last_reads, last_shown = elapsed(), run.reads, -1.0
    while True:
        # Evaluations and log rows depend on saved numbers alone, so a resumed run makes them at the same steps.
        p = progress()
        evals = int(p * (run.planned_evals + 1))
        evaluation_due = run.step > run.logged and (p >= 1 or evals > run.evals)
        since = time.monotonic() - start - run.seconds
        often = since >= 600 or p >= run.saved + 0.05 or evaluation_due  # so that a failure in it loses nothing
        if p >= 1 or interrupted or (often and since >= 100 * run.save_seconds):  # saving takes 1% at most
            save()
        if interrupted:
            break
        if evaluation_due or (run.step > run.logged and run.step % cfg.log_every == 0):
            tokens, speed = run.reads * seq_len, (run.reads - last_reads) * seq_len / (elapsed() - last_seconds + 1e-9)
            train_loss = loss_sum.item() / run.loss_count
            check_finite("loss", train_loss)
            if evaluation_due:
                run.evals, run.val_loss = evals, evaluate(model, val, device, dtype)
                check_finite("validation loss", run.val_loss)
            seconds = elapsed()
            row = {"step": run.step, "seconds": round(seconds, 2), "progress": p, "tokens": tokens,
                   "exaflops": tokens * flops_per_token / 1e18, "lr": run.lr, "batch_rows": run.batch_rows,
                   "train_loss": train_loss, "val_loss": run.val_loss if evaluation_due else "",
                   "grad_norm": grad_norm.item(), "tokens_per_s": round(speed),
                   "mfu": round(speed * flops_per_token / machine_rate, 4)}
            csv.DictWriter(log, COLUMNS, lineterminator="\n").writerow(row)
            log.flush()
            if sys.stdout.isatty() or evaluation_due or p >= last_shown + 0.02:
                show_progress(row, max(0.0, amount - seconds if unit == "seconds" else seconds / p - seconds))
                last_shown = p
            last_seconds, last_reads, run.logged, run.loss_count = seconds, run.reads, run.step, 0
            loss_sum.zero_()
        if p >= 1:
            break

        run.batch_rows = batch_at(p, cfg)
        parts = run.batch_rows // cfg.micro_batch
        for _ in range(parts):
            loss = loss_of(cfg.micro_batch)
            scaler.scale(loss / parts).backward()
            loss_sum += loss.detach()
            run.loss_count += 1
            run.reads += cfg.micro_batch
        run.step += 1
        run.lr = lr_at(progress(), cfg)  # this step included, so that the last one of a budget brings it to 0
        for group in optimizer.param_groups:
            group["lr"] = run.lr
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for number, handler in handlers.items():
        signal.signal(number, handler)
    log.close()
    if interrupted:
        print(f"\nstopped at step {run.step}, {p:.1%} of the budget. Go on with: python cram.py --resume --out {out}")
        raise SystemExit(128 + interrupted[0])
    if not run.step:
        fail(f"the budget of {cfg.budget} was spent before the first step: give a larger one")
    save()
    print(f"finished {run.step} steps, {run.reads * seq_len / 1e6:.3g} M tokens, {elapsed():.1f} s: validation loss "
          f"{run.val_loss:.3f} nats, {unigram - run.val_loss:.3f} under the unigram line\n"
          f'try      python cram.py fill {out} "a [MASK] of words."')
    return run.val_loss


# ------------------------------------------------------------------------------------------- commands

def fill(folder, text, top=5):
    """For every [MASK] in `text`, its `top` most likely tokens: a list of lists of (token's text, probability)."""
    model, tokenizer, _ = load_model(folder, dropout=0.0)
    words = tokenizer.n_vocab - len(SPECIALS)  # ids below are text, and the specials follow
    sep, mask = (tokenizer.encode_single_token(name) for name in ("[SEP]", "[MASK]"))
    # In training a word's token includes the space before it, and so does the [MASK] that stands for it.
    tokens = [sep]  # a document stands between [SEP]s, as in training
    for part in re.split(r"\s*(\[MASK\])", text, flags=re.IGNORECASE):
        space = " " if part[:1].isspace() and part.strip() else ""
        tokens += [mask] if part.upper() == "[MASK]" else tokenizer.encode_ordinary(space + normalise(part))
    tokens.append(sep)
    where = [i for i, token in enumerate(tokens) if token == mask]
    if not where or len(tokens) > model.seq_len:
        fail(f"the text has {len(where)} times [MASK] and {len(tokens)} tokens: expected [MASK] where a word is to be "
             f"found, and at most {model.seq_len} tokens")
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens]), torch.tensor([where]))[0, :, :words]  # (K, words)
    best = [part.tolist() for part in logits.softmax(-1).topk(top)]  # probabilities and tokens, each (K, top)
    return [[(tokenizer.decode([token]), p) for p, token in zip(*pair, strict=True)] for pair in zip(*best, strict=True)]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv if argv and not argv[0].startswith("-") else ["train", *argv]
    if command == "train":
        try:
            train(parse_flags(Config, rest, __doc__))
        except OSError as error:  # a full disk, a folder that may not be written
            fail(f"{error}: what checkpoint.pt held before is kept")
    elif command == "fill" and len(rest) == 2:
        for i, answers in enumerate(fill(*rest), 1):
            print(f"[MASK] {i}  " + "  ".join(f"{token.strip() or repr(token)} {p:.1%}" for token, p in answers))
    else:
        what = "what to fill is not clear" if command == "fill" else f"unknown command {command!r}"
        fail(f'{what}: expected train and its flags (-h lists them), or: fill OUT "a sentence with a [MASK]."')


if __name__ == "__main__":
    main()
