"""The score: fine-tunes a trained model on GLUE tasks and measures it on their dev sets.

    python finetune_glue.py --checkpoint out/cram --glue_dir data/glue --tasks cola,sst2,rte,stsb
    python finetune_glue.py --checkpoint none --like out/cram ...      # the same model from random weights: the baseline

The rules of the paper ([2] is section 2 of the one named in cram.py): one setting for all tasks, at most 5 epochs, only the task's own training data; the score
of a task is the median over seeds. GLUE_DIR holds the official folders: CoLA/train.tsv, CoLA/dev.tsv, SST-2/...
No test label is read: the files have none.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cram import autocast, choose_device, fail, load_model, normalise, opt, parse_flags, show

# ------------------------------------------------------------------------------------------ tasks, metrics


def accuracy(predicted, true):
    """Share of equal labels."""
    return float(np.mean(predicted == true))


def f1(predicted, true):
    """Harmonic mean of precision and recall of label 1; 0 where there is nothing to find and nothing found."""
    hits = np.sum((predicted == 1) & (true == 1))
    return float(2 * hits / max(1, np.sum(predicted == 1) + np.sum(true == 1)))


def matthews(predicted, true):
    """Correlation of two binary labels; 0 where one side is constant (the limit, and what scikit-learn gives)."""
    p, t = predicted - np.mean(predicted), true - np.mean(true)
    scale = math.sqrt(np.sum(p * p) * np.sum(t * t))
    return float(np.sum(p * t) / scale) if scale else 0.0


def pearson(predicted, true):
    """Linear correlation; nan where one side is constant, for then it is undefined."""
    p, t = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    p, t = p - p.mean(), t - t.mean()
    scale = math.sqrt(np.sum(p * p) * np.sum(t * t))
    return float(np.sum(p * t) / scale) if scale else math.nan


@dataclass
class Task:
    """A GLUE task: its folder, the columns of its text(s) and label (by name, or by number where there is no header),
    its labels in order (None: a score from 0 to 5), and the metric that counts."""

    folder: str
    texts: tuple
    label: str | int
    labels: tuple | None
    metric: object


TASKS = {
    "cola": Task("CoLA", (3,), 1, ("0", "1"), matthews),
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1"), accuracy),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", None, pearson),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment"), accuracy),
}


@dataclass
class Options:
    """The paper's one setting for all tasks [2]; a number that is changed is changed for all of them."""

    checkpoint: str = opt("out/cram", "folder of the trained model, or none: random weights")
    like: str = opt("out/cram", "with --checkpoint none: the folder whose shape and vocabulary the random model takes")
    glue_dir: str = opt("data/glue", "folder with CoLA/, SST-2/, ... as GLUE unpacks them")
    tasks: str = opt("all", f"all, or some with commas between: {','.join(TASKS)}")
    seeds: int = opt(5, "runs of each task, with seeds 0, 1, ...; the score is their median")
    epochs: int = opt(5, "passes over the training set; the paper allows 5")
    batch_size: int = opt(16, "examples in a step")
    lr: float = opt(4e-5, "peak learning rate: warm-up, then cosine to 0")
    warmup: float = opt(0.1, "share of the steps over which the learning rate rises")
    dropout: float = opt(0.1, "dropout in the encoder and before the classifier")
    head_width: int = opt(1024, "width of the classifier's hidden layer")
    beta1: float = opt(0.9, "AdamW's decay of the mean gradient")
    beta2: float = opt(0.98, "AdamW's decay of the mean squared gradient")
    adam_eps: float = opt(1e-6, "AdamW's epsilon")
    device: str = opt("auto", "auto, cuda, mps or cpu")
    dtype: str = opt("auto", "auto, bf16, fp16 or fp32")


# --------------------------------------------------------------------------------------------------- data


