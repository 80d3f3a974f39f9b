"""The score: fine-tunes a trained model on the tasks of GLUE and measures it on their dev sets.

    python finetune_glue.py --checkpoint out/cram                      # all tasks, 5 seeds; downloads them
    python finetune_glue.py --checkpoint out/cram --tasks cola,rte --seeds 3
    python finetune_glue.py --checkpoint none --like out/cram          # the baseline: random weights
    python finetune_glue.py --checkpoint out/cram --submit out/submit  # and predictions for the GLUE server

The rules of the paper ([2]: section 2 of the one named in cram.py): one setting for all tasks, at most 5
epochs, only the task's own training data; the score of a task is the median over seeds. Finished runs are
kept in glue.json beside the checkpoint, so the same command goes on after an interruption. No label of a test
file is ever looked at.
"""

import copy
import hashlib
import io
import json
import math
import re
import signal
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cram import DTYPES, Model, choose_device, fail, load_model, opt, parse_flags, sha256, write_whole
from prepare_data import BadInput, download, normalise, show

# ------------------------------------------------------------------------------------------- the tasks

@dataclass
class Task:
    """A task of GLUE. Its files are GLUE_DIR/FOLDER/SPLIT.tsv; columns go by their name in the header."""
    folder: str
    texts: tuple  # columns of its one or two texts
    label: str  # column of the label
    labels: tuple  # its values, in the order of their numbers; empty: a score from 0 to 5
    metrics: tuple  # names of functions below; the first one counts in the average
    rows: dict  # split: examples in the official file
    sources: dict  # path under GLUE_URL: SHA-256, empty where it is not known
    header: tuple = ()  # the columns of train and dev where these files do not name them

GLUE_URL, MSR = "https://dl.fbaipublicfiles.com/", "senteval/senteval_data/msr_paraphrase_"
BINARY, ENTAILMENT, F1 = ("0", "1"), ("entailment", "not_entailment"), ("f1", "accuracy")
COLA, PAIR = ("source", "label", "mark", "sentence"), ("sentence1", "sentence2")
TASKS = {task.folder.lower().replace("-", ""): task for task in (  # cola, sst2, ...
    Task("CoLA", ("sentence",), "label", BINARY, ("matthews",), {"train": 8551, "dev": 1043, "test": 1063},
         {"glue/data/CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"}, COLA),
    Task("SST-2", ("sentence",), "label", BINARY, ("accuracy",), {"train": 67349, "dev": 872, "test": 1821},
         {"glue/data/SST-2.zip": ""}),
    Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, F1, {"train": 3668, "dev": 408, "test": 1725},
         {f"{MSR}train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
          f"{MSR}test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
          "glue/data/mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"}),
    Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, F1,
         {"train": 363846, "dev": 40430, "test": 390965},
         {"glue/data/QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"}),
    Task("STS-B", PAIR, "score", (), ("pearson", "spearman"), {"train": 5749, "dev": 1500, "test": 1379},
         {"glue/data/STS-B.zip": ""}),
    Task("MNLI", PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
         {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832, "test_matched": 9796,
          "test_mismatched": 9847}, {"glue/data/MNLI.zip": ""}),
    Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",),
         {"train": 104743, "dev": 5463, "test": 5463},
         {"glue/data/QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"}),
    Task("RTE", PAIR, "label", ENTAILMENT, ("accuracy",), {"train": 2490, "dev": 277, "test": 3000},
         {"glue/data/RTE.zip": ""}),
)}
SUFFIX = {"": "", "_matched": "-m", "_mismatched": "-mm"}

def columns(task, kind):
    """{split: its column in GLUE's table} of the "dev" or "test" splits: CoLA, ..., MNLI-m, MNLI-mm, ..."""
    return {s: task.folder + SUFFIX[s.removeprefix(kind)] for s in task.rows if s.startswith(kind)}

