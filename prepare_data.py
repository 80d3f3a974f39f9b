"""Text to tokens: reads documents, learns a vocabulary, and writes rows of token ids that cram.py trains on.

    python prepare_data.py                                          # the embedded corpus -> data/docs
    python prepare_data.py --source my_texts/ notes.jsonl --out data/mine
    python prepare_data.py --source c4 --max_docs 1000000           # the paper's corpus, downloaded

What it takes, on two cores (measured: assets/prepare-*.log; the last row is extrapolated, not run):

    docs                       8 MB of text    1.8 M tokens    20 s     4 MB of disk
    370 MB of mixed English    370 MB          76 M tokens     40 s     150 MB, three times that while it works
    a day's worth of c4        47 GB           1e10 tokens     90 min   20 GB, and 80 GB while it works, downloads included

The paper's budget does not count this work (its rule 4), so what is done here is free: which text is kept, how it is
cut into tokens, and in which order a model sees it. Three passes: count words in a sample and learn the merges of a
byte-level BPE; encode every document; pack the kept ones into rows and order the rows. Text and tokens stream
through: only a few numbers per document and per row are held in memory.
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
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from inspect import cleandoc
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import requests

import cram
from cram import FILES, PATTERN, SPECIALS, fail, load_tokenizer, normalise, opt, parse_flags, sha256, show

CHUNK = 2**20  # bytes of raw text that travel to a worker together
MIN_CHARS = 20  # a shorter document teaches nothing about context
MAX_BYTES = 2**24  # a longer line is a damaged file or a dump: it is counted, and never held in memory
KINDS = (".txt", ".jsonl", ".json.gz", ".jsonl.gz")
C4_URL = ("https://huggingface.co/datasets/allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
          "c4-train.{:05}-of-01024.json.gz")
C4_SHARD_DOCS, C4_DAY = 350_000, 21_000_000  # documents in a shard, at least; and for a day of training
DOWNLOADS = Path("data/downloads")
BPE_BYTES = 1e8  # of text on which the merges are learnt: the first part of every .jsonl, and some of the other files


@dataclass
class Options:
    """What prepare_data.py can be told; all of it is written into the manifest."""

    source: tuple = opt(("docs",), "docs (the documentation of Python, numpy and torch on this machine), c4 (downloaded), or "
                        'files and folders: .txt (a document a file), .jsonl, .json.gz, .jsonl.gz ({"text": ...} a line)')
    out: str = opt("", "folder to write; empty: data/docs, data/c4, or data/NAME for a file or folder NAME")
    vocab_size: int = opt(0, "tokens in all: 256 bytes, merges and 4 specials; 0: 8192 for docs, else 32768 [4.4]")
    seq_len: int = opt(128, "tokens in a row [4.2]")
    filter: float = opt(0.3, "drop a document with at least this many tokens a character: it compresses badly [4.4]")
    sort: str = opt("prevalence", "order of the rows: prevalence (most likely first, by mean unigram log-probability), "
                    "sentences (most full stops first) or none (shuffled) [4.4]")
    val_share: float = opt(0.0, "share of the documents held out for validation; 0: 0.05 for docs, else 0.01")
    max_docs: int = opt(0, "stop after so many lines of .jsonl, and files of other kinds; 0: all, or a day's worth of c4")
    workers: int = opt(0, "processes; 0: one a CPU core. The files written do not depend on it")
    seed: int = opt(0, "seed of the row order where it is random")


class BadInput(Exception):
    """A sentence about input that cannot be used; raised anywhere, also in a worker, shown to the user by main."""


# ---------------------------------------------------------------------------------------- downloads


def download(url, path, tries=8):
    """Fetches `url` to `path`, which appears when it is whole; path.part keeps what a broken connection left.

    Goes on from there (Range), waits and tries again on dropped connections, 429 and 5xx, as long as Retry-After
    says, and gives up with a sentence after `tries` failures in a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures, most, problem = Path(f"{path}.part"), 0, 0, ""
    while failures < tries and not path.exists():
        have, wait = part.stat().st_size if part.exists() else 0, min(60, 2**failures)
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
                status, told = answer.status_code, answer.headers
                problem = f"the server answered {status} {answer.reason}"
                if status in (200, 206) and not told.get("Content-Type", "").startswith("text/html"):
                    have = have if status == 206 else 0  # 200: the server ignores Range and sends all of it
                    length = int(told.get("Content-Length", 0))
                    if length > shutil.disk_usage(path.parent).free:
                        raise BadInput(f"{url} needs {length / 1e6:.0f} MB, more than is free in {path.parent}: make room")
                    problem = f"the connection closed before {length} bytes had come"
                    if fetch(answer, part, have, have + length) == have + length or not length:
                        os.replace(part, path)
                elif status == 416 and told.get("Content-Range") == f"bytes */{have}":  # all of it had arrived before
                    os.replace(part, path)
                elif status == 416:  # the part is no start of this file
                    part.unlink(missing_ok=True)
                elif status != 429 and status < 500:
                    problem += "" if status >= 400 else " with a web page, expected a file"
                    raise BadInput(f"{url}: {problem}. Check the address, or a proxy that asks for a login")
                elif told.get("Retry-After", "").isdigit():
                    wait = min(600, int(told["Retry-After"]))
        except requests.RequestException as error:
            problem = f"no connection, or it broke ({type(error).__name__})"
        if not path.exists():
            have = part.stat().st_size if part.exists() else 0
            failures, most = (0, have) if have > most else (failures + 1, most)
            time.sleep(wait)
    if not path.exists():
        raise BadInput(f"{url} could not be downloaded: {problem}. Check the network and run the same command again: "
                       "what has arrived is kept")


