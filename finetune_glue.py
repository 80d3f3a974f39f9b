"""The score: fine-tunes a trained model on the tasks of GLUE and measures it on their dev sets.

    python finetune_glue.py --checkpoint out/cram                      # all tasks, 5 seeds
    python finetune_glue.py --checkpoint none --like out/cram          # a baseline: random weights
    python finetune_glue.py --checkpoint out/cram --submit out/submit  # and files for GLUE's server

The rules are the paper's ([2]: section 2 of the one that cram.py names): one setting for all tasks,
at most 5 epochs, no data but the task's own training set; its score is the median over seeds.
Each finished run is kept in the folder glue/ beside the checkpoint: the same command goes on after
an interruption, and several may work on one checkpoint. No label of a test file is looked at.
"""

import copy
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import cram
from cram import DTYPES, SPECIALS, Model, fail, say, show
from prepare_data import download, sha256


# ---- Settings ------------------------------------------------------------------------------------
@dataclass
class Options:
    # the score
    checkpoint: str = "out/cram"  # folder of a trained model, or none: random weights
    like: str = "out/cram"  # with --checkpoint none: the model whose shape and vocabulary to take
    glue_dir: str = "data/glue"  # folder with CoLA/, SST-2/, ...; what is not there is downloaded
    tasks: str = "all"  # or some of cola,sst2,mrpc,qqp,stsb,mnli,qnli,rte with commas between
    seeds: int = 5  # runs of each task, with the seeds 0, 1, ...
    submit: str = ""  # folder for predictions of the test sets, by the seed of median dev score
    # the paper's one setting for all tasks [2]: what is changed is changed for all of them
    epochs: int = 5  # passes over the training set
    batch_size: int = 16  # examples in a step
    lr: float = "auto"  # peak rate; auto: 4e-5 [2] (pair: 1e-4) at width 768, more for narrower
    # The classifier: first reads [CLS] [2], pair matches the two texts too; auto: pair for modern.
    head: Literal["auto", "first", "pair"] = "auto"
    # the machine
    device: str = "auto"  # cuda, mps or cpu
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of matrix products; the rest is fp32


# ---- Metrics -------------------------------------------------------------------------------------
def accuracy(predicted, true):
    """Share of equal labels; predicted and true, here and below: (N,) label numbers or scores."""
    return float(np.mean(predicted == true))


def f1(predicted, true):
    """Harmonic mean of precision and recall of label 1; nan where nothing is 1: it is 0 / 0."""
    hits = np.sum((predicted == 1) & (true == 1))  # true positives
    both = np.sum(predicted == 1) + np.sum(true == 1)
    return float(2 * hits / both) if both else math.nan


def matthews(predicted, true):
    """Correlation of two binary labels; 0 where one is constant: the limit, as in scikit-learn."""
    value = pearson(predicted, true)
    return 0.0 if math.isnan(value) else value


