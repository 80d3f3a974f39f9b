"""Text to tokens: reads documents, learns a vocabulary, and writes rows of token ids that cram.py trains on.

    python prepare_data.py                                          # the embedded corpus -> data/docs
    python prepare_data.py --source my_texts/ notes.jsonl --out data/mine
    python prepare_data.py --source c4 --max_docs 1000000           # the paper's corpus, downloaded

Time, memory, tokens and disk: README.md, "Your own text". The paper's budget does not count this work (its rule 4), so
what is done here is free: which text is kept, how it is cut into tokens, and in which order a model sees it.

Three passes: count words in a sample and learn the merges of a byte-level BPE; encode every document; order the rows.
Text and tokens stream through: only a few numbers per document and per row are held in memory. A command given again
after a kill starts over: downloads are kept, parts of them too, but nothing that was encoded.
"""

import ast
import base64
import gzip
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import chain, islice, pairwise
from operator import add
from pathlib import Path

import numpy as np
import requests
import tiktoken

import cram
from cram import FILES, SPECIALS, fail, opt, parse_flags, sha256

CHUNK = 2**20  # bytes of raw text that travel to a worker together
MIN_CHARS = 20  # a shorter document teaches nothing about context
MAX_BYTES = 2**24  # a longer line is a damaged file or a dump: it is counted, and never held in memory
BPE_BYTES = 1e8  # of text on which the merges are learnt: the first part of every file of lines, and some of the .txt
KINDS = (".txt", ".jsonl", ".json.gz", ".jsonl.gz")
C4_URL = ("https://huggingface.co/datasets/allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
          "c4-train.{:05}-of-01024.json.gz")
C4_SHARD_DOCS, C4_DAY = 350_000, 21_000_000  # documents in a shard, at least; and for a day of training
DOWNLOADS = Path("data/downloads")

@dataclass
class Options:
    """What prepare_data.py can be told; all of it is written into the manifest."""
    source: tuple = opt(("docs",), "docs (documentation of Python, numpy and torch on this machine), c4 (downloaded), or files "
                        'and folders: .txt (a document a file), .jsonl, .json.gz, .jsonl.gz ({"text": ...} a line)',
                        group="text in, tokens out")
    out: str = opt("", "folder to write; empty: data/docs, data/c4, or data/NAME for a file or folder NAME")
    vocab_size: int = opt(0, "256 bytes, merges and 4 specials; 0: 8192 for docs, else 32768 [4.4]", 0, 2**16)
    seq_len: int = opt(128, "tokens in a row [4.2]", 8, 4096)
    filter: float = opt(0.3, "drop documents of at least so many tokens a character [4.4]", 0.001, 1000)
    sort: str = opt("prevalence", "order of the rows: prevalence (most likely first, by mean unigram log-probability), "
                    "sentences (most full stops first) or none (shuffled) [4.4]", "prevalence", "sentences", "none")
    val_share: float = opt(0.0, "share of the documents held out for validation; 0: 0.05 for docs, else 0.01", 0, 0.5)
    max_docs: int = opt(0, "stop after so many documents; 0: all, or a day's worth of c4", 0, 2**40)
    workers: int = opt(0, "processes; 0: one a CPU core. The files do not depend on it", 0, 1024, group="how")
    seed: int = opt(0, "seed of the row order where it is random", 0, 2**31)

class BadInput(Exception):
    """A sentence about input that cannot be used; raised anywhere, also in a worker, shown to the user by main."""

def show(text):
    """A line on a terminal that the next one replaces; nothing in a log file."""
    if sys.stdout.isatty():
        print(f"\r{text[: os.get_terminal_size().columns - 1]}\033[K", end="", flush=True)

def check_options(options):
    """Fills in what depends on the source."""
    options.source = list(options.source)
    special = options.source[0] if options.source in (["docs"], ["c4"]) else None
    options.vocab_size = options.vocab_size or (8192 if special == "docs" else 32768)
    options.val_share = options.val_share or (0.05 if special == "docs" else 0.01)
    options.max_docs = options.max_docs or (C4_DAY if special == "c4" else 0)
    options.workers = options.workers or min(61, os.cpu_count() or 1)  # Windows allows no more
    options.out = options.out or f"data/{special or Path(options.source[0]).resolve().name.strip('.').split('.')[0]}"
    if options.vocab_size <= 256 + len(SPECIALS):
        fail(f"vocab_size is {options.vocab_size}: expected more than the 256 bytes and {len(SPECIALS)} specials")

