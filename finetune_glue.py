"""The score: fine-tunes a trained model on the tasks of GLUE and measures it on their dev sets.

    python finetune_glue.py --checkpoint out/cram                      # all tasks, 5 seeds; downloads what is missing
    python finetune_glue.py --checkpoint out/cram --tasks cola,rte --seeds 3
    python finetune_glue.py --checkpoint none --like out/cram          # the baseline: the same model, random weights
    python finetune_glue.py --checkpoint out/cram --submit out/submit  # and test-set predictions for the GLUE server

The rules of the paper ([2] is section 2 of the one named in cram.py): one setting for all tasks, at most 5 epochs, only
the task's own training data; the score of a task is the median over seeds. Finished runs are kept in glue.json beside
the checkpoint, so the same command goes on after an interruption. No label of a test file is ever looked at.
"""

import copy
import hashlib
import json
import math
import re
import shutil
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

import cram
from cram import DTYPES, choose_device, fail, load_model, opt, parse_flags, sha256
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

GLUE_URL, BINARY, ENTAILMENT = "https://dl.fbaipublicfiles.com/", ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, ("matthews",), {"train": 8551, "dev": 1043, "test": 1063},
                 {"glue/data/CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"},
                 header=("source", "label", "mark", "sentence")),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, ("accuracy",), {"train": 67349, "dev": 872, "test": 1821},
                 {"glue/data/SST-2.zip": ""}),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "accuracy"),
                 {"train": 3668, "dev": 408, "test": 1725}, {
        "senteval/senteval_data/msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        "senteval/senteval_data/msr_paraphrase_test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
        "glue/data/mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"}),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, ("f1", "accuracy"),
                {"train": 363846, "dev": 40430, "test": 390965},
                {"glue/data/QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"}),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman"),
                 {"train": 5749, "dev": 1500, "test": 1379}, {"glue/data/STS-B.zip": ""}),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"), ("accuracy",),
                 {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832, "test_matched": 9796, "test_mismatched": 9847},
                 {"glue/data/MNLI.zip": ""}),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",),
                 {"train": 104743, "dev": 5463, "test": 5463},
                 {"glue/data/QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"}),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, ("accuracy",),
                {"train": 2490, "dev": 277, "test": 3000}, {"glue/data/RTE.zip": ""}),
}
SUFFIX = {"": "", "matched": "-m", "mismatched": "-mm"}  # dev_matched is GLUE's column MNLI-m, dev is just CoLA, ...

@dataclass
class Options:
    """The paper's one setting for all tasks [2]; a number that is changed is changed for all of them."""
    checkpoint: str = opt("out/cram", "folder of the trained model, or none: random weights")
    like: str = opt("out/cram", "with --checkpoint none: the folder whose shape and vocabulary the random model takes")
    glue_dir: str = opt("data/glue", "folder with CoLA/, SST-2/, ...; a task that is not there is downloaded")
    tasks: str = opt("all", f"all, or some with commas between: {','.join(TASKS)}")
    seeds: int = opt(5, "runs of each task, with seeds 0, 1, ...; the score is their median", 1, 1000)
    submit: str = opt("", "folder to write test-set predictions to, of the seed with the median dev score")
    device: str = opt("auto", "auto, cuda, mps or cpu")
    dtype: str = opt("auto", "precision of the matrix products", "auto", "bf16", "fp16", "fp32")
    epochs: int = opt(5, "passes over the training set; the paper allows 5", 1, 1000)
    batch_size: int = opt(16, "examples in a step", 1, 2**20)
    lr: float = opt("auto", "peak learning rate: warm-up over a tenth of the steps, then cosine to 0; auto: the paper's "
                          "4e-5 at width 768, more for a narrower model", 1e-9, 10)

# ---------------------- metrics: of predicted and true label numbers or scores, both (N,); undefined is nan

def accuracy(predicted, true):
    """Share of equal labels."""
    return float(np.mean(predicted == true))