def pearson(predicted, true):
    """Linear correlation; nan where one side is constant."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:  # rounding would give it some variance
        return math.nan
    return float(np.corrcoef(predicted, true)[0, 1])


# ---- Tasks and their files -----------------------------------------------------------------------
@dataclass
class Task:
    """A task of GLUE; its files are GLUE_DIR/FOLDER/SPLIT.tsv."""

    folder: str
    texts: tuple = ("sentence1", "sentence2")  # columns of its one or two texts
    label: str = "label"  # column of the label
    labels: tuple = ("0", "1")  # its values, in the order of their numbers; none: a score, 0 to 5
    metrics: tuple = (accuracy,)  # the first one counts in the average
    splits: tuple = ("train", "dev", "test")  # its files
    header: tuple = ()  # columns of train and dev where these files do not name them
    sources: tuple = ()  # what to download; empty: FOLDER.zip


GLUE_URL = "https://dl.fbaipublicfiles.com/"  # the address that GLUE's own script has
ENTAILMENT = ("entailment", "not_entailment")  # labels 0 and 1
TASKS = {
    "cola": Task("CoLA", texts=("sentence",), metrics=(matthews,),
                 header=("source", "label", "mark", "sentence")),
    "sst2": Task("SST-2", texts=("sentence",)),
    "mrpc": Task("MRPC", texts=("#1 String", "#2 String"), label="Quality", metrics=(f1, accuracy),
                 sources=("senteval/senteval_data/msr_paraphrase_train.txt",
                          "senteval/senteval_data/msr_paraphrase_test.txt",
                          "glue/data/mrpc_dev_ids.tsv")),
    "qqp": Task("QQP", texts=("question1", "question2"), label="is_duplicate",
                metrics=(f1, accuracy), sources=("glue/data/QQP-clean.zip",)),
    "stsb": Task("STS-B", label="score", labels=(), metrics=(pearson,)),
    "mnli": Task("MNLI", label="gold_label", labels=("entailment", "neutral", "contradiction"),
                 splits=("train", "dev_matched", "dev_mismatched",
                         "test_matched", "test_mismatched")),
    "qnli": Task("QNLI", texts=("question", "sentence"), labels=ENTAILMENT,
                 sources=("glue/data/QNLIv2.zip",)),
    "rte": Task("RTE", labels=ENTAILMENT),
}  # fmt: skip
CHECKSUMS = {  # SHA-256 of the official files, where it is known
    "CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff",
    "QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0",
    "QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5",
    "msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    "msr_paraphrase_test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
    "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
}


def columns(task, kind):
    """{split: its column in GLUE's table} of the splits of kind dev or test; MNLI has two each."""
    ends = {kind: "", f"{kind}_matched": "-m", f"{kind}_mismatched": "-mm"}
    return {split: task.folder + ends[split] for split in task.splits if split in ends}


def fetch(task, folder):
    """Downloads a task to `folder`, which appears once it is whole; a failure leaves nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, since another process may be downloading the same task.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{task.folder}.part-") as part:
        paths = []
        for name in task.sources or [f"glue/data/{task.folder}.zip"]:
            path = Path(part, name.split("/")[-1])
            download(GLUE_URL + name, path)  # whole, or it stops with a sentence
            if path.name in CHECKSUMS and sha256(path) != CHECKSUMS[path.name]:
                fail(f"{GLUE_URL}{name} has another checksum than the official file: try again")
            paths.append(path)
        whole = Path(part, task.folder)  # on the same disk, so that it can be renamed
        whole.mkdir()
        files = build_mrpc(*paths) if task.folder == "MRPC" else unzip(*paths, task)
        for split, content in files.items():
            (whole / f"{split}.tsv").write_bytes(content)
        if not folder.exists():  # the other process may have been faster
            whole.replace(folder)


def unzip(path, task):
    """{split: content of its file} from the archive of a task; what else it holds is not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {split: f"{task.folder}/{split}.tsv" for split in task.splits}
            return {split: archive.read(name) for split, name in names.items()}
    except (zipfile.error, zlib.error, EOFError, OSError, RuntimeError, LookupError, ValueError):
        fail(f"{path.name} came damaged, or lacks one of {', '.join(task.splits)}: try again")


def build_mrpc(*paths):
    """{split: content of its file}; dev: the training rows whose pair of ids is in the third."""
    train, test, dev_ids = (path.read_text("utf-8-sig").rstrip().split("\n") for path in paths)
    files = {"train": train[:1], "dev": train[:1], "test": test}  # train[0]: the header
    for line in train[1:]:
        ids = "\t".join(line.split("\t")[1:3])
        files["dev" if ids in dev_ids else "train"].append(line)
    return {split: "\n".join(lines).encode() for split, lines in files.items()}


def read_lines(path):
    """[(line number, columns)] of a TSV without its blank lines; a " is a character like any."""
    again = f"move {path.parent} away, and it is downloaded anew"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError):
        fail(f"{path} is missing, or no UTF-8 text: {again}")
    if "\n" not in text.lstrip("\r\n"):
        fail(f"{path} is empty, or does not end its lines with line feeds: {again}")
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.rstrip("\r").split("\t")) for number, line in lines if line.strip("\r")]