def fetch(answer, part, have, total):
    """Writes the body of an answer to the file `part` from byte `have` on, and returns the file's size."""
    started = time.monotonic()
    with open(part, "ab" if have else "wb") as file:
        for block in answer.iter_content(2**16):
            file.write(block)
            rate = (file.tell() - have) / max(1e-9, time.monotonic() - started)
            show(f"{part.stem} {file.tell() / 1e6:.0f} of {total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, "
                 f"{(total - file.tell()) / rate:.0f} s left")
        return file.tell()


# ----------------------------------------------------------------------------------- reading documents


def find_files(options):
    """The files behind --source, in a fixed order, as (path, kind) with kind python, txt or jsonl; downloads c4."""
    if options.source == ["docs"]:
        roots = [Path(sysconfig.get_paths()["stdlib"])]
        roots += [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        return [(path, "python") for root in roots for path in sorted(root.rglob("*.py"))
                if not skip & set(path.relative_to(root).parts)]
    if options.source == ["c4"]:
        shards = min(1024, math.ceil(options.max_docs / C4_SHARD_DOCS))
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        need = shards * 320e6 - sum(p.stat().st_size for p in DOWNLOADS.iterdir()) + shards * 1.3e9
        if need > shutil.disk_usage(DOWNLOADS).free:
            raise BadInput(f"{shards} shards need about {need / 1e9:.0f} GB to download and prepare, more than is free: "
                           "make room, or give a smaller --max_docs")
        urls = [C4_URL.format(i) for i in range(shards)]
        paths = [DOWNLOADS / url.rsplit("/", 1)[1] for url in urls]
        for url, path in zip(urls, paths, strict=True):
            download(url, path)
        return [(path, "jsonl") for path in paths]
    found = []
    for path in map(Path, options.source):
        if not path.exists():
            fail(f"no such file or folder: {path}. --source takes docs, c4, or paths of {', '.join(KINDS)} files and folders")
        inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(KINDS)) if path.is_dir() else [path]
        if not inside or not inside[0].name.endswith(KINDS):
            fail(f"{path} holds no text that is understood here: expected {', '.join(KINDS)}")
        found += [(p, "txt" if p.suffix == ".txt" else "jsonl") for p in inside]
    return found


def read_items(files, share=1.0):
    """Yields (where, kind, raw bytes) for each line of a .jsonl file, each other file, and pieces of a very long .txt.

    Raw is None where it is longer than MAX_BYTES, which is not read into memory. share < 1 gives a sample: the first
    part of every .jsonl file, and some of the other files, evenly.
    """
    for i, (path, kind) in enumerate(files):
        try:
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                if kind != "jsonl":
                    # One document a file, but a .txt of many books is cut at line ends.
                    size = CHUNK if kind == "txt" and path.stat().st_size > MAX_BYTES else -1
                    while int((i + 1) * share) > int(i * share) and (lines := file.readlines(size)):
                        raw = b"".join(lines)
                        yield str(path), kind, raw if len(raw) <= MAX_BYTES else None
                    continue
                number, left = 0, share * text_bytes(path)
                while (line := file.readline(MAX_BYTES)) and (share == 1 or left > 0):
                    number, left, whole = number + 1, left - len(line), True
                    while len(line) == MAX_BYTES and not line.endswith(b"\n"):
                        line, whole = file.readline(MAX_BYTES), False
                    yield f"{path}, line {number}", kind, line if whole else None
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"{path} cannot be read ({error}): repair it, or leave it out of --source") from error