def read_task(folder, task, split):
    """(texts, labels) of folder/SPLIT.tsv: a list of tuples of strings and a numpy array; stops on a malformed file."""
    path = Path(folder) / task.folder / f"{split}.tsv"
    if not path.is_file():
        fail(f"{path} does not exist: --glue_dir must hold the folder {task.folder} with train.tsv and dev.tsv")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): get the official file again")
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip("\r")]  # no quoting: a " is a character like any other
    columns = [*task.texts, task.label]
    where = columns
    if isinstance(task.label, str):
        header = rows.pop(0) if rows else []
        missing = [name for name in columns if name not in header]
        if missing:
            fail(f"{path} has no column {missing[0]!r}: found {', '.join(header) or 'an empty file'}")
        where = [header.index(name) for name in columns]
    if not rows:
        fail(f"{path} has no examples: expected tab-separated rows with {columns}")
    texts, labels = [], []
    for number, row in enumerate(rows, 1 + isinstance(task.label, str)):
        if len(row) <= max(where):
            fail(f"{path}, line {number} has {len(row)} columns, expected at least {max(where) + 1}")
        *text, label = (row[i] for i in where)
        try:
            labels.append(float(label) if task.labels is None else task.labels.index(label))
            if not 0 <= labels[-1] <= 5:
                raise ValueError
        except ValueError:
            expected = "a number from 0 to 5" if task.labels is None else " or ".join(task.labels)
            fail(f"{path}, line {number} has the label {label!r}: expected {expected}")
        texts.append(tuple(text))
    return texts, np.array(labels, np.float32 if task.labels is None else np.int64)


def encode(texts, tokenizer, seq_len):
    """Each tuple of texts as `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` in at most seq_len tokens: a list of lists.

    A pair that is too long loses tokens from the end of its longer text, one at a time.
    """
    cls, sep = (tokenizer.encode_single_token(name) for name in ("[CLS]", "[SEP]"))
    rows = []
    for text in texts:
        parts = [tokenizer.encode_ordinary(normalise(part)) for part in text]
        while 1 + sum(len(part) + 1 for part in parts) > seq_len:
            max(parts, key=len).pop()
        rows.append([cls] + [token for part in parts for token in (*part, sep)])
    return rows


def bucketed(lengths, batch_size, rng=None, span=50):
    """Batches of indices with little padding: examples of like length together, all of them once.

    With a generator, the order is random but for sorting by length within spans of `span` batches; without one, the
    examples are just sorted.
    """
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    size = len(order) if rng is None else span * batch_size
    spans = [order[i : i + size] for i in range(0, len(order), size)]
    spans = [part[np.argsort(lengths[part], kind="stable")] for part in spans]
    batches = [part[i : i + batch_size] for part in spans for i in range(0, len(part), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def collate(rows, pad_id, device):
    """Rows of tokens of any length -> (tokens (B, S) padded at the end, mask (B, S) true where there is a token)."""
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), pad_id)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    tokens = tokens.to(device)
    return tokens, tokens != pad_id


# -------------------------------------------------------------------------------------------- fine-tuning