def load_split(path, task, tokenizer, seq_len):
    """(tokens (N, longest) padded at the end, labels (N,)) of a file; of a test file no labels.
    Stops at a malformed row; only QQP's are skipped: some of the official ones lack columns."""
    # Which columns are wanted, and where they are. A test file's labels, if it has any, are not.
    labelled = not path.stem.startswith("test")
    lines = read_lines(path)
    header = task.header if labelled and task.header else lines.pop(0)[1]
    names = [*task.texts, task.label] if labelled else task.texts
    for name in names:
        if name not in header:
            fail(f"{path} has no column {name!r}: found {', '.join(header)[:200]}")
    places = [header.index(name) for name in names]
    allowed = "|".join(task.labels) or r"[0-4](\.\d+)?|5(\.0+)?"
    rows, labels, skipped = [], [], 0  # encoded examples, their labels, malformed lines
    for number, cells in lines:
        if len(cells) != len(header):
            skipped += 1
            if task.folder != "QQP" or not labelled:  # a test row needs a prediction
                fail(f"{path}, line {number}: columns found: {len(cells)}, expected: {len(header)}")
            continue
        found = [cells[place] for place in places]
        if labelled:
            label = found.pop()  # names has it last
            if not re.fullmatch(allowed, label):
                expected = " or ".join(task.labels) or "a number from 0 to 5"
                fail(f"{path}, line {number}: the label is {label[:60]!r}, expected {expected}")
            labels.append(task.labels.index(label) if task.labels else float(label))
        rows.append(torch.tensor(encode(found, tokenizer, seq_len), dtype=torch.int32))
    if not rows:
        fail(f"{path} has no examples: expected rows of {', '.join(names)}")
    note = f", {skipped} malformed rows skipped" if skipped else ""
    say(f"data     {task.folder} {path.stem}: {len(rows)} examples{note}")
    pad = tokenizer.encode_single_token("[PAD]")
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return tokens, torch.tensor(labels, dtype=torch.long if task.labels else torch.float)


def encode(texts, tokenizer, seq_len):
    """The tokens `[CLS] a [SEP] b [SEP]` of two texts; the b of a single one is empty [2]."""
    cls, sep = (tokenizer.encode_single_token(name) for name in ("[CLS]", "[SEP]"))
    # A space first, as in running text: without it many a word would be cut into rare pieces.
    a, b = [f" {cram.normalise(text)}".rstrip() for text in (*texts, "")[:2]]
    a, b = map(tokenizer.encode_ordinary, (a, b))
    while len(a) + len(b) + 3 > seq_len:
        max(a, b, key=len).pop()  # the longer one loses its last token
    return [cls, *a, sep, *b, sep]


def load_task(task, options, tokenizer, seq_len):
    """{split: (tokens, labels)} of a task, on the device."""
    folder = Path(options.glue_dir, task.folder)
    if not folder.exists():
        fetch(task, folder)
    data = {}
    for split in task.splits:
        if options.submit or not split.startswith("test"):
            arrays = load_split(folder / f"{split}.tsv", task, tokenizer, seq_len)
            data[split] = [array.to(options.device) for array in arrays]
    return data


# ---- Fine-tuning ---------------------------------------------------------------------------------
def batches(tokens, pad_id, size, rng):
    """Yields (indices (B,), tokens (B, S)) of all tokens (N, longest), in random order, except
    that examples of about one length share a batch, which leaves little padding."""
    lengths = (tokens != pad_id).sum(1).cpu().numpy()  # (N,)
    order = rng.permutation(len(lengths))
    span = np.arange(len(order)) // (50 * size)  # 50 batches of random examples make a span
    order = order[np.lexsort((lengths[order], span))]  # by span, and within it by length
    # All indices go to the device at once: copied step by step, each step would wait for them.
    indices = torch.from_numpy(order).to(tokens.device)
    for start in rng.permutation(np.arange(0, len(order), size)):
        part = slice(start, start + size)
        longest = 4 * math.ceil(lengths[order[part]].max() / 4)  # few shapes: each has its kernels
        yield indices[part], tokens[indices[part], :longest]