def text_bytes(path):
    """About how many bytes of text a file holds; gzip makes English a bit smaller than two fifths."""
    return path.stat().st_size * (2.7 if path.suffix == ".gz" else 1)


def chunked(items):
    """Lists of items of about CHUNK bytes, to travel to a worker together."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += 200 + len(item[2] or b"")
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk


def documents(chunk):
    """Yields the texts of a chunk, None for an item that is too long; raises BadInput for one that is no text."""
    for where, kind, raw in chunk:
        if raw is None:
            yield None
            continue
        try:
            text = raw.decode().removeprefix("\ufeff")  # the mark with which some editors begin a file
            if kind == "jsonl" and text.strip():
                text = json.loads(text)["text"] + ""  # a text that is no string is a TypeError too
        except UnicodeDecodeError as error:
            raise BadInput(f"{where} is not UTF-8 (byte {error.start}): convert it to UTF-8 first") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f'{where} is not JSON with a "text": expected one {{"text": "..."}} object a line') from error
        if kind == "python":
            yield from docstrings(text)
        elif text.strip() or kind != "jsonl":
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


# ------------------------------------------------------------------------------------------ vocabulary


def count_words(chunk):
    """How often each word (a piece of PATTERN) occurs in a chunk's normalised text."""
    counts = Counter()
    for text in documents(chunk):
        counts.update(re.findall(PATTERN, normalise(text or "")))
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


# -------------------------------------------------------------------------------- encoding and packing


@lru_cache(maxsize=1)
def tokenizer_at(path, digest):
    """The tokenizer in a file with that checksum, loaded once in each process."""
    return load_tokenizer(Path(path).read_text())


def encode_chunk(chunk, vocabulary, threshold):
    """A chunk's documents: (tokens, [SEP] after each document; lengths, [SEP] included; hashes; characters; counts).

    A document that is too short, too long, or that the paper's filter drops, leaves only its count behind. The hash
    of the normalised text decides on which side of the split a document stands, and whether it is a duplicate.
    """
    tokenizer = tokenizer_at(*vocabulary)
    sep = np.array([tokenizer.encode_single_token("[SEP]")], np.uint16)
    tokens, lengths, hashes, chars, counts = [np.zeros(0, np.uint16)], [], [], 0, Counter()
    for text in documents(chunk):
        counts["read"] += 1
        if text is None:
            counts["too_long"] += 1
            continue
        text = normalise(text)
        if len(text) < MIN_CHARS:
            counts["too_short"] += 1
            continue
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())  # [MASK] in a text is letters, no special
        if len(ids) >= threshold * len(text):
            counts["filtered"] += 1
            continue
        tokens += [ids.astype(np.uint16), sep]
        lengths.append(len(ids) + 1)
        hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
        chars += len(text)
    return np.concatenate(tokens), np.array(lengths, np.int64), np.array(hashes, np.uint64), chars, counts


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


def count_tokens(path, seq_len, vocab_size):
    """How often each token occurs in a file of rows: (vocab_size,)."""
    return sum(np.bincount(rows.ravel(), minlength=vocab_size) for rows in read_rows(path, seq_len))


def row_keys(path, how, seq_len, log_probability, stops, seed):
    """A number for each row, by which sort_rows orders them: float32 (rows,)."""
    rng, keys = np.random.default_rng(seed), []
    for rows in read_rows(path, seq_len):
        key = -log_probability[rows].mean(1) if how == "prevalence" else rng.random(len(rows))
        keys.append(np.float32(key - stops[rows].sum(1) if how == "sentences" else key))
    return np.concatenate(keys)