def f1(predicted, true):
    """Harmonic mean of precision and recall of label 1; nan where none is true and none predicted (0 / 0)."""
    hits, both = np.sum((predicted == 1) & (true == 1)), np.sum(predicted == 1) + np.sum(true == 1)
    return float(2 * hits / both) if both else math.nan

def matthews(predicted, true):
    """Correlation of two binary labels; 0 where one is constant: the limit, and what scikit-learn and GLUE report."""
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
    functions = {f.__name__: f for f in (accuracy, f1, matthews, pearson, spearman)}
    return {m: functions[m](predicted, true) if np.isfinite(predicted).all() else math.nan for m in task.metrics}

# ----------------------------------------------------------------------------------------------- files

def fetch(folder, task, splits):
    """Makes sure that the files of `splits` are there: downloads and unpacks the task if it has no folder yet."""
    missing = [split for split in splits if not (folder / f"{split}.tsv").is_file()]
    if missing and folder.exists():
        fail(f"{folder / missing[0]}.tsv does not exist: add it, or move {folder} away and the task is downloaded")
    if not missing:
        return
    paths = [folder.parent / "downloads" / Path(name).name for name in task.sources]
    for path, (name, digest) in zip(paths, task.sources.items(), strict=True):
        try:
            download(GLUE_URL + name, path)
        except BadInput as error:
            fail(error)
        if digest and sha256(path) != digest:
            fail(f"{path} has another checksum than the official file: remove it and run the same command again")
    part = Path(f"{folder}.part")  # renamed once it is whole: a kill leaves no folder that looks so
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (build_mrpc if task.folder == "MRPC" else unzip)(task, paths, part)
    part.replace(folder)

def unzip(task, paths, part):
    """Writes a task's files from its archive to the folder `part`; refuses an archive with a path out of its folder."""
    try:
        with zipfile.ZipFile(paths[0]) as archive:
            for name in archive.namelist():
                if re.search(r"^[/\\]|^\w:|(^|[/\\])\.\.([/\\]|$)", name):
                    fail(f"{paths[0]} holds {name!r}, a path out of its folder: remove this file, it is not the official one")
            for split in task.rows:
                (part / f"{split}.tsv").write_bytes(archive.read(f"{task.folder}/{split}.tsv"))
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError, RuntimeError) as error:
        fail(f"{paths[0]} is damaged or not the official file ({error}): remove it and run the same command again")

def build_mrpc(task, paths, part):
    """Writes MRPC's files to the folder `part`: dev is the train rows whose pair of ids stands in the third file."""
    train, test, ids = map(read_rows, paths)
    dev = set(map(tuple, ids))
    files = {"train": [row for row in train if tuple(row[1:3]) not in dev],
             "dev": [row for i, row in enumerate(train) if i == 0 or tuple(row[1:3]) in dev],
             "test": [[str(i - 1) if i else "index", *row[1:]] for i, row in enumerate(test)]}  # its labels stay behind
    for split, rows in files.items():
        (part / f"{split}.tsv").write_bytes("".join("\t".join(row) + "\n" for row in rows).encode())