def pair_features(x, embedded, tokens, pad_id):
    """x (B, S, W) of the last layer, embedded (B, S, W) before the first -> (B, 5 W): x at [CLS];
    the mean of x in each text; and that of |word - match|, where a word's match is what attention
    over the embeddings finds outside its text (Parikh et al. 2016). A missing text has zeros."""
    text = (tokens == pad_id + SPECIALS.index("[SEP]")).cumsum(1)  # 0, then 1, and 2 behind both
    inside = torch.stack([(text == n) & (tokens < pad_id) for n in (0, 1)], dim=1)  # (B, 2, S)
    share = inside / inside.sum(2, keepdim=True).clamp(min=1)  # that a word has in the mean
    # Outside are the words of the other text, and specials: so there is always something to find.
    outside = (text[:, :, None] != text[:, None]) & (tokens != pad_id)[:, None]  # (B, S, S)
    match = F.scaled_dot_product_attention(embedded, embedded, embedded, outside)
    parts = x[:, :1], share @ x, share @ (embedded - match).abs()
    return torch.cat(parts, dim=1).flatten(1)


class Classifier(nn.Module):
    """The encoder, then the paper's classifier: dense, tanh, dropout, linear [2]."""

    def __init__(self, encoder, outputs, options):
        super().__init__()
        self.encoder = encoder
        self.options = options
        self.pad_id = encoder.vocab_size - len(SPECIALS)
        width = encoder.cfg.width if options.head == "first" else 5 * encoder.cfg.width
        dropout = nn.Dropout(encoder.cfg.dropout)
        layers = nn.Linear(width, 1024), nn.Tanh(), dropout, nn.Linear(1024, outputs)
        self.head = nn.Sequential(*layers)
        for p in self.head.parameters():
            nn.init.normal_(p, std=0.02 if p.ndim == 2 else 0.0)

    def forward(self, tokens):
        """tokens (B, S) -> logits (B, outputs)."""
        dtype = DTYPES[self.options.dtype]
        with torch.autocast(tokens.device.type, dtype, dtype != torch.float32):
            x = self.encoder.encode(tokens, tokens != self.pad_id)
        x = x.float()  # the rest in fp32: from 2 to 4 bf16 has steps of 1/64
        if self.options.head == "first":
            return self.head(x[:, 0])
        embedded = self.encoder.embedding_norm(self.encoder.embedding(tokens))  # no dropout
        return self.head(pair_features(x, embedded, tokens, self.pad_id))


def finetune(task, data, encoder, options, seed):
    """Trains a copy of the encoder and a classifier on data["train"], of {split: (tokens, labels)};
    returns {split: predictions (N,)} of the others."""
    torch.manual_seed(seed)  # of the classifier and dropout
    rng = np.random.default_rng(seed)  # of the order of the examples
    if options.checkpoint == "none":
        encoder = Model(encoder.cfg, encoder.vocab_size, encoder.seq_len)  # of random weights
    model = Classifier(copy.deepcopy(encoder), max(1, len(task.labels)), options)
    model = model.to(options.device).train()
    tokens, labels = data["train"]  # on the device from the start: no step waits for it
    if options.head == "pair" and not task.labels:
        nn.init.constant_(model.head[-1].bias, labels.mean())  # else it learns only that at first
    adamw = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    scaler = torch.amp.GradScaler(options.device, enabled=options.dtype == "fp16")
    steps = math.ceil(len(tokens) / options.batch_size) * options.epochs
    loss_of = F.cross_entropy if task.labels else F.mse_loss
    step = 0
    for _ in range(options.epochs):
        for index, rows in batches(tokens, model.pad_id, options.batch_size, rng):
            p = step / steps
            if step % 50 == 0:
                show(f"{task.folder}, seed {seed}: {p:.0%}")
            loss = loss_of(model(rows).squeeze(1), labels[index])  # (B, 1) of a score -> (B,)
            # Up over a tenth of the steps, then down to 0 along a cosine.
            rate = min(10 * p, 0.5 + 0.5 * math.cos(math.pi * (p - 0.1) / 0.9))
            optimizer.param_groups[0]["lr"] = options.lr * rate
            scaler.scale(loss).backward()  # the scaler does nothing but in fp16
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
    return {name: predict(model, tokens) for name, (tokens, _) in data.items() if name != "train"}