@dataclass
class Options:
    """The paper's one setting for all tasks [2]; a number that is changed is changed for all of them."""
    checkpoint: str = opt("out/cram", "folder of a trained model, or none: random weights", group="the score")
    like: str = opt("out/cram", "with --checkpoint none: whose shape and vocabulary the random model takes")
    glue_dir: str = opt("data/glue", "folder with CoLA/, SST-2/, ...; a task that is not there is downloaded")
    tasks: str = opt("all", f"all, or some with commas between: {','.join(TASKS)}")
    seeds: int = opt(5, "runs of each task, with seeds 0, 1, ...; the score is their median", 1, 1000)
    submit: str = opt("", "folder to write test-set predictions to, of the seed with the median dev score")
    epochs: int = opt(5, "passes over the training set; the paper allows 5", 1, 1000, group="the setting [2]")
    batch_size: int = opt(16, "examples in a step", 1, 2**20)
    lr: float = opt("auto", "peak learning rate: warm-up over a tenth of the steps, then cosine to 0; "
                          "auto: the paper's 4e-5 at width 768, more for a narrower model", 1e-9, 10)
    device: str = opt("auto", "auto, cuda, mps or cpu", group="the machine")
    dtype: str = opt("auto", "precision of the matrix products", "auto", "bf16", "fp16", "fp32")

# ---------------------- metrics: of predicted and true label numbers or scores, both (N,); undefined is nan
def accuracy(predicted, true):
    """Share of equal labels."""
    return float(np.mean(predicted == true))

def f1(predicted, true):
    """Harmonic mean of precision and recall of label 1; nan where none is true and none predicted (0 / 0)."""
    hits, both = np.sum((predicted == 1) & (true == 1)), np.sum(predicted == 1) + np.sum(true == 1)
    return float(2 * hits / both) if both else math.nan

def matthews(predicted, true):
    """Correlation of two binary labels; 0 where one is constant: the limit, and what scikit-learn reports."""
    return 0.0 if np.ptp(predicted) == 0 or np.ptp(true) == 0 else pearson(predicted, true)

def pearson(predicted, true):
    """Linear correlation; nan where one side is constant or holds a nan."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:  # asked first: rounding gives a constant some variance
        return math.nan
    return float(np.corrcoef(np.float64(predicted), np.float64(true))[0, 1])

def spearman(predicted, true):
    """Linear correlation of the ranks, where equal values share the mean of theirs; nan as for pearson."""
    sides = (np.unique(side, return_inverse=True, return_counts=True) for side in (predicted, true))
    ranks = [(np.cumsum(counts) - (counts - 1) / 2)[which] for _, which, counts in sides]
    return math.nan if np.isnan([predicted, true]).any() else pearson(*ranks)

def score(task, predicted, true):
    """{metric: value} of a task's metrics; nan where a prediction is nan, as after a divergence."""
    finite = np.isfinite(predicted).all()
    return {name: globals()[name](predicted, true) if finite else math.nan for name in task.metrics}

# ----------------------------------------------------------------------------------------------- files
def fetch(folder, task):
    """Downloads and unpacks a task to a folder that appears once it is whole: a kill leaves none."""
    paths = [folder.parent / "downloads" / Path(name).name for name in task.sources]
    for path, (name, digest) in zip(paths, task.sources.items(), strict=True):
        download(GLUE_URL + name, path)
        if digest and sha256(path) != digest:
            fail(f"{path} has another checksum than the official file: remove it, and try again")
    part, files = Path(f"{folder}.part"), (build_mrpc if task.folder == "MRPC" else unzip)(task, paths)
    for split, content in files.items():
        write_whole(part / f"{split}.tsv", lambda file, content=content: file.write(content))
    part.replace(folder)

def unzip(task, paths):
    """{split: content of its file} from the archive of a task; refuses one with a path out of its folder."""
    try:
        with zipfile.ZipFile(paths[0]) as archive:
            outside = re.compile(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)")
            if bad := [name for name in archive.namelist() if outside.search(name)]:
                fail(f"{paths[0]} holds {bad[0]!r}, a path out of its folder: remove this file")
            return {split: archive.read(f"{task.folder}/{split}.tsv") for split in task.rows}
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, OSError, RuntimeError) as error:
        fail(f"{paths[0]} is damaged or not the official file ({error}): remove it, and try again")