def read_rows(path):
    """The lines of a TSV as lists of columns, without quoting: a " is a character like any other."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start}): get the official file again")
    return [line.rstrip("\r").split("\t") for line in lines if line.strip("\r")]

def read_split(path, task):
    """(texts, labels, rows skipped) of a file: tuples of strings; numbers (N,), None for a test file; a count. Stops on a
    malformed file; only QQP may skip rows, for some in its official files have a wrong number of columns."""
    labelled, rows = not path.stem.startswith("test"), read_rows(path)
    first, header = (1, task.header) if labelled and task.header else (2, rows.pop(0) if rows else [])
    names = [*task.texts, task.label] if labelled else task.texts
    if missing := [name for name in names if name not in header]:
        fail(f"{path} has no column {missing[0]!r}: found {', '.join(header) or 'an empty file'}")
    bad = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if bad and (task.folder != "QQP" or not labelled):  # the server wants a prediction for every row of a test file
        fail(f"{path}, line {first + bad[0]} has {len(rows[bad[0]])} columns, expected {len(header)}: get the official file")
    rows = [row for row in rows if len(row) == len(header)] if bad else rows
    if not rows:
        fail(f"{path} has no examples: expected rows of {', '.join(names)}")
    if len(rows) != task.rows[path.stem]:
        print(f"warning: {path} has {len(rows)} examples, expected the {task.rows[path.stem]} of the official file")
    columns = [[row[header.index(name)] for row in rows] for name in names]
    texts, labels = list(zip(*columns[: len(task.texts)], strict=True)), columns[-1] if labelled else []
    numbers = {word: float(word) for word in set(labels) if re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?", word)}
    numbers = {word: i for i, word in enumerate(task.labels)} or numbers
    if wrong := [word for word in labels if word not in numbers]:
        fail(f"{path} has the label {wrong[0]!r}: expected {' or '.join(task.labels) or 'a number from 0 to 5'}")
    labels = np.array([numbers[word] for word in labels], np.int64 if task.labels else np.float32)
    return texts, labels if labelled else None, len(bad)

def encode(texts, tokenizer, seq_len):
    """(tokens (N, longest) padded at the end, lengths (N,), number cut) of texts as `[CLS] a [SEP]` or
    `[CLS] a [SEP] b [SEP]`: one that exceeds seq_len loses tokens at the end of its longer text, one at a time."""
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
    """Yields (indices (B,), tokens (B, S), mask (B, S) false at padding) of all of tokens (N, longest), on its device.
    Examples of like length go together: all are sorted or, with a generator, the order is random but for sorting
    within spans of 50 batches. It goes to the device in one piece, so that no step waits for a copy."""
    order, span = (rng.permutation(len(lengths)), 50 * size) if rng else (np.arange(len(lengths)), len(lengths))
    spans = [order[i : i + span] for i in range(0, len(order), span)]
    order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in spans])
    parts = [order[i : i + size] for i in range(0, len(order), size)]
    if rng:
        rng.shuffle(parts)
    order = torch.from_numpy(np.concatenate(parts)).to(tokens.device)
    for part, index in zip(parts, order.split([len(part) for part in parts]), strict=True):
        rows = tokens[index, : -(-int(lengths[part].max()) // 8) * 8]  # a CPU builds kernels for each S
        yield index, rows, rows != pad_id

# ----------------------------------------------------------------------------------------- fine-tuning

class Classifier(nn.Module):
    """The encoder with the paper's classifier on its first position: dense, tanh, dropout, linear [2]."""
    def __init__(self, encoder, outputs):
        super().__init__()
        self.encoder, c = encoder, encoder.cfg
        self.head = nn.Sequential(nn.Linear(c.width, 1024), nn.Tanh(), nn.Dropout(c.dropout), nn.Linear(1024, outputs))
        for layer in self.head[::3]:
            nn.init.normal_(layer.weight, std=c.init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens, mask):
        """tokens and mask (B, S) -> logits (B, outputs)."""
        first = self.encoder.encode(tokens, mask)[:, 0]
        with torch.autocast(tokens.device.type, enabled=False):  # from 2 to 4 bf16 has steps of 1/64: STS-B would tie
            return self.head(first.float())