def check_room(folder, need):
    """Stops where the disk of `folder` has less than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise BadInput(f"{folder} has {free / 1e9:.1f} GB free, about {need / 1e9:.1f} GB are needed: make room")

def download(url, path, tries=8):
    """Fetches `url` to `path`, which appears when it is whole; path.part keeps what a broken connection left.

    Goes on from there, waits and tries again on broken connections, 429 (as long as it says) and 5xx; raises BadInput
    after `tries` failures in a row, and on other answers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures, most, wait, problem = Path(f"{path}.part"), 0, -1, 0, ""
    while not path.exists():
        have = part.stat().st_size if part.exists() else 0
        failures, most = (0, have) if have > most else (failures + 1, most)
        if failures == tries:
            raise BadInput(f"{url} could not be downloaded: {problem}. Check the network and run the same command again: "
                           "what has arrived is kept")
        if wait:
            show("")
            print(f"{path.name}: {problem}; again in {wait} s", flush=True)
        time.sleep(wait)
        wait, headers = min(60, 2**failures), {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
                status, told = answer.status_code, answer.headers
                problem = f"the server answered {status} {answer.reason} {told.get('Content-Type', '')}"
                if status == 416:  # what we have is no beginning of this file
                    part.unlink(missing_ok=True)
                elif status == 429 or status >= 500:
                    wait = min(600, int(told["Retry-After"])) if told.get("Retry-After", "").isdigit() else wait
                elif status >= 400 or told.get("Content-Type", "").startswith("text/html"):
                    raise BadInput(f"{url}: {problem}. Check the address, or a proxy that asks for a login")
                else:
                    length = int(told.get("Content-Length", 0))
                    check_room(path.parent, length)
                    with open(part, "ab" if status == 206 else "wb") as file:  # 200: all of it, for Range was ignored
                        total = file.tell() + length
                        for block in answer.iter_content(2**16):
                            file.write(block)
                            show(f"{path.name} {file.tell() / 1e6:.0f} of {total / 1e6:.0f} MB")
                    if not length or part.stat().st_size == total:
                        os.replace(part, path)
                    problem = f"the connection closed before {length} bytes had come"
        except requests.RequestException as error:
            problem = f"no connection, or it broke ({type(error).__name__})"

def find_files(options, out):
    """The files behind --source, in a fixed order; downloads c4, and collects docs in a file in the folder `out`."""
    if options.source == ["docs"]:
        roots = [Path(module.__file__).parent for module in (os, np, cram.torch)]  # os: the standard library
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
        paths = [p for root in roots for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
        with open(out / "docs.part", "w") as file:
            for texts in parallel(docstrings, paths, options.workers):
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        return [out / "docs.part"]
    if options.source == ["c4"]:
        urls = [C4_URL.format(i) for i in range(min(1024, math.ceil(options.max_docs / C4_SHARD_DOCS)))]
        paths = [DOWNLOADS / url.rsplit("/", 1)[1] for url in urls]
        check_room(out, sum(1.3e9 if path.exists() else 1.6e9 for path in paths))  # with a shard, and without
        for url, path in zip(urls, paths, strict=True):
            download(url, path)
        return paths
    found = []
    for path in map(Path, options.source):
        paths = sorted(path.rglob("*")) if path.is_dir() else [path]
        inside = [p for p in paths if p.is_file() and p.name.endswith(KINDS)]
        if not inside:
            raise BadInput(f"{path} {'holds no text that is understood here' if path.exists() else 'does not exist'}: "
                           f"--source takes docs, c4, or {', '.join(KINDS)} files and folders of them")
        found += inside
    return found

def docstrings(path):
    """The documentation in a Python file, read without importing it: docstrings, and pydoc's table of topics."""
    try:
        waiting, texts = [ast.parse(path.read_bytes())], []
    except (SyntaxError, ValueError):
        return []  # numpy and torch carry templates that are no Python yet
    while waiting:
        node = waiting.pop()
        texts.append(ast.get_docstring(node))
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                waiting.append(child)
            elif isinstance(getattr(child, "value", None), ast.Dict) and len(child.value.values) > 50:
                texts += [getattr(value, "value", None) for value in child.value.values]  # pydoc_data.topics
    return [text for text in texts if isinstance(text, str)]

def text_bytes(path):
    """About how many bytes of text a file holds; gzip makes English a bit smaller than two fifths."""
    return path.stat().st_size * (2.7 if path.suffix == ".gz" else 1)

def read_items(paths, share=1.0):
    """Yields (where, raw bytes) for each line of a file, a .txt as a whole, or cut at line ends where it is very long.

    Raw is None for a line over MAX_BYTES, which is not read into memory; blank lines are passed over. share < 1 gives a
    sample: the first part of each file, but of the short .txt some, evenly, as a whole.
    """
    for i, path in enumerate(paths):
        txt, number = path.suffix == ".txt", 0
        try:
            whole = txt and path.stat().st_size <= MAX_BYTES
            if whole and int((i + 1) * share) == int(i * share):
                continue
            left = math.inf if whole or share == 1 else share * text_bytes(path)
            size = MAX_BYTES if whole else CHUNK if txt else 0  # and to the line's end
            with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
                while left > 0 and (raw := file.read(size) + file.readline(MAX_BYTES)):
                    end, left, number = raw, left - len(raw), number + 1
                    while not end.endswith(b"\n") and (end := file.readline(MAX_BYTES)):
                        raw = None
                    if txt or raw is None or not raw.isspace():
                        yield str(path) if txt else f"{path}, line {number}", raw
        except (OSError, EOFError, zlib.error) as error:
            raise BadInput(f"{path} cannot be read ({error}): repair or delete it (c4 will be fetched again), or leave it out of --source") from error

def chunked(items):
    """Lists of items of about CHUNK bytes, to travel to a worker together."""
    chunk, size = [], 0
    for item in items:
        chunk.append(item)
        size += 200 + len(item[1] or b"")
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk

def documents(chunk):
    """Yields the texts of a chunk, None for an item that is too long; raises BadInput for one that is no text."""
    for where, raw in chunk:
        try:
            text = (raw or b"").decode().removeprefix("\ufeff")  # the mark with which some editors begin a file
            if not where.endswith(".txt") and text.strip():
                text = json.loads(text)["text"] + ""  # a text that is no string is a TypeError too
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f'{where} is no UTF-8 text, or not JSON with a "text" ({type(error).__name__}: {error}): expected '
                           '.txt in UTF-8, or one {"text": "..."} object a line') from error
        if raw is None:
            yield None
        elif text.strip() or where.endswith(".txt"):
            yield text

def end_with_parent():
    """Makes a worker end when the process that started it is gone, be it by kill -9."""
    threading.Thread(target=lambda: multiprocessing.parent_process().join() or os._exit(1), daemon=True).start()

def parallel(function, items, workers):
    """Yields function(item) in the order of `items`, computed by `workers` processes, a few items ahead at most."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(workers, context, end_with_parent) as pool:
        window = deque()
        for item in items:
            window.append(pool.submit(function, item))
            if len(window) > 4 * workers:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()

# What may become a token of the normalised text: a contraction, a word, up to three digits or other characters, each
# with the space before it. Without bounds a million times the same letter would be one word, and take for ever.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?[a-z]{1,32}| ?[0-9]{1,3}| ?[^ a-z0-9]{1,32}| +"""
CONTROL = bytes(c for c in (*range(32), 127) if not chr(c).isspace())

def normalise(text):
    """The paper's normalisation [4.4]: NFD, lower case, no accents, ASCII only, runs of white space folded."""
    if not text.isascii():  # NFD cuts an accent off its letter and split() knows all spaces; then ASCII drops the rest
        text = " ".join(unicodedata.normalize("NFD", text).split())
    return " ".join(text.lower().encode("ascii", "ignore").translate(None, CONTROL).decode().split())

def load_tokenizer(text, pattern=PATTERN):
    """A tiktoken.Encoding from the text of a tokenizer.tiktoken file: base64 token, space, rank on each line."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, text.splitlines())}
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding("cram", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)

def count_words(chunk):
    """How often each word (a piece of PATTERN) occurs in a chunk's normalised text."""
    return Counter(chain.from_iterable(re.findall(PATTERN, normalise(text or "")) for text in documents(chunk)))

def learn_bpe(word_counts, merges):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): the tokens as bytes, 256 single bytes and then a merge each.

    word_counts: {ASCII word: occurrences}. Each step joins the most frequent pair of neighbouring tokens; among equals
    the pair with the smaller token ids, the first of the two first. A pair seen only once is not worth a token. A word
    is a string with a character for each token id, so str.replace joins a pair; only words that hold it are touched.
    """
    tokens = [bytes([i]) for i in range(256)]
    known = {token: i for i, token in enumerate(tokens)}
    words = sorted(word_counts)
    times = [word_counts[word] for word in words]
    count, where = Counter(), defaultdict(list)  # of each pair: occurrences, and the words that hold it or once did
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            count[pair] += times[i]
            where[pair].append(i)
    heap = [(-n, pair) for pair, n in count.items()]
    heapq.heapify(heap)
    while len(tokens) < 256 + merges and heap:
        negative, pair = heapq.heappop(heap)
        if count[pair] != -negative:  # it has changed since: count falls silently, so put it back where it belongs now
            heapq.heappush(heap, (-count[pair], pair))
            continue
        if count[pair] < 2:
            break
        merged = b"".join(tokens[ord(part)] for part in pair)
        # tiktoken knows a token by its bytes alone, so another way to the same bytes is the same token.
        new = chr(known.setdefault(merged, len(tokens)))
        if ord(new) == len(tokens):
            tokens.append(merged)
        risen = set()
        for i in where.pop(pair):
            before, words[i] = words[i], words[i].replace(pair, new)
            if before != words[i]:
                for old in map(add, before, before[1:]):
                    count[old] -= times[i]
                for now in map(add, words[i], words[i][1:]):
                    count[now] += times[i]
                    if new in now:
                        where[now].append(i)
                        risen.add(now)
        for pair in risen:
            heapq.heappush(heap, (-count[pair], pair))
    return tokens

def learn_vocabulary(paths, options):
    """The tokens of a BPE learnt on about BPE_BYTES of the text, without the specials."""
    share = min(1.0, BPE_BYTES / (1 + sum(map(text_bytes, paths))))
    words, merges = Counter(), options.vocab_size - 256 - len(SPECIALS)
    for counts in parallel(count_words, chunked(read_items(paths, share)), options.workers):
        words.update(counts)
    tokens = learn_bpe(words, merges)
    if len(tokens) < 256 + merges:
        raise BadInput(f"the text of {len(paths)} files, {paths[0]} the first, gives {len(tokens) - 256} merges; vocab_size "
                       f"{options.vocab_size} needs {merges}: use --vocab_size {len(tokens) + len(SPECIALS)} or less, or more text")
    return tokens

tokenizer_of = lru_cache(maxsize=1)(load_tokenizer)  # made once in each process

def encode_chunk(chunk, vocabulary, threshold):
    """A chunk's documents: (tokens, [SEP] after each document; lengths, [SEP] included; hashes; counts).

    Dropped documents leave only a count behind. The hash of the normalised text decides on which side of the split a
    document stands, and whether it is a duplicate.
    """
    tokenizer, tokens, lengths, hashes, counts = tokenizer_of(vocabulary), [], [], [], Counter()
    for text in documents(chunk):
        counts["read"] += 1
        if text is None:
            counts["too_long"] += 1
        elif len(text := normalise(text)) < MIN_CHARS:
            counts["too_short"] += 1
        elif len(ids := tokenizer.encode_to_numpy(text, disallowed_special=())) >= threshold * len(text):
            counts["filtered"] += 1
        else:
            counts["chars"] += len(text)
            tokens.append(np.append(ids, tokenizer.encode_single_token("[SEP]")))
            lengths.append(len(ids) + 1)
            hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
    return np.concatenate([np.zeros(0, int), *tokens]).astype("<u2"), np.array(lengths, np.int64), np.array(hashes, np.uint64), counts

def read_rows(path, lengths, keep, seq_len):
    """Yields the tokens of the documents to keep as rows (n, seq_len), some ten thousand at a time.

    lengths: for each chunk in the file, those of its documents; keep: bool (documents,).
    """
    rest = np.zeros(0, "<u2")
    with open(path, "rb") as file:
        for i in range(0, len(lengths), 8):
            n = np.concatenate(lengths[i : i + 8])
            kept, keep = np.repeat(keep[: len(n)], n), keep[len(n) :]
            tokens = np.concatenate([rest, np.fromfile(file, "<u2", len(kept))[kept]])
            rows, rest = np.split(tokens, [len(tokens) // seq_len * seq_len])
            yield rows.reshape(-1, seq_len)

def sort_rows(blocks, target, score, rng=None):
    """Writes the rows (n, S) of all blocks() to `target`, those with the smallest sum of the score (V,) of tokens first.

    Equal ones keep their order, or are shuffled by rng. Each row goes to a file for a range of sums, of about 64 MB;
    then each such file is sorted in memory.
    """
    keys = []
    for rows in blocks():
        keys.append(np.float32(score[rows].sum(1) + (rng.random(len(rows)) if rng else 0)))
    count = 1 + sum(map(len, keys)) * rows.shape[1] // (32 * CHUNK)
    bounds = np.quantile(np.concatenate([k[::50] for k in keys]), np.arange(1, count) / count)
    into = [np.searchsorted(bounds, k).astype(np.uint16) for k in keys]
    parts = [Path(f"{target}.{i}.part") for i in range(count)]
    for part in parts:
        part.write_bytes(b"")  # a killed run may have left one
    for rows, to in zip(blocks(), into, strict=True):
        for i in np.unique(to):
            with open(parts[i], "ab") as file:
                rows[to == i].tofile(file)
    with open(target, "wb") as file:
        for i, part in enumerate(parts):
            order = np.argsort(np.concatenate([k[to == i] for k, to in zip(keys, into, strict=True)]), kind="stable")
            np.fromfile(part, "<u2").reshape(-1, rows.shape[1])[order].tofile(file)
            part.unlink()

def hold(path):
    """The file `path`, locked until it is closed or this process ends, be it by kill -9; raises BadInput where another has it."""
    file = open(path, "a")
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise BadInput(f"{path.parent} is being prepared by another process: wait until it is done, then try again") from error
    return file

def release(held, files):
    """Removes the files, and last the one that hold() gave: Windows does so only once it is closed."""
    mine = Path(held.name)
    for path in set(files) - {mine}:
        path.unlink()
    held.close()
    mine.unlink(missing_ok=True)

def main(argv=None):
    """Prepares a data folder; the manifest meta.json is written last, so a folder without it is not finished."""
    options = Options(**parse_flags(Options, sys.argv[1:] if argv is None else argv, __doc__))
    check_options(options)
    out = Path(options.out)
    mine, held = out / "unfinished.part", None  # marks a folder that a run of this script may write to, one at a time
    try:
        if out.exists() and any(out.iterdir()) and not mine.exists():
            raise BadInput(f"{out} is a finished data folder already, or holds other files: delete it, or choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        held = hold(mine)
        prepare(options, out)
        release(held, out.glob("*.part"))  # also those of runs that were killed
    except BaseException as error:
        if isinstance(error, (BadInput, OSError, KeyboardInterrupt, BrokenExecutor)):
            error.__traceback__ = None  # its frames keep files open
        if held:
            release(held, out.iterdir())
            with suppress(OSError):  # a link or a mount point stays
                out.rmdir()
        if isinstance(error, (BadInput, OSError)):
            fail(str(error))
        if isinstance(error, (KeyboardInterrupt, BrokenExecutor)):
            fail(f"stopped ({type(error).__name__}): nothing is left in {out}; run the same command again")
        raise

def prepare(options, out):
    """The three passes, from the source to the files of the folder `out`."""
    times = {"": time.monotonic()}  # at which a stage was done
    seq_len, vocab_size = options.seq_len, options.vocab_size
    paths = find_files(options, out)
    check_room(out, 1.5 * sum(map(text_bytes, paths)))
    times["find"] = time.monotonic()
    tokens = learn_vocabulary(paths, options)
    vocabulary = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (out / "tokenizer.tiktoken").write_text(vocabulary)
    times["learn"] = time.monotonic()

    items = islice(read_items(paths), options.max_docs or None)
    encode = partial(encode_chunk, vocabulary=vocabulary, threshold=options.filter)
    parts, seen = [], Counter(read=0, too_short=0, too_long=0, filtered=0, chars=0)
    with open(out / "tokens.part", "wb") as file:
        for ids, lengths, hashes, counts in parallel(encode, chunked(items), options.workers):
            ids.tofile(file)
            parts.append((lengths, hashes))
            seen.update(counts)
            show(f"{seen['read']} documents, {seen['chars'] / 1e6 / (time.monotonic() - times['learn']):.1f} MB/s")
    lengths, hashes = zip(*parts, strict=True)
    hashes = np.concatenate(hashes)
    times["encode"] = time.monotonic()

    first = np.zeros(len(hashes), bool)
    first[np.unique(hashes, return_index=True)[1]] = True  # of equal documents the first one stays
    held_out = hashes < options.val_share * 2.0**64
    kept = {"train": first & ~held_out, "val": first & held_out}
    blocks = {name: partial(read_rows, out / "tokens.part", lengths, keep, seq_len) for name, keep in kept.items()}
    count = {name: sum(np.bincount(rows.ravel(), minlength=vocab_size) for rows in blocks[name]()) for name in kept}
    rows = {name: int(count[name].sum()) // seq_len for name in kept}
    if not all(rows.values()):
        raise BadInput(f"too little text: {seen['read']} documents gave {rows['train']} rows of {seq_len} tokens to train on "
                       f"and {rows['val']} to validate; give more, or a larger --val_share or --filter")
    log_probability = np.log((count["train"] + 1) / (count["train"] + 1).sum())
    unigram_nats = float(-(count["val"] * log_probability).sum() / count["val"].sum())
    stops = np.array([token.count(b".") for token in tokens] + [0] * len(SPECIALS))
    for name, how in (("train", options.sort), ("val", "none")):  # the trainer takes the first rows of val.bin
        score = {"prevalence": -log_probability / seq_len, "sentences": -stops, "none": 0 * stops}[how]
        rng = None if how == "prevalence" else np.random.default_rng(options.seed)
        sort_rows(blocks[name], out / f"{name}.bin", score, rng)
    times["pack and order"] = time.monotonic()

    chars = seen.pop("chars")
    seconds = {name: round(end - start, 1) for (_, start), (name, end) in pairwise(times.items())}
    seen.update(duplicate=int((~first).sum()), kept=int(first.sum()), val=int(kept["val"].sum()))
    meta = {
        "format": cram.DATA_FORMAT, "seq_len": seq_len, "vocab_size": vocab_size, "pattern": PATTERN,
        "special_tokens": {name: vocab_size - len(SPECIALS) + i for i, name in enumerate(SPECIALS)},
        "normalisation": "NFD, lower case, ASCII only, control characters dropped, white space folded",
        "rows": rows, "tokens": {name: n * seq_len for name, n in rows.items()}, "documents": dict(seen),
        "files": {name: {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)} for name in FILES},
        "unigram_nats": unigram_nats, "chars_per_token": chars / int(sum(n.sum() for n in lengths)), "seed": options.seed,
        "options": asdict(options), "seconds": seconds,
    }
    cram.write_whole(out / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    show("")
    print(f"""read       {seen["read"]} documents, {chars / 1e6:.0f} MB after normalising
dropped    {seen["too_short"]} too short, {seen["too_long"]} too long, {seen["filtered"]} that compress badly, {seen["duplicate"]} duplicates
kept       {seen["kept"]}, of which {seen["val"]} to validate
tokens     {meta["chars_per_token"]:.2f} characters each, vocabulary {vocab_size}
rows       {rows["train"]} to train ({meta["tokens"]["train"] / 1e6:.1f} M tokens), {rows["val"]} to validate, order: {options.sort}
seconds    {", ".join(f"{name} {s:.1f}" for name, s in seconds.items())}; {sum(seconds.values()):.1f} in all
unigram    {unigram_nats:.3f} nats a token on the validation rows: the line that training must beat
wrote      {out}""")

if __name__ == "__main__":
    main()