def sort_rows(source, target, keys, seq_len):
    """Moves the rows of `source` to `target`, smallest key first, equal ones in their order.

    They go through files that hold a range of keys each and are small enough to be sorted in memory.
    """
    buckets = min(200, max(1, len(keys) * seq_len * 2 // (64 * CHUNK)))  # of 64 MB, and no more open files than allowed
    sample = keys[:: max(1, len(keys) // 1_000_000)]
    bounds = np.unique(np.quantile(sample, np.arange(1, buckets) / buckets)) if buckets > 1 else np.zeros(0)
    paths = [Path(f"{target}.{i}.part") for i in range(len(bounds) + 1)]
    start = 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for rows in read_rows(source, seq_len):
            bucket = np.searchsorted(bounds, keys[start : start + len(rows)], side="right")
            for i in np.unique(bucket):
                rows[bucket == i].tofile(files[i])
            start += len(rows)
    source.unlink()
    edges = [-math.inf, *bounds, math.inf]
    with open(target, "wb") as out:
        for path, low, high in zip(paths, edges, edges[1:], strict=False):
            order = np.argsort(keys[(keys >= low) & (keys < high)], kind="stable")
            np.fromfile(path, "<u2").reshape(-1, seq_len)[order].tofile(out)
            path.unlink()


# ------------------------------------------------------------------------------------------------ main


def check_options(options):
    """Fills in what depends on the source, and stops on a value that makes no sense."""
    options.source = list(options.source)
    special = options.source[0] if options.source in (["docs"], ["c4"]) else None
    options.vocab_size = options.vocab_size or (8192 if special == "docs" else 32768)
    options.val_share = options.val_share or (0.05 if special == "docs" else 0.01)
    options.max_docs = options.max_docs or (C4_DAY if special == "c4" else 0)
    options.workers = options.workers or os.cpu_count() or 1
    options.out = options.out or f"data/{special or Path(options.source[0]).resolve().name.split('.')[0]}"
    smallest = 256 + len(SPECIALS) + 1
    if not smallest <= options.vocab_size <= 65536:
        fail(f"vocab_size {options.vocab_size}: expected {smallest} to 65536, for tokens are stored in 16 bits")
    if options.sort not in ("prevalence", "sentences", "none"):
        fail(f"unknown sort {options.sort!r}: expected prevalence, sentences or none")
    for name, low, high in (("seed", 0, 2**32), ("seq_len", 8, 4096), ("workers", 1, 1024), ("filter", 1e-3, 1e3),
                            ("val_share", 1e-6, 0.5), ("max_docs", 0, math.inf)):
        if not low <= getattr(options, name) <= high:
            fail(f"{name} is {getattr(options, name)}: expected {low:g} to {high:g}")


def main(argv=None):
    """Prepares a data folder; the manifest meta.json is written last, so a folder without it is not finished."""
    options = Options(**parse_flags(Options, sys.argv[1:] if argv is None else argv, __doc__))
    check_options(options)
    out = Path(options.out)
    if (out / "meta.json").exists():
        fail(f"{out} is a finished data folder already: delete it or choose another --out")
    mine = out / "unfinished.part"  # marks a folder that a run of this script may write to, and clean up
    if out.exists() and not mine.exists() and any(out.iterdir()):
        fail(f"{out} holds other files: choose another --out, or an empty folder")
    try:
        files = find_files(options)
        place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
        need, free = 1.5 * sum(text_bytes(path) for path, _ in files), shutil.disk_usage(place).free
        if need > free:
            raise BadInput(f"{out} has {free / 1e9:.1f} GB free, about {need / 1e9:.1f} GB are needed: make room")
        out.mkdir(parents=True, exist_ok=True)
        mine.write_text(str(os.getpid()))
        prepare(options, files, out)
        mine.unlink()
    except BaseException as error:
        if mine.exists() and mine.read_text() == str(os.getpid()):
            shutil.rmtree(out)
        if isinstance(error, (BadInput, OSError)):
            fail(str(error))
        if isinstance(error, (KeyboardInterrupt, BrokenExecutor)):
            fail(f"stopped ({type(error).__name__}): nothing is left in {out}; run the same command again")
        raise


def prepare(options, files, out):
    """The three passes over `files`, written to the folder `out`."""
    started, seconds = time.monotonic(), {}

    def stage_done(name):
        seconds[name] = round(time.monotonic() - started - sum(seconds.values()), 1)

    share = min(1.0, BPE_BYTES / (1 + sum(text_bytes(path) for path, kind in files if kind != "python")))
    words = Counter()
    for counts in parallel(count_words, chunked(read_items(files, share)), options.workers):
        words.update(counts)
    if not words:
        raise BadInput(f"no text in {len(files)} files, the first of which is {files[0][0]}: give files that hold some")
    stage_done("count words")
    merges = options.vocab_size - 256 - len(SPECIALS)
    tokens = learn_bpe(words, merges)
    if len(tokens) < 256 + merges:
        raise BadInput(f"the text gives {len(tokens) - 256} merges, vocab_size {options.vocab_size} needs {merges}: "
                       f"use --vocab_size {len(tokens) + len(SPECIALS)} or less, or more text")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    vocabulary = out / "tokenizer.tiktoken"
    vocabulary.write_text("".join(lines))
    stage_done("learn merges")

    items = islice(read_items(files), options.max_docs or None)
    encode = partial(encode_chunk, vocabulary=(vocabulary, sha256(vocabulary)), threshold=options.filter)
    parts, chars = [], 0
    seen = Counter(read=0, too_short=0, too_long=0, filtered=0)
    with open(out / "tokens.part", "wb") as file:
        for ids, lengths, hashes, n, counts in parallel(encode, chunked(items), options.workers):
            ids.astype("<u2").tofile(file)
            parts.append((lengths, hashes))
            chars += n
            seen.update(counts)
            show(f"{seen['read']} documents, {chars / 1e6 / (time.monotonic() - started):.1f} MB/s")
    lengths, hashes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    stage_done("encode")

    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True  # of equal documents the first one stays
    held_out = hashes < options.val_share * 2.0**64
    kept = {"train": first & ~held_out, "val": first & held_out}
    rows = {name: pack(out / "tokens.part", out / f"{name}.part", lengths, kept[name], options.seq_len) for name in kept}
    seen.update(duplicate=int((~first).sum()), kept=int(first.sum()), val=int(kept["val"].sum()))
    (out / "tokens.part").unlink()
    if not rows["train"] or not rows["val"]:
        raise BadInput(f"too little text: {seen['read']} documents gave {rows['train']} rows of {options.seq_len} "
                       f"tokens to train on and {rows['val']} to validate; give more, or a larger --val_share or --filter")
    trained, found = (count_tokens(out / f"{name}.part", options.seq_len, options.vocab_size) for name in kept)
    log_probability = np.log((trained + 1) / (trained + 1).sum())
    unigram_nats = float(-(found * log_probability).sum() / found.sum())
    stops = np.array([token.count(b".") for token in tokens] + [0] * len(SPECIALS))
    for name, how in (("train", options.sort), ("val", "none")):  # the trainer takes the first rows of val.bin
        keys = row_keys(out / f"{name}.part", how, options.seq_len, log_probability, stops, options.seed)
        sort_rows(out / f"{name}.part", out / f"{name}.bin", keys, options.seq_len)
    stage_done("pack and order")

    meta = {
        "format": cram.DATA_FORMAT, "seq_len": options.seq_len, "vocab_size": options.vocab_size, "pattern": PATTERN,
        "special_tokens": {name: options.vocab_size - len(SPECIALS) + i for i, name in enumerate(SPECIALS)},
        "normalisation": "NFD, lower case, ASCII only, control characters dropped, white space folded",
        "rows": rows, "tokens": {name: n * options.seq_len for name, n in rows.items()}, "documents": dict(seen),
        "files": {name: {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)} for name in FILES},
        "unigram_nats": unigram_nats, "chars_per_token": chars / lengths.sum(), "seed": options.seed,
        "options": asdict(options), "seconds": seconds,
    }
    cram.write_whole(out / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    show("")
    d, tokens = seen, meta["tokens"]["train"] / 1e6
    print(f"""read       {d["read"]} documents of {len(files)} files
dropped    {d["too_short"]} too short, {d["too_long"]} too long, {d["filtered"]} that compress badly, {d["duplicate"]} duplicates
kept       {d["kept"]}, of which {d["val"]} to validate
tokens     {meta["chars_per_token"]:.2f} characters each, vocabulary {options.vocab_size}
rows       {rows["train"]} to train ({tokens:.1f} M tokens), {rows["val"]} to validate, order: {options.sort}
seconds    {", ".join(f"{name} {s:.1f}" for name, s in seconds.items())}; {time.monotonic() - started:.1f} in all
unigram    {unigram_nats:.3f} nats a token on the validation rows: the line that training must beat
wrote      {out}""")


if __name__ == "__main__":
    main()