def finetune(task, data, encoder, scratch, pad_id, options, device, dtype, seed):
    """Trains a copy of the encoder (scratch: one of random weights) and a classifier on data["train"], of {split:
    (tokens, lengths, labels)}; returns {split: (N,) predictions} of the others. The seed alone decides the order."""
    torch.manual_seed(seed)
    encoder = cram.Model(encoder.cfg, encoder.vocab_size, encoder.seq_len) if scratch else copy.deepcopy(encoder)
    rng, (tokens, lengths, labels) = np.random.default_rng(seed), data["train"]
    model = Classifier(encoder, max(1, len(task.labels))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    tokens, labels = torch.from_numpy(tokens.astype(np.int32)).to(device), torch.from_numpy(labels).to(device)
    steps, step = options.epochs * math.ceil(len(tokens) / options.batch_size), 0
    for epoch in range(options.epochs):
        show(f"{task.folder}, seed {seed}: epoch {epoch + 1} of {options.epochs}")
        for index, rows, mask in batches(tokens, lengths, options.batch_size, pad_id, rng):
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
                logits = model(rows, mask)
            loss = F.cross_entropy(logits, labels[index]) if task.labels else F.mse_loss(logits[:, 0], labels[index])
            p = step / steps
            for group in optimizer.param_groups:
                group["lr"] = options.lr * (10 * p if p < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (p - 0.1) / 0.9))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1
    show("")
    return {split: predict(model, *data[split][:2], pad_id, device, dtype) for split in data if split != "train"}

@torch.no_grad()
def predict(model, tokens, lengths, pad_id, device, dtype):
    """Label numbers or scores of examples in their order: (N,) float64; all of them nan where a logit is not finite."""
    model.eval()
    tokens = torch.from_numpy(tokens.astype(np.int32)).to(device)
    logits = torch.empty(len(tokens), model.head[-1].out_features, device=device)
    for index, rows, mask in batches(tokens, lengths, 64, pad_id):
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            logits[index] = model(rows, mask)
    logits = logits.cpu().double()  # fetched once, so that no batch waits for a copy
    labels = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1).double()
    return (labels if logits.isfinite().all() else labels * math.nan).numpy()