def build_mrpc(_, paths):
    """{split: content of its file} of MRPC: dev is the train rows whose pair of ids is in the third file."""
    train, test, ids = map(read_rows, paths)
    dev = set(map(tuple, ids))
    files = {"train": [row for row in train if tuple(row[1:3]) not in dev],
             "dev": [row for i, row in enumerate(train) if i == 0 or tuple(row[1:3]) in dev],
             "test": [[str(i - 1) if i else "index", *row[1:]] for i, row in enumerate(test)]}  # no label
    return {split: "".join("\t".join(row) + "\n" for row in rows).encode() for split, rows in files.items()}

def read_rows(path):
    """The lines of a TSV as lists of columns, without quoting: a " is a character like any other."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read ({error}): move {path.parent} away to have it downloaded")
    return [line.rstrip("\r").split("\t") for line in lines if line.strip("\r")]

def read_split(path, task):
    """(texts, labels, rows skipped) of a file: tuples of strings; numbers (N,), None for test files; a count.
    Stops on a malformed file; only QQP may skip rows: some official ones have a wrong number of columns."""
    labelled, rows = not path.stem.startswith("test"), read_rows(path)
    first, header = (1, task.header) if labelled and task.header else (2, rows.pop(0) if rows else [])
    names = [*task.texts, task.label] if labelled else task.texts
    if missing := [name for name in names if name not in header]:
        fail(f"{path} has no column {missing[0]!r}: found {', '.join(header) or 'an empty file'}")
    bad = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if bad and (task.folder != "QQP" or not labelled):  # the server wants a prediction for every test row
        fail(f"{path}, line {first + bad[0]} has {len(rows[bad[0]])} columns, expected {len(header)}")
    rows = [row for row in rows if len(row) == len(header)]
    if not rows:
        fail(f"{path} has no examples: expected rows of {', '.join(names)}")
    if len(rows) != (official := task.rows[path.stem]):
        print(f"warning: {path} has {len(rows)} examples, expected the {official} of the official file")
    found = [[row[header.index(name)] for row in rows] for name in names]
    texts, labels = list(zip(*found[: len(task.texts)], strict=True)), found[-1] if labelled else []
    numbers = {word: float(word) for word in set(labels) if re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", word)}
    numbers = {word: i for i, word in enumerate(task.labels)} or numbers
    if wrong := [word for word in labels if word not in numbers]:
        expected = " or ".join(task.labels) or "a number from 0 to 5"
        fail(f"{path} has the label {wrong[0]!r}: expected {expected}")
    labels = np.array([numbers[word] for word in labels], np.int64 if task.labels else np.float32)
    return texts, labels if labelled else None, len(bad)

def encode(texts, tokenizer, seq_len):
    """(tokens (N, longest) padded at the end, lengths (N,), number cut) of texts as `[CLS] a [SEP]` or
    `[CLS] a [SEP] b [SEP]`: one that exceeds seq_len loses the end of its longer text, token by token."""
    cls, sep, pad = (tokenizer.encode_single_token(name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    rows, cut = [], 0
    for text in texts:
        parts = [tokenizer.encode_ordinary(normalise(part)) for part in text]
        excess = 1 + sum(len(part) + 1 for part in parts) - seq_len
        cut += excess > 0
        for _ in range(excess):
            max(parts, key=len).pop()
        rows.append(np.array([cls] + [token for part in parts for token in (*part, sep)], np.uint16))
    lengths = np.array([len(row) for row in rows])
    tokens = np.full((len(rows), lengths.max()), pad, np.uint16)
    tokens[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
    return tokens, lengths, cut

def batches(tokens, lengths, size, pad_id, rng=None):
    """Yields (indices (B,), tokens (B, S), mask (B, S) false at padding) of all tokens (N, longest): sorted
    by length or, with a generator, in random order but for sorting within spans of 50 batches."""
    count = len(lengths)
    order, span = (rng.permutation(count), 50 * size) if rng else (np.arange(count), count)
    order = order[np.lexsort((lengths[order], np.arange(count) // span))]
    parts = [order[i : i + size] for i in range(0, count, size)]
    if rng:
        rng.shuffle(parts)
    order = torch.from_numpy(np.concatenate(parts)).to(tokens.device)  # in one piece: no step waits
    for part, index in zip(parts, order.split([len(part) for part in parts]), strict=True):
        rows = tokens[index, : -(-int(lengths[part].max()) // 8) * 8]  # a CPU builds kernels for each S
        yield index, rows, rows != pad_id

# ----------------------------------------------------------------------------------------- fine-tuning
class Classifier(nn.Module):
    """The encoder with the paper's classifier on its first position: dense, tanh, dropout, linear [2]."""
    def __init__(self, encoder, outputs):
        super().__init__()
        self.encoder, c = encoder, encoder.cfg
        dense, last = nn.Linear(c.width, 1024), nn.Linear(1024, outputs)
        self.head = nn.Sequential(dense, nn.Tanh(), nn.Dropout(c.dropout), last)
        for layer in (dense, last):
            nn.init.normal_(layer.weight, std=c.init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens, mask):
        """tokens and mask (B, S) -> logits (B, outputs)."""
        first = self.encoder.encode(tokens, mask)[:, 0]
        with torch.autocast(tokens.device.type, enabled=False):  # from 2 to 4 bf16 has steps of 1/64
            return self.head(first.float())

