"""Text to tokens: reads documents, learns a vocabulary, and writes rows of token ids that cram.py trains on.

    python prepare_data.py                                          # the embedded corpus -> data/docs
    python prepare_data.py --source my_texts/ notes.jsonl --out data/mine
    python prepare_data.py --source corpus/*.jsonl.gz --out data/corpus --vocab_size 32768

The paper's budget does not count this work (its rule 4), so all of its freedom lies here: what text is kept, how it
is cut into tokens, and the order in which a model sees it. Three passes: count words and learn the merges of a
byte-level BPE; encode every document; pack the kept ones into rows and put the rows in order. Memory stays bounded:
text and tokens stream through, only some numbers per document and per row are held.
"""

import ast
import base64
import gzip
import hashlib
import heapq
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import sysconfig
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from inspect import cleandoc
from itertools import pairwise
from pathlib import Path

import numpy as np

from cram import FILES, PATTERN, SPECIALS, fail, load_tokenizer, normalise, opt, parse_flags, sha256

FORMAT = 1
CHUNK = 2**20  # bytes of raw text that travel to a worker together
MIN_CHARS = 20  # a shorter document teaches nothing about context
TEXT_KINDS = (".txt", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclass
class Options:
    """What prepare_data.py can be told; all of it is written into the manifest."""

    source: tuple = opt(("docs",), "docs (the documentation of Python, numpy and torch on this machine), or files and "
                            'folders: .txt (a document a file), .jsonl, .json.gz, .jsonl.gz ({"text": ...} a line)')
    out: str = opt("", "folder to write; empty: data/docs for docs, data/NAME for a file or folder NAME")
    vocab_size: int = opt(0, "tokens in all: 256 bytes, merges and 4 specials; 0: 8192 for docs, else 32768 [4.4]")
    seq_len: int = opt(128, "tokens in a row [4.2]")
    filter: float = opt(0.3, "drop a document with at least this many tokens a character: it compresses badly [4.4]")
    sort: str = opt("prevalence", "order of the rows: prevalence (most likely first, by mean unigram log-probability), "
                    "sentences (most full stops first) or none (shuffled) [4.4]")
    val_share: float = opt(0.0, "share of the documents held out for validation; 0: 0.05 for docs, else 0.01")
    max_docs: int = opt(0, "stop after so many documents (lines of .jsonl, files of any other kind); 0: all")
    bpe_mb: int = opt(100, "MB of text, taken evenly from all of it, on which the merges are learnt")
    workers: int = opt(0, "processes; 0: one a CPU core. The files written do not depend on it")
    seed: int = opt(0, "seed of the row order where it is random")


class BadInput(Exception):
    """A sentence about a file that cannot be used; raised in a worker, shown to the user by main."""


# ------------------------------------------------------------------------------------- reading documents


def find_files(source):
    """The files behind --source, sorted, as (path, kind) with kind python, txt or jsonl."""
    if source == ["docs"]:
        roots = [Path(sysconfig.get_paths()["stdlib"])]
        roots += [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        return [(path, "python") for root in roots for path in sorted(root.rglob("*.py"))
                if not skip & set(path.relative_to(root).parts)]
    found = []
    for name in source:
        path = Path(name)
        if not path.exists():
            fail(f"no such file or folder: {path}. --source takes docs, or paths of {', '.join(TEXT_KINDS)} files and folders of them")
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(TEXT_KINDS)) if path.is_dir() else [path]
        if not inside or not all(p.name.endswith(TEXT_KINDS) for p in inside):
            fail(f"{path} holds no text that is understood here: expected {', '.join(TEXT_KINDS)}")
        found += [(p, "txt" if p.suffix == ".txt" else "jsonl") for p in inside]
    return found


def read_chunks(files):
    """Yields (path, kind, number of the first item, raw items) of about CHUNK bytes: lines, or one whole file."""
    for path, kind in files:
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                if kind != "jsonl":
                    yield path, kind, 1, [file.read()]
                    continue
                number = 1
                while lines := file.readlines(CHUNK):
                    yield path, kind, number, lines
                    number += len(lines)
        except (OSError, EOFError) as error:
            raise BadInput(f"{path} cannot be read ({error}): repair it or leave it out of --source") from error


def documents(chunk):
    """The texts in a chunk of read_chunks; raises BadInput where one is not what its file name promises."""
    path, kind, first, items = chunk
    for number, raw in enumerate(items, first):
        where = f"{path}, line {number}" if kind == "jsonl" else str(path)
        if not raw.strip():
            continue
        try:
            text = raw.decode()
            if kind == "python":
                yield from docstrings(text)
                continue
            text = json.loads(text)["text"] if kind == "jsonl" else text
        except UnicodeDecodeError as error:
            raise BadInput(f"{where} is not UTF-8 (byte {error.start}): convert it to UTF-8 first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f'{where} is not JSON with a "text": expected one {{"text": ...}} object a line') from error
        if not isinstance(text, str):
            raise BadInput(f'{where} has a "text" that is no string: expected one {{"text": ...}} object a line')
        yield text


def docstrings(code):
    """The documentation in a Python source, read without importing it: docstrings, and pydoc's table of topics."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return  # numpy and torch carry templates that are no Python yet
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if text := ast.get_docstring(node):
            yield text
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                waiting.append(child)
            elif isinstance(getattr(child, "value", None), ast.Dict) and len(child.value.values) > 50:
                texts = (v.value for v in child.value.values if isinstance(v, ast.Constant))  # pydoc_data.topics
                yield from (cleandoc(text) for text in texts if isinstance(text, str))


def parallel(function, items, workers):
    """Yields function(item) in the order of `items`, computed by `workers` processes, a few items ahead at most."""
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        window = deque()
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > 2 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()


# -------------------------------------------------------------------------------------------- vocabulary


def count_words(chunk):
    """How often each word (a piece of PATTERN) occurs in a chunk's normalised text."""
    counts = Counter()
    for text in documents(chunk):
        counts.update(re.findall(PATTERN, normalise(text)))
    return counts


def learn_bpe(word_counts, merges):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): the tokens as bytes, 256 single bytes and then a merge each.

    word_counts: {word: occurrences}. Each step joins the most frequent pair of neighbouring tokens; among equals the
    pair with the smaller token ids, the first of the two first. A pair seen only once is not worth a token, so a small
    text gives fewer merges than asked. Counts are kept up to date around each merge: only words that hold it are touched.
    """
    tokens = [bytes([i]) for i in range(256)]
    known = {token: i for i, token in enumerate(tokens)}
    words = [list(word.encode()) for word in sorted(word_counts)]
    times = [word_counts[word] for word in sorted(word_counts)]
    count, where = Counter(), defaultdict(list)  # of each pair: occurrences, and the words that hold it or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            count[pair] += times[i]
            where[pair].append(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while len(tokens) < 256 + merges and heap:
        negative, pair = heapq.heappop(heap)
        if count[pair] != -negative:  # it has changed since: count falls silently, so put it back where it belongs now
            if count[pair] > 1:
                heapq.heappush(heap, (-count[pair], pair))
            continue
        if count[pair] < 2:
            break
        first, second = pair
        merged = tokens[first] + tokens[second]
        # tiktoken knows a token by its bytes alone, so another way to the same bytes is the same token.
        new = known.setdefault(merged, len(tokens))
        if new == len(tokens):
            tokens.append(merged)
        risen = set()
        for i in where.pop(pair):
            word, n, j = words[i], times[i], 0
            while j < len(word) - 1:
                if word[j] == first and word[j + 1] == second:
                    if j > 0:
                        count[word[j - 1], first] -= n
                        left = word[j - 1], new
                        count[left] += n
                        where[left].append(i)
                        risen.add(left)
                    if j + 2 < len(word):
                        count[second, word[j + 2]] -= n
                        right = new, word[j + 2]
                        count[right] += n
                        where[right].append(i)
                        risen.add(right)
                    word[j : j + 2] = [new]
                j += 1
        del count[pair]
        for pair in risen:
            if count[pair] > 1:
                heapq.heappush(heap, (-count[pair], pair))
    return tokens


# ---------------------------------------------------------------------------------------------- encoding


@lru_cache(maxsize=1)
def tokenizer_at(path):
    return load_tokenizer(Path(path).read_text())


def encode_chunk(chunk, tokenizer_path, threshold):
    """Tokens of a chunk's documents: (uint16 tokens joined with [SEP], lengths with it, hashes, characters, counts).

    A document that is too short or that the paper's filter drops leaves only its count behind. The hash of the
    normalised text decides on which side of the split a document stands, and whether it is a duplicate.
    """
    tokenizer = tokenizer_at(tokenizer_path)
    sep = tokenizer.encode_single_token("[SEP]")
    tokens, lengths, hashes, chars = [], [], [], 0
    counts = Counter(read=0, too_short=0, filtered=0)
    for text in documents(chunk):
        text = normalise(text)
        counts["read"] += 1
        if len(text) < MIN_CHARS:
            counts["too_short"] += 1
            continue
        ids = tokenizer.encode_ordinary(text)
        if len(ids) >= threshold * len(text):
            counts["filtered"] += 1
            continue
        ids.append(sep)
        tokens.append(np.array(ids, np.uint16))
        lengths.append(len(ids))
        hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
        chars += len(text)
    tokens = np.concatenate(tokens) if tokens else np.zeros(0, np.uint16)
    return tokens, np.array(lengths, np.int64), np.array(hashes, np.uint64), chars, counts


def pack(source, target, lengths, keep, seq_len):
    """Copies the tokens of the documents to keep from `source` to `target` and cuts them to whole rows; returns the rows."""
    ends = np.cumsum(lengths)
    with open(source, "rb") as file, open(target, "wb") as out:
        start = written = 0
        while start < len(lengths):
            base = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, base + 4 * CHUNK)))
            tokens = np.fromfile(file, "<u2", int(ends[stop - 1] - base))
            kept = tokens[np.repeat(keep[start:stop], lengths[start:stop])]
            kept.tofile(out)
            written += len(kept)
            start = stop
        out.truncate(written // seq_len * seq_len * 2)
    return written // seq_len


def read_rows(path, seq_len, rows=CHUNK // 32):
    """Yields a file's rows (n, seq_len), some thousands at a time."""
    with open(path, "rb") as file:
        while len(tokens := np.fromfile(file, "<u2", rows * seq_len)):
            yield tokens.reshape(-1, seq_len)


def unigram(path, seq_len, vocab_size):
    """Occurrences (vocab_size,) of each token in a file of rows."""
    counts = np.zeros(vocab_size, np.int64)
    for rows in read_rows(path, seq_len):
        counts += np.bincount(rows.ravel(), minlength=vocab_size)
    return counts


def sort_rows(source, target, keys, seq_len):
    """Writes the rows of `source` to `target` in the order of `keys`, smallest first, through buckets that fit in memory."""
    buckets = max(1, len(keys) * seq_len * 2 // (64 * CHUNK))
    bounds = np.quantile(keys, np.arange(1, buckets) / buckets) if buckets > 1 else np.zeros(0)
    bucket_of = np.searchsorted(bounds, keys, side="right")
    paths = [Path(f"{target}.{i}.part") for i in range(buckets)]
    start = 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for rows in read_rows(source, seq_len):
            now = bucket_of[start : start + len(rows)]
            for i in np.unique(now):
                rows[now == i].tofile(files[i])
            start += len(rows)
    with open(target, "wb") as out:
        for i, path in enumerate(paths):
            order = np.argsort(keys[bucket_of == i], kind="stable")
            np.fromfile(path, "<u2").reshape(-1, seq_len)[order].tofile(out)
            path.unlink()


def row_keys(path, how, seq_len, log_probability, stops, seed):
    """The number of each row by which sort_rows orders them; what is equal stays in the order of the documents."""
    rng = np.random.default_rng(seed)
    keys = []
    for rows in read_rows(path, seq_len):
        if how == "prevalence":
            keys.append(-log_probability[rows].mean(1))
        elif how == "sentences":
            keys.append(-stops[rows].sum(1) + rng.random(len(rows)))
        else:
            keys.append(rng.random(len(rows)))
    return np.concatenate(keys).astype(np.float32) if keys else np.zeros(0, np.float32)


# -------------------------------------------------------------------------------------------------- main


def check_options(options):
    """Fills in what depends on the source, and stops on a value that makes no sense."""
    options.source = list(options.source)
    docs = options.source == ["docs"]
    options.vocab_size = options.vocab_size or (8192 if docs else 32768)
    options.val_share = options.val_share or (0.05 if docs else 0.01)
    options.workers = options.workers or os.cpu_count() or 1
    name = "docs" if docs else Path(options.source[0]).resolve().name.split(".")[0]
    options.out = options.out or f"data/{name}"
    smallest = 256 + len(SPECIALS) + 1
    if not smallest <= options.vocab_size <= 65536:
        fail(f"vocab_size {options.vocab_size}: expected {smallest} to 65536, for tokens are stored in 16 bits")
    if options.sort not in ("prevalence", "sentences", "none"):
        fail(f"unknown sort {options.sort!r}: expected prevalence, sentences or none")
    for name, low, high in (("seq_len", 8, 4096), ("workers", 1, 1024), ("filter", 1e-3, 1e3), ("bpe_mb", 1, 1e6),
                            ("val_share", 1e-6, 0.5), ("max_docs", 0, math.inf)):
        if not low <= getattr(options, name) <= high:
            fail(f"{name} is {getattr(options, name)}: expected {low:g} to {high:g}")


def main(argv=None):
    """Prepares a data folder; the manifest meta.json is written last, so a folder without it is not finished."""
    options = Options(**parse_flags(Options, sys.argv[1:] if argv is None else argv, __doc__))
    check_options(options)
    files = find_files(options.source)
    out = Path(options.out)
    if (out / "meta.json").exists():
        fail(f"{out} is a finished data folder already: delete it or choose another --out")
    created = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        prepare(options, files, out)
    except BaseException as error:
        for path in [*out.glob("*.part"), *(out / name for name in FILES)]:
            path.unlink(missing_ok=True)
        if created:
            shutil.rmtree(out, ignore_errors=True)
        if isinstance(error, (BadInput, OSError)):
            fail(str(error))
        if isinstance(error, KeyboardInterrupt):
            fail(f"interrupted, nothing is left in {out}")
        raise


def prepare(options, files, out):
    """The three passes over `files`, written to the folder `out`."""
    started = time.monotonic()
    seconds = {}

    def stage(name):
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)

    def chunks():
        left = options.max_docs or math.inf
        for path, kind, number, items in read_chunks(files):
            if left <= 0:
                return
            yield path, kind, number, items if len(items) <= left else items[: int(left)]
            left -= len(items)

    size = sum(path.stat().st_size * (3 if path.suffix == ".gz" else 1) for path, _ in files)
    share = min(1.0, options.bpe_mb * 1e6 / max(1, size)) if files[0][1] != "python" else 1.0
    sample = (chunk for i, chunk in enumerate(chunks()) if int((i + 1) * share) > int(i * share))
    words = Counter()
    for counts in parallel(count_words, sample, options.workers):
        words.update(counts)
    stage("count words")
    merges = options.vocab_size - 256 - len(SPECIALS)
    tokens = learn_bpe(words, merges)
    if len(tokens) < 256 + merges:
        fail(f"the text gives {len(tokens) - 256} merges, vocab_size {options.vocab_size} needs {merges}: "
             f"use --vocab_size {len(tokens) + len(SPECIALS)} or less, or more text")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (out / "tokenizer.tiktoken").write_text("".join(lines))
    stage("learn merges")

    lengths, hashes, chars, counts = [], [], 0, Counter(read=0, too_short=0, filtered=0)
    encode = partial(encode_chunk, tokenizer_path=str(out / "tokenizer.tiktoken"), threshold=options.filter)
    with open(out / "tokens.part", "wb") as file:
        for ids, length, digest, n, count in parallel(encode, chunks(), options.workers):
            ids.astype("<u2").tofile(file)
            lengths.append(length)
            hashes.append(digest)
            chars += n
            counts.update(count)
    lengths, hashes = (np.concatenate(parts) if parts else np.zeros(0, np.int64) for parts in (lengths, hashes))
    stage("encode")

    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True  # the first of each set of duplicates stays
    held_out = hashes < options.val_share * 2.0**64
    rows = {name: pack(out / "tokens.part", out / f"{name}.part", lengths, first & side, options.seq_len)
            for name, side in (("train", ~held_out), ("val", held_out))}
    counts.update(duplicate=int((~first).sum()), train=int((first & ~held_out).sum()), val=int((first & held_out).sum()))
    if not rows["train"] or not rows["val"]:
        raise BadInput(f"the text is too small: {counts['read']} documents were read and gave {rows['train']} rows of "
                       f"{options.seq_len} tokens to train on and {rows['val']} to validate. Give more text, "
                       f"or a larger --val_share or --filter")
    trained, seen = (unigram(out / f"{n}.part", options.seq_len, options.vocab_size) for n in ("train", "val"))
    log_probability = np.log((trained + 1) / (trained + 1).sum())
    unigram_nats = float(-(seen * log_probability).sum() / seen.sum())
    stops = np.array([token.count(b".") for token in tokens] + [0] * len(SPECIALS))
    for name, how in (("train", options.sort), ("val", "none")):
        keys = row_keys(out / f"{name}.part", how, options.seq_len, log_probability, stops, options.seed)
        sort_rows(out / f"{name}.part", out / f"{name}.bin", keys, options.seq_len)
    for name in ("tokens", "train", "val"):
        (out / f"{name}.part").unlink()
    stage("pack and sort")

    kept = counts["train"] + counts["val"]
    meta = {
        "format": FORMAT, "seq_len": options.seq_len, "vocab_size": options.vocab_size, "pattern": PATTERN,
        "special_tokens": {name: options.vocab_size - len(SPECIALS) + i for i, name in enumerate(SPECIALS)},
        "normalisation": "NFD, lower case, ASCII only, control characters dropped, white space folded",
        "rows": rows, "tokens": {name: n * options.seq_len for name, n in rows.items()},
        "files": {name: {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)} for name in FILES},
        "documents": {**counts, "kept": kept}, "unigram_nats": unigram_nats,
        "chars_per_token": chars / max(1, int(lengths.sum())),
        "options": asdict(options), "seconds": seconds,
    }
    (out / "meta.part").write_text(json.dumps(meta, indent=1))
    os.replace(out / "meta.part", out / "meta.json")
    print(f"""read       {counts["read"]} documents of {len(files)} files
dropped    {counts["too_short"]} too short, {counts["filtered"]} that compress badly, {counts["duplicate"]} duplicates
kept       {kept}: {counts["train"]} to train, {counts["val"]} to validate
tokens     {meta["chars_per_token"]:.2f} characters a token, vocabulary {options.vocab_size}
rows       {rows["train"]} to train ({meta["tokens"]["train"] / 1e6:.1f} M tokens), {rows["val"]} to validate, order: {options.sort}
seconds    {", ".join(f"{name} {s:.1f}" for name, s in seconds.items())}; {time.monotonic() - started:.1f} in all
unigram    {unigram_nats:.3f} nats a token on the validation rows: the line that training must beat
wrote      {out}""")


if __name__ == "__main__":
    main()