def main(argv=None):
    options = Options(**parse_flags(Options, sys.argv[1:] if argv is None else argv, __doc__))
    names = list(TASKS) if options.tasks == "all" else list(dict.fromkeys(options.tasks.split(",")))
    if unknown := [name for name in names if name not in TASKS]:
        fail(f"unknown task {unknown[0]!r}: expected all, or some of {','.join(TASKS)} with commas between")
    scratch = options.checkpoint == "none"
    source = Path(options.like if scratch else options.checkpoint)
    model, tokenizer, state = load_model(source, trained=not scratch, dropout=0.1)  # [2]
    options.lr = 4e-5 * (768 / model.cfg.width) ** 2 if options.lr == "auto" else options.lr
    (device, dtype, reason), pad_id = choose_device(options), tokenizer.encode_single_token("[PAD]")
    title, reads = (f"random weights, as {source}", 0) if scratch else (f"{source}", state["run"]["reads"])
    print(f"model    {title}: {model.cfg.recipe}, {model.cfg.layers} layers, width {model.cfg.width}, "
          f"{reads * model.seq_len / 1e6:.1f} M tokens read\nmachine  {device.type}, {dtype} ({reason})\n"
          f"setting  {options.epochs} epochs, batch {options.batch_size}, lr {options.lr:g}, seeds 0 to {options.seeds - 1}")
    data = {name: {} for name in names}
    for name, files in data.items():  # all files before the first run: a mistake in the last shows now, not after hours
        task, folder = TASKS[name], Path(options.glue_dir) / TASKS[name].folder
        splits = [split for split in task.rows if options.submit or not split.startswith("test")]
        fetch(folder, task, splits)
        for split in splits:
            texts, labels, skipped = read_split(folder / f"{split}.tsv", task)
            *arrays, cut = encode(texts, tokenizer, model.seq_len)
            files[split] = (*arrays, labels)
            print(f"data     {task.folder} {split}: {len(texts)} examples, {cut} cut to {model.seq_len} tokens"
                  + f", {skipped} malformed rows skipped" * (skipped > 0), flush=True)

    # All that shapes a score, but for the data: a run kept in glue.json counts where it agrees in each of these.
    setting = {"checkpoint": sha256(source / "checkpoint.pt"), "random": scratch, "device": device.type, "dtype": dtype,
               "epochs": options.epochs, "batch_size": options.batch_size, "lr": options.lr}
    kept, submit, row = source / "glue.json", Path(options.submit), {}

    def finished():  # read anew each time, for another process may be at other tasks
        return json.loads(kept.read_text()) if kept.exists() else []
    for name, files in data.items():
        task, runs, predicted = TASKS[name], [], {}
        columns = {split: task.folder + SUFFIX[split.partition("_")[2]] for split in files}
        dev = {split: labels for split, (_, _, labels) in files.items() if split.startswith("dev")}
        digest = hashlib.sha256(b"".join(part.tobytes() for split in ("train", *dev) for part in files[split]))
        work = partial(finetune, task, files, model, scratch, pad_id, options, device, dtype)
        for seed in range(options.seeds):
            about = {"task": name, "seed": seed, "data": digest.hexdigest(), **setting}
            found = [entry for entry in finished() if about.items() <= entry.items()]
            if not found:
                start, predicted[seed] = time.monotonic(), work(seed)
                scores = {columns[split]: score(task, predicted[seed][split], labels) for split, labels in dev.items()}
                found = [{**about, "scores": scores, "seconds": time.monotonic() - start}]
                text = json.dumps(finished() + found, indent=1).encode()
                cram.write_whole(kept, lambda file, text=text: file.write(text))
            runs.append(found[0])
            shown = [f"{metric} {100 * x:.1f}" for scores in runs[-1]["scores"].values() for metric, x in scores.items()]
            note = f"{runs[-1]['seconds']:.0f} s" if seed in predicted else f"taken from {kept}"
            print(f"{task.folder:8} seed {seed}: {', '.join(shown)} ({note})", flush=True)
        for column in runs[0]["scores"]:
            for metric in task.metrics:
                values = 100 * np.array([run["scores"][column][metric] for run in runs])  # a nan makes all three nan
                print(f"{column:8} {metric}: median {np.median(values):.1f}, range {values.min():.1f} to {values.max():.1f}, "
                      f"{len(runs)} seeds, {sum(run['seconds'] for run in runs):.0f} s", flush=True)
                row.setdefault(column, (metric, np.median(values)))
        if options.submit:
            means = [np.mean([scores[task.metrics[0]] for scores in run["scores"].values()]) for run in runs]
            seed = int(np.argsort(means)[(len(runs) - 1) // 2])
            tests = predicted.get(seed) or work(seed)  # kept scores come without predictions: once more
            submit.mkdir(parents=True, exist_ok=True)
            for split in files.keys() - dev.keys() - {"train"}:
                if np.isnan(tests[split]).any():
                    fail(f"{task.folder}: the run with seed {seed} diverged, so it has no predictions to submit")
                words = (task.labels[int(x)] if task.labels else f"{x:.3f}" for x in tests[split].clip(0, 5))
                text = "".join(f"{i}\t{word}\n" for i, word in enumerate(words))
                (submit / f"{columns[split]}.tsv").write_text(f"index\tprediction\n{text}")

    medians = [value for _, value in row.values()]
    total = "GLUE average" if len(row) == 9 else f"mean of these {len(row)} columns"
    print(f"\n| model | {' | '.join(f'{column} {row[column][0]}' for column in row)} | {total} |\n"
          f"|{' --- |' * (len(row) + 2)}\n| {title} | {' | '.join(f'{x:.1f}' for x in [*medians, np.mean(medians)])} |\n\n"
          f"In it: dev sets of {', '.join(names)}; median of seeds 0 to {options.seeds - 1}. Not in it: "
          f"{', '.join(name for name in TASKS if name not in names) or 'none'}, and WNLI as in the paper."
          + "\nnan: undefined, for a run diverged or predicted the same score for all" * bool(np.isnan(medians).any()))
    if options.submit:
        with zipfile.ZipFile(submit / "submission.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for column in row:
                archive.write(submit / f"{column}.tsv", f"{column}.tsv")
        print(f"{submit}/submission.zip: {', '.join(row)}. The server asks for WNLI and AX too: left out, as in the paper.")

if __name__ == "__main__":
    main()