def finetune(task, data, encoder, scratch, pad_id, options, device, dtype, seed):
    """Trains a copy of the encoder (scratch: one of random weights) and a classifier on data["train"], of
    {split: (tokens, lengths, labels)}; returns {split: (N,) predictions} of the others."""
    torch.manual_seed(seed)
    encoder = Model(encoder.cfg, encoder.vocab_size, encoder.seq_len) if scratch else copy.deepcopy(encoder)
    model, rng = Classifier(encoder, max(1, len(task.labels))).to(device), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, (0.9, 0.98), 1e-6, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    tokens, lengths, labels = data["train"]
    tokens, labels = torch.from_numpy(tokens.astype(np.int32)).to(device), torch.from_numpy(labels).to(device)
    steps = math.ceil(len(tokens) / options.batch_size)  # of an epoch
    for epoch in range(options.epochs):
        show(f"{task.folder}, seed {seed}: epoch {epoch + 1} of {options.epochs}")
        order = batches(tokens, lengths, options.batch_size, pad_id, rng)
        for step, (index, rows, mask) in enumerate(order, epoch * steps):
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
                logits = model(rows, mask)
            loss = (F.cross_entropy if task.labels else F.mse_loss)(logits.squeeze(1), labels[index])
            p = step / (steps * options.epochs)
            rate = min(10 * p, 0.5 + 0.5 * math.cos(math.pi * (p - 0.1) / 0.9))
            optimizer.param_groups[0]["lr"] = options.lr * rate
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    show("")
    return {name: predict(model, *data[name][:2], pad_id, device, dtype) for name in data if name != "train"}

@torch.no_grad()
def predict(model, tokens, lengths, pad_id, device, dtype):
    """Label numbers or scores of examples in their order: (N,) float64; all nan if a logit is not finite."""
    model.eval()
    tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
    logits = torch.empty(len(tokens), model.head[-1].out_features, device=device)
    for index, rows, mask in batches(tokens, lengths, 64, pad_id):
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            logits[index] = model(rows, mask)
    logits = logits.cpu().double()  # fetched once, so that no batch waits for a copy
    labels = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1).double()
    return (labels if logits.isfinite().all() else labels * math.nan).numpy()