class Classifier(nn.Module):
    """The encoder with the paper's classifier on its first position: dense, tanh, dropout, linear [2]."""

    def __init__(self, encoder, outputs, head_width, dropout):
        super().__init__()
        self.encoder = encoder
        self.dense = nn.Linear(encoder.cfg.width, head_width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(head_width, outputs)
        for layer in (self.dense, self.out):
            nn.init.normal_(layer.weight, std=encoder.cfg.init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens, mask):
        """tokens and mask (B, S) -> logits (B, outputs)."""
        first = self.encoder.encode(tokens, mask)[:, 0]
        with torch.autocast(tokens.device.type, enabled=False):  # fp32: between 2 and 4 bf16 has steps of 1/64, and STS-B scores would tie
            return self.out(self.dropout(torch.tanh(self.dense(first.float()))))


def lr_at(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up over a share of the steps, then a cosine to 0."""
    p = step / steps
    return p / warmup if p < warmup else 0.5 * (1 + math.cos(math.pi * (p - warmup) / (1 - warmup)))


def finetune(task, train, dev, options, seed, device, dtype):
    """Trains on `train`, (rows of tokens, labels), from the checkpoint, and returns the metric on `dev`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    scratch = options.checkpoint == "none"
    source = options.like if scratch else options.checkpoint
    encoder, tokenizer, _ = load_model(source, dropout=options.dropout, trained=not scratch)
    model = Classifier(encoder, len(task.labels or (0,)), options.head_width, options.dropout).to(device)
    pad_id = tokenizer.encode_single_token("[PAD]")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(options.beta1, options.beta2), eps=options.adam_eps,
                                  weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    rows, labels = train
    lengths = np.array([len(row) for row in rows])
    labels = torch.from_numpy(labels).to(device)
    steps, step = options.epochs * math.ceil(len(rows) / options.batch_size), 0
    for _ in range(options.epochs):
        for batch in bucketed(lengths, options.batch_size, rng):
            tokens, mask = collate([rows[i] for i in batch], pad_id, device)
            with autocast(device, dtype):
                logits = model(tokens, mask)
            target = labels[torch.from_numpy(batch).to(device)]
            loss = F.mse_loss(logits[:, 0], target) if task.labels is None else F.cross_entropy(logits, target)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * lr_at(step, steps, options.warmup)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
        show(f"seed {seed}: {step}/{steps} steps")
    predicted = predict(model, dev[0], pad_id, device, dtype, task.labels is None)
    return task.metric(predicted, dev[1]) if predicted is not None else math.nan


@torch.no_grad()
def predict(model, rows, pad_id, device, dtype, regression):
    """Predicted label numbers, or scores, of rows of tokens, in their order: a numpy array; None after a divergence."""
    model.eval()
    result = np.zeros(len(rows), np.float64 if regression else np.int64)
    for batch in bucketed(np.array([len(row) for row in rows]), 64):
        with autocast(device, dtype):
            logits = model(*collate([rows[i] for i in batch], pad_id, device))
        if not logits.isfinite().all():
            return None
        result[batch] = (logits[:, 0] if regression else logits.argmax(1)).cpu().numpy()
    return result


def main(argv=None):
    options = Options(**parse_flags(Options, sys.argv[1:] if argv is None else argv, __doc__))
    names = list(TASKS) if options.tasks == "all" else options.tasks.split(",")
    for name in names:
        if name not in TASKS:
            fail(f"unknown task {name!r}: expected all, or some of {','.join(TASKS)} with commas between")
    for name in ("seeds", "epochs", "batch_size", "head_width", "lr"):
        if not getattr(options, name) > 0:
            fail(f"{name} is {getattr(options, name)}: expected a number above 0")
    for name in ("warmup", "dropout", "beta1", "beta2"):
        if not 0 <= getattr(options, name) < 1:
            fail(f"{name} is {getattr(options, name)}: expected a share from 0 to less than 1")
    model, tokenizer, state = load_model(options.like if options.checkpoint == "none" else options.checkpoint)
    data = {name: [read_task(options.glue_dir, TASKS[name], split) for split in ("train", "dev")] for name in names}
    device, dtype, reason = choose_device(options)
    what = (f"random weights in the shape of {options.like}" if options.checkpoint == "none" else
            f"{options.checkpoint}, {state['run']['reads'] * model.seq_len / 1e6:.1f} M tokens read")
    print(f"model    {what}: {model.cfg.recipe}, {model.cfg.layers} layers, width {model.cfg.width}\n"
          f"machine  {device.type}, {dtype} ({reason})\n"
          f"setting  {options.epochs} epochs, batch {options.batch_size}, lr {options.lr:g}, seeds 0 to {options.seeds - 1}",
          flush=True)
    table = []
    for name in names:
        task, started = TASKS[name], time.monotonic()
        train, dev = ((encode(texts, tokenizer, model.seq_len), labels) for texts, labels in data[name])
        scores = [finetune(task, train, dev, options, seed, device, dtype) for seed in range(options.seeds)]
        median = statistics.median(scores) if all(map(math.isfinite, scores)) else math.nan
        table.append(f"| {name} | {task.metric.__name__} | {100 * median:.1f} | {100 * min(scores):.1f} to "
                     f"{100 * max(scores):.1f} | {len(train[0])} / {len(dev[0])} | {time.monotonic() - started:.0f} |")
        show("")
        print(f"{name:8} {task.metric.__name__} {' '.join(f'{100 * score:.1f}' for score in scores)}", flush=True)
        if not math.isfinite(median):
            print(f"{'':8} {task.metric.__name__} is undefined: a run diverged, or predicted one score for all")
    print("\n| task | metric | median | range | train / dev rows | seconds |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