@torch.no_grad()
def predict(model, tokens):
    """Label numbers or scores of examples, in their order: (N,), all nan after a divergence."""
    model.eval()  # no dropout
    logits = torch.empty(len(tokens), model.head[-1].out_features, device=tokens.device)
    for index, rows in batches(tokens, model.pad_id, 64, np.random.default_rng(0)):
        logits[index] = model(rows)
    logits = logits.cpu().double().numpy()  # fetched once, so that no batch waits
    if not np.isfinite(logits).all():
        return np.full(len(logits), math.nan)
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1).astype(float)


# ---- Scores --------------------------------------------------------------------------------------
def score(task, predictions, data):
    """{"COLUMN METRIC": value} of the dev sets; nan after a divergence."""
    scores = {}
    for split, column in columns(task, "dev").items():
        predicted, true = predictions[split], data[split][1].cpu().numpy()
        for metric in task.metrics:
            value = math.nan if math.isnan(predicted[0]) else metric(predicted, true)
            scores[f"{column} {metric.__name__}"] = value
    return scores


def score_task(name, data, encoder, options, settings, kept):
    """Scores a task with all seeds; returns {"COLUMN METRIC": median} of what counts in the
    average, and what the run in the middle predicts. Runs are files in the folder `kept`."""
    task, runs, predictions = TASKS[name], [], {}
    for seed in range(options.seeds):
        # A hash of all that shapes a score: so runs of other settings have other names.
        about = settings | {"task": name, "seed": seed}
        code = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        path = kept / f"{name}-seed{seed}-{code}.json"
        if not path.exists():
            start = time.monotonic()
            predictions[seed] = finetune(task, data, encoder, options, seed)
            scores = score(task, predictions[seed], data)
            run = {"settings": about, "scores": scores, "seconds": time.monotonic() - start}
            content = json.dumps(run, indent=1).encode()
            mine = path.with_suffix(f".{os.getpid()}")  # another process may be at the same run
            cram.write_whole(mine, lambda file, content=content: file.write(content))
            mine.replace(path)
        try:  # a new run is read like a kept one
            run = json.loads(path.read_bytes())
            shown = [f"{measure} {100 * value:.1f}" for measure, value in run["scores"].items()]
            shown.append(f"{run['seconds']:.0f} s")
        except (ValueError, LookupError, TypeError, AttributeError):
            fail(f"{path} is damaged, or not of this script: delete it, and its run is made again")
        say(f"{task.folder:8} seed {seed}: {', '.join(shown)}, kept in {path}")
        runs.append(run)

    medians = {}
    for measure in runs[0]["scores"]:
        values = 100 * np.array([run["scores"][measure] for run in runs])
        median, low, high = np.median(values), values.min(), values.max()  # nan if one is
        say(f"{measure}: median {median:.1f}, range {low:.1f} to {high:.1f}, {len(runs)} seeds")
        if measure.endswith(f" {task.metrics[0].__name__}"):
            medians[measure] = median
    # In the middle by the mean of the scores that count; of two in the middle the lower one.
    means = [np.mean([run["scores"][measure] for measure in medians]) for run in runs]
    middle = int(np.argsort(means)[(len(runs) - 1) // 2])
    if options.submit and middle not in predictions:  # of a kept run only the scores are kept
        predictions[middle] = finetune(task, data, encoder, options, middle)
    return medians, predictions.get(middle)


def submit(path, results):
    """Writes the archive that GLUE's server takes, from [(task, {split: predictions})]."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for task, predictions in results:
            for split, column in columns(task, "test").items():
                if np.isnan(predictions[split]).any():
                    fail(f"{task.folder}: the run in the middle diverged, so it predicts nothing")
                lines = ["index\tprediction\n"]  # the columns that the server asks for
                for i, value in enumerate(predictions[split]):
                    word = task.labels[int(value)] if task.labels else f"{value.clip(0, 5):.3f}"
                    lines.append(f"{i}\t{word}\n")
                archive.writestr(f"{column}.tsv", "".join(lines))
    cram.write_whole(path, lambda file: file.write(packed.getvalue()))
    say(f"{path} holds the predictions; GLUE's server asks for WNLI and AX too.")


def score_all(options, file):
    """Fine-tunes and scores all tasks with all seeds, from the checkpoint in `file`."""
    names = list(TASKS) if options.tasks == "all" else options.tasks.replace(",", " ").split()
    if not names or set(names) - set(TASKS):
        fail(f"--tasks is {options.tasks!r}: expected all, or some of {','.join(TASKS)}")
    model, tokenizer, _ = cram.load_model(file, dropout=0.1)  # 0.1 for all models [2]
    # The hash is taken at once: a training may save other weights while the texts are read.
    settings = {"format": 2, "checkpoint": sha256(file), "random": options.checkpoint == "none"}
    device, options.dtype = cram.choose_device(options)
    options.device = device.type
    cram.fill_in(options, head="pair" if model.cfg.recipe == "modern" else "first")
    at_base = {"first": 4e-5, "pair": 1e-4}[options.head]  # the paper's; found at mini
    cram.fill_in(options, lr=at_base * (768 / model.cfg.width) ** 2)
    random = f"random weights, shaped as {options.like}"
    title = random if options.checkpoint == "none" else options.checkpoint
    how = f"{options.head} head, lr {options.lr:g}, {options.dtype} on {options.device}"
    say(f"model    {title}; {how}")

    # What cannot be written or read shows now, not after hours.
    kept = file.parent / "glue"
    for folder in (kept, Path(options.submit or kept)):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    tasks = {name: load_task(TASKS[name], options, tokenizer, model.seq_len) for name in names}

    for name in ("device", "dtype", "epochs", "batch_size", "lr", "head"):
        settings[name] = getattr(options, name)
    medians = {}
    results = []
    for name, data in tasks.items():
        task = TASKS[name]
        folder = Path(options.glue_dir, task.folder)
        splits = ["train", *columns(task, "dev")]
        settings["files"] = [sha256(folder / f"{split}.tsv") for split in splits]
        counted, predictions = score_task(name, data, model, options, settings, kept)
        medians |= counted
        results.append((task, predictions))

    mean = np.mean(list(medians.values()))
    total = "GLUE average" if len(medians) == 9 else f"mean of these {len(medians)} columns"
    row = [f"{value:.1f}" for value in (*medians.values(), mean)]
    say(f"\n| model | {' | '.join(medians)} | {total} |\n|{' --- |' * (len(row) + 1)}")
    say(f"| {title} | {' | '.join(row)} |\n")
    say(f"Dev sets, median of seeds 0 to {options.seeds - 1}; WNLI is left out, as in the paper.")
    if options.submit:
        submit(Path(options.submit) / "submission.zip", results)


def main(argv):
    options = Options(**cram.parse_flags(Options, argv, __doc__, {"lr": (1e-9, 10)}))
    source = options.like if options.checkpoint == "none" else options.checkpoint
    file = cram.checkpoint_path(source)
    again = shlex.join(["python", "finetune_glue.py", *argv])
    rest = f"finished runs are kept in {file.parent / 'glue'}, and this goes on from there: {again}"
    # A kill, or a terminal that goes away, ends as Ctrl-C does; but not under nohup.
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # no HUP in Windows
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        score_all(options, file)
    except KeyboardInterrupt:
        say(f"stopped: {rest}")
        raise SystemExit(130) from None
    except torch.OutOfMemoryError:
        fail(f"out of memory: free some, or begin anew with a smaller --batch_size; {rest}")
    except OSError as error:  # no network, a full disk, a folder that is read-only
        fail(f"{error}; {rest}")


if __name__ == "__main__":
    main(sys.argv[1:])