# ------------------------------------------------------------------------------------------ the scores
def load_task(task, options, tokenizer, seq_len):
    """{split: (tokens, lengths, labels)} of the files of a task, which is downloaded if it has no folder."""
    data, folder = {}, Path(options.glue_dir) / task.folder
    if not folder.exists():
        fetch(folder, task)
    splits = [split for split in task.rows if options.submit or not split.startswith("test")]
    for split in splits:
        texts, labels, skipped = read_split(folder / f"{split}.tsv", task)
        *arrays, cut = encode(texts, tokenizer, seq_len)
        data[split] = (*arrays, labels)
        print(f"data     {task.folder} {split}: {len(texts)} examples, {cut} cut to {seq_len} tokens"
              + f", {skipped} malformed rows skipped" * (skipped > 0), flush=True)
    return data

def kept_runs(path, new=()):
    """The runs in a glue.json, after adding `new` ones to it; stops where it holds anything else."""
    try:
        runs = (json.loads(path.read_bytes()) if path.exists() else []) + [*new]
        for run in runs:
            names, metrics = columns(TASKS[run["task"]], "dev").values(), TASKS[run["task"]].metrics
            sum([run["scores"][name][metric] for name in names for metric in metrics], run["seconds"])
    except (ValueError, LookupError, TypeError):
        fail(f"{path} is damaged, or not from this script: delete or rename it, and its runs are made again")
    if new or not path.exists():  # an empty one shows before the first run that it can be written
        write_whole(path, lambda file: file.write(json.dumps(runs, indent=1).encode()))
    return runs

def score_seed(task, data, work, about, path):
    """(run, predictions): the run in glue.json that agrees in all of `about`, and None; or a new one."""
    found, predicted = [run for run in kept_runs(path) if about.items() <= run.items()], None
    if not found:
        start, predicted, dev = time.monotonic(), work(about["seed"]), columns(task, "dev").items()
        scores = {column: score(task, predicted[split], data[split][2]) for split, column in dev}
        found = [{**about, "scores": scores, "seconds": time.monotonic() - start}]
        kept_runs(path, found)
    shown = [f"{name} {100 * x:.1f}" for values in found[0]["scores"].values() for name, x in values.items()]
    note = f"{found[0]['seconds']:.0f} s" if predicted else f"taken from {path}"
    print(f"{task.folder:8} seed {about['seed']}: {', '.join(shown)} ({note})", flush=True)
    return found[0], predicted

def print_scores(task, runs, examples):
    """Prints the scores of a task, and the speed of its runs on `examples` each; returns {column: median}."""
    row, seconds = {}, sum(run["seconds"] for run in runs)
    speed = f"{seconds:.0f} s, {len(runs) * examples / (seconds + 1e-9):.0f} training examples/s"
    for column in columns(task, "dev").values():
        for metric in task.metrics:
            values = 100 * np.array([run["scores"][column][metric] for run in runs])  # nan: so are all three
            print(f"{column:8} {metric}: median {np.median(values):.1f}, range {values.min():.1f} to "
                  f"{values.max():.1f}, {len(runs)} seeds, {speed}", flush=True)
            if metric == task.metrics[0]:  # the one that counts
                row[f"{column} {metric}"] = np.median(values)
    return row

def print_table(title, row, names, seeds):
    """Prints the medians as a row of a Markdown table, and what their mean is of."""
    total = "GLUE average" if len(row) == 9 else f"mean of these {len(row)} columns"
    medians = list(row.values())
    print(f"\n| model | {' | '.join(row)} | {total} |\n|{' --- |' * (len(row) + 2)}\n"
          f"| {title} | {' | '.join(f'{x:.1f}' for x in [*medians, np.mean(medians)])} |\n\n"
          f"In it: dev sets of {', '.join(names)}; median of seeds 0 to {seeds - 1}. Not in it: "
          f"{', '.join(name for name in TASKS if name not in names) or 'none'}, and WNLI as in the paper."
          + "\nnan: undefined, for a run diverged or predicted one score for all" * math.isnan(sum(medians)))

def submit(folder, results):
    """Writes what the seed of median dev score predicts for each task's test files, and an archive of it."""
    files = {}
    for task, runs, predictions, work in results:
        means = [np.mean([scores[task.metrics[0]] for scores in run["scores"].values()]) for run in runs]
        seed = int(np.argsort(means)[(len(runs) - 1) // 2])  # of two in the middle the lower one
        predicted = predictions[seed] or work(seed)  # kept scores come without predictions: once more
        for split, column in columns(task, "test").items():
            if np.isnan(predicted[split]).any():
                fail(f"{task.folder}: the run with seed {seed} diverged, so it has no predictions to submit")
            words = (task.labels[int(x)] if task.labels else f"{x:.3f}" for x in predicted[split].clip(0, 5))
            lines = "".join(f"{i}\t{word}\n" for i, word in enumerate(words))
            files[f"{column}.tsv"] = f"index\tprediction\n{lines}".encode()
    with zipfile.ZipFile(packed := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    for name, content in (*files.items(), ("submission.zip", packed.getvalue())):
        write_whole(folder / name, lambda file, content=content: file.write(content))
    print(f"{folder}/submission.zip: {', '.join(name.removesuffix('.tsv') for name in files)}. "
          "The server asks for WNLI and AX too: left out, as in the paper.")

def score_all(options, kept):
    """Fine-tunes and scores all tasks with all seeds, but for the finished runs in the glue.json `kept`."""
    names = list(TASKS) if options.tasks == "all" else list(dict.fromkeys(options.tasks.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        fail(f"unknown task {unknown[0]!r}: expected all, or some of {','.join(TASKS)} with commas between")
    scratch, source, row, results = options.checkpoint == "none", kept.parent, {}, []
    model, tokenizer, state = load_model(source, trained=not scratch, dropout=0.1)  # [2]
    options.lr = 4e-5 * (768 / model.cfg.width) ** 2 if options.lr == "auto" else options.lr
    (device, dtype, reason), pad_id = choose_device(options), tokenizer.encode_single_token("[PAD]")
    title, reads = (f"random weights, as {source}", 0) if scratch else (f"{source}", state["run"]["reads"])
    print(f"model    {title}: {model.cfg.recipe}, {model.cfg.layers} layers, width {model.cfg.width}, "
          f"{reads * model.seq_len / 1e6:.1f} M tokens read\nmachine  {device.type}, {dtype} ({reason})\n"
          f"setting  {options.epochs} epochs, batch {options.batch_size}, lr {options.lr:g}, "
          f"seeds 0 to {options.seeds - 1}")
    Path(options.submit or source).mkdir(parents=True, exist_ok=True)
    # All files before the first run: a mistake in the last shows now, not after hours.
    tasks = {name: load_task(TASKS[name], options, tokenizer, model.seq_len) for name in names}
    # All that shapes a score, but for data and seed: a run in glue.json counts where it agrees in all of it.
    setting = {"checkpoint": sha256(state["path"]), "random": scratch, "device": device.type,
               "dtype": dtype, "epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    for name, data in tasks.items():
        task = TASKS[name]
        work = partial(finetune, task, data, model, scratch, pad_id, options, device, dtype)
        parts = [part.tobytes() for split in ("train", *columns(task, "dev")) for part in data[split]]
        about = {"task": name, "data": hashlib.sha256(b"".join(parts)).hexdigest(), **setting}
        seeds = [score_seed(task, data, work, {**about, "seed": seed}, kept) for seed in range(options.seeds)]
        runs, predictions = zip(*seeds, strict=True)
        results.append((task, runs, predictions, work))
        row |= print_scores(task, runs, options.epochs * len(data["train"][1]))
    print_table(title, row, names, options.seeds)
    if options.submit:
        submit(Path(options.submit), results)

def main(argv=None):
    options = Options(**parse_flags(Options, sys.argv[1:] if argv is None else argv, __doc__))
    kept = Path(options.like if options.checkpoint == "none" else options.checkpoint) / "glue.json"
    rest = f"finished runs are kept in {kept}, and the same command goes on from there"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends as Ctrl-C does
    try:
        score_all(options, kept)
    except (BadInput, OSError) as error:  # no network, a full disk, a folder that may not be written
        fail(f"{error}; {rest}")
    except KeyboardInterrupt:
        print(f"\nstopped: {rest}")
        raise SystemExit(130) from None

if __name__ == "__main__":
    main()
