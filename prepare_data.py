"""Text to tokens: reads documents, learns a vocabulary, writes rows of tokens for cram.py.

    python prepare_data.py                                   # the embedded corpus -> data/docs
    python prepare_data.py --source texts/ a.jsonl --out data/mine
    python prepare_data.py --source c4 --max_docs 1000000    # the paper's first corpus, downloaded

Three passes: a byte-level BPE learnt on a sample, every document encoded, the rows ordered.
"""

import ast
import base64
import gc
import gzip
import hashlib
import heapq
import json
import math
import multiprocessing
import os
import re
import shlex
import socket
import sys
import time
import traceback
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from operator import add
from pathlib import Path
from typing import Literal

import numpy as np
import requests
import torch

import cram
from cram import PATTERN, SPECIALS, fail, fill_in, normalise, say, show

# ---- Settings ------------------------------------------------------------------------------------
CHUNK = 2**20  # bytes of raw text that travel to a worker together
MAX_BYTES = 2**24  # of a line; characters of a .txt that are read as one document
PIECE = re.compile(r"(?s).{1000,2000}?(?:\n|\Z)|.{1,2000}(?:\s|\Z)|.{1,2000}")  # line, word, cut
TEXT = re.compile(r"\.(txt|jsonl|json)(\.gz)?$", re.IGNORECASE)
FILES = ("train.bin", "val.bin", "tokenizer.tiktoken", "meta.json")
C4 = "https://huggingface.co/datasets/allenai/c4/resolve/1588ec454efa1a09f29cd18ddd04fe05fc8653a2"
C4_URL = C4 + "/en/c4-train.{:05}-of-01024.json.gz"  # at least 350,000 documents each


@dataclass
class Options:
    # docs (documentation of Python, numpy and torch on this machine), c4 (downloaded), or files
    # and folders: .txt (a document a file), .jsonl and .json ({"text": ...} a line), also as .gz
    source: list = field(default_factory=lambda: ["docs"])
    out: str = "auto"  # folder to write; auto: data/docs, data/c4, data/NAME of a file or folder
    vocab_size: int = "auto"  # bytes, merges and 4 specials; auto: 8192 for docs, else 32768 [4.4]
    seq_len: int = 128  # tokens in a row [4.2]
    filter: float = "auto"  # drop documents of so many tokens a character [4.4]; auto: 0.25 or more
    # rows: most full stops first, most likely tokens first (the paper's version 1), or shuffled
    sort: Literal["sentences", "prevalence", "none"] = "sentences"
    val_share: float = "auto"  # of documents, held out; auto: 0.05 of less than 20 MB, else 0.01
    max_docs: int = "auto"  # stop after so many documents; auto: all, of c4 a day's worth
    workers: int = "auto"  # processes; auto: one a CPU core. The files do not depend on it
    seed: int = 0  # of the order of rows where it is random


LIMITS = {"vocab_size": (261, 2**16), "seq_len": (8, 4096), "val_share": (0, 0.5)}


# ---- Finding the text ----------------------------------------------------------------------------
def download(url, path):
    """Fetches `url` to `path`, which appears when it is whole; path.part keeps what has come.
    A failure that may pass is followed by a wait, then goes on from there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(f"{path}.part")
    for wait in (1, 2, 4, 8, 16, 32, 60, 60, 60, 0):  # seconds
        if path.exists():
            return
        part.touch()
        start = part.stat().st_size
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as answer:
                status = answer.status_code
                problem = f"the server answered {status} {answer.reason}"
                # A page for people in place of the file comes from a proxy or a login.
                page = answer.headers.get("Content-Type", "").startswith("text/html")
                if status < 400 and not page:
                    # 206: the rest, 200: all. Of two processes each writes the same, in its place.
                    with open(part, "r+b" if status == 206 else "wb") as file:
                        whole = file.seek(start if status == 206 else 0)
                        whole += int(answer.headers.get("Content-Length", 0))
                        for block in answer.iter_content(2**16):
                            file.write(block)
                            show(f"{path.name} {file.tell() / 1e6:.0f} of {whole / 1e6:.0f} MB")
                    if part.stat().st_size == whole or "Content-Length" not in answer.headers:
                        os.replace(part, path)
                        return
                elif status == 416:  # what has come is the whole file, or not of it: once more
                    part.unlink()
                elif status < 500 and status != 429:
                    fail(f"{url}: {problem} and no file: check the address, or a proxy's login")
        except ValueError as error:
            fail(f"{url}: {error}: check the address, and the proxy that HTTPS_PROXY names")
        except (requests.RequestException, FileNotFoundError) as error:  # another has it whole
            problem = f"no connection, or it broke ({type(error).__name__})"
        say(f"{path.name}: {problem}; waiting {wait} s")
        time.sleep(wait)
    fail(f"{url}: {problem}. Check the network, or HTTPS_PROXY, and start again")


def find_files(options, folder):
    """The files behind --source, in a fixed order; downloads c4, collects docs in `folder`."""
    found, others = [], []
    if options.source == ["docs"]:
        skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
        for module in (os, np, torch):  # os lies in the folder of the standard library
            root = Path(module.__file__).parent
            inside = sorted(root.rglob("*.py"))
            found += [path for path in inside if not skip & set(path.relative_to(root).parts)]
        with open(folder / "docs.part", "w") as file:
            parts = [found[i : i + 50] for i in range(0, len(found), 50)]
            for texts in parallel(docstrings, parts, options.workers):
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        return [folder / "docs.part"]
    if options.source == ["c4"]:
        for i in range(min(1024, math.ceil(options.max_docs / 350_000))):
            url = C4_URL.format(i)
            found.append(Path("data/downloads") / url.rpartition("/")[2])
            download(url, found[-1])
        return found
    for source in map(Path, options.source):
        before = len(found)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if path.is_file() and TEXT.search(path.name) and not hidden:
                found.append(path)
            elif path.is_symlink() or not path.is_dir() or not os.access(path, os.R_OK):
                others.append(path.name)
        if len(found) == before:
            fail(f"--source {source} is not there, or holds no .txt, .jsonl or .json (or .gz)")
    if others:
        say(f"passed over {len(others)} hidden or other files: {', '.join(others[:5])} ...")
    return found


def docstrings(paths):
    """The docstrings of Python files, and pydoc's table of topics: read, never imported."""
    gc.disable()  # a syntax tree is many objects that all stay: to look for garbage takes long
    waiting, texts = [], []
    for path in paths:
        with suppress(SyntaxError, ValueError):  # numpy and torch carry templates of Python
            waiting.append(ast.parse(path.read_bytes()))
        while waiting:
            node = waiting.pop()
            texts.append(ast.get_docstring(node))
            for child in node.body:
                if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    waiting.append(child)
                value = getattr(child, "value", None)
                if isinstance(value, ast.Dict) and len(value.values) > 50:  # pydoc_data.topics
                    texts += [getattr(topic, "value", None) for topic in value.values]
    gc.enable()
    return [text for text in texts if isinstance(text, str)]  # None: without a docstring


# ---- Reading documents ---------------------------------------------------------------------------
def text_bytes(paths):
    """About how many bytes of text files hold; gzip makes English less than two fifths."""
    return sum(path.stat().st_size * (2.7 if path.suffix.lower() == ".gz" else 1) for path in paths)


def read_file(path):
    """Yields (length, text) of a .txt (of a very long one in parts, cut at lines) or each line."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        if path.name.lower().endswith((".txt", ".txt.gz")):
            with opened(path, "rt", encoding="utf-8-sig") as file:
                text = file.read(MAX_BYTES) + file.readline(CHUNK)
                yield len(text), text  # an empty one, too
                while text := file.read(MAX_BYTES) + file.readline(CHUNK):
                    yield len(text), text
            return
        with opened(path, "rb") as file:
            lines = iter(partial(file.readline, MAX_BYTES), b"")  # to the end of the file
            for number, line in enumerate(lines, 1):
                if line.isspace():
                    continue
                text = None
                with suppress(ValueError, LookupError, TypeError, RecursionError):
                    text = json.loads(line)["text"]
                if not isinstance(text, str):
                    found = f"{path}, line {number} is {line[:60].decode(errors='replace')!r}"
                    fail(f'{found}: expected one {{"text": "a string"}} in UTF-8, up to 16 MB')
                yield len(line), text
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        fail(f"{path} cannot be read as UTF-8 ({error}): convert, repair, delete or leave it out")


def read_chunks(paths, share=1.0, documents=math.inf):
    """Yields lists of texts, of about CHUNK bytes: what travels to a worker. share < 1: a sample,
    of every file its beginning; of small .txt files, which are read as a whole, some."""
    chunk, size = [], 0
    allowed = 0.0 if share < 1 else math.inf  # bytes
    for path in paths:
        allowed += share * text_bytes([path])  # what one file reads too much, the next has less
        for length, text in read_file(path):
            if allowed <= 0 or documents == 0:
                break
            chunk.append(text)
            documents -= 1
            allowed -= length
            size += 200 + length  # empty documents count as well
            if size >= CHUNK:
                yield chunk
                chunk, size = [], 0
    yield chunk  # what is left, perhaps nothing


# ---- Worker processes ----------------------------------------------------------------------------
def work(connection, parents, function):
    """What a worker does until None comes or its parent has gone: takes items, sends answers."""
    parents.close()  # a fork's copy of the other end, which would keep the connection open
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        for item in iter(connection.recv, None):
            connection.send(function(item))


def parallel(function, items, workers):
    """Yields function(item) in the order of `items`, dealt out in turn to `workers` processes."""
    if workers == 1:  # in this process: works where no other can be had
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    # Without threads and locks: a process that cannot start or dies is noticed at once.
    team = []  # (process, connection) each
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, ours, function), daemon=True)
            process.start()
            team.append((process, ours))
            theirs.close()  # so that the connection ends when the worker does
        for number, item in enumerate(chain(items, [None] * workers)):
            connection = team[number % workers][1]
            if number >= workers:  # it owes the answer to its item before
                yield connection.recv()
            connection.send(item)
    except (EOFError, OSError) as error:
        fail(f"a worker process failed ({str(error) or 'it was killed'}): use fewer with --workers")
    finally:
        for process, connection in team:
            connection.close()
            process.kill()  # nobody wants its answer
            process.join()


# ---- Learning the vocabulary ---------------------------------------------------------------------
def count_words(chunk):
    """(How often each word, a piece of PATTERN, occurs in a chunk's normalised text; documents)."""
    words = Counter()
    for text in chunk:
        words.update(re.findall(PATTERN, normalise(text)))
    return words, len(chunk)


def learn_bpe(word_counts, merges):
    """Byte-pair encoding (Sennrich et al., arXiv 1508.07909): 256 bytes, then a token each merge.

    word_counts: {ASCII word: occurrences}. Each step joins the most frequent pair of neighbouring
    tokens, of equals the one with the smallest ids; a pair seen once is not worth a token."""
    tokens = [bytes([i]) for i in range(256)]
    known = {token: i for i, token in enumerate(tokens)}
    # A word is a string with a character for each token id, so that str.replace joins a pair.
    words = sorted(word_counts)
    times = [word_counts[word] for word in words]
    pairs, where = Counter(), defaultdict(list)  # occurrences; the words that hold or held it
    for i, word in enumerate(words):
        for pair in map(add, word, word[1:]):
            pairs[pair] += times[i]
            where[pair].append(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)  # the smallest first: most frequent, then smallest ids
    while len(tokens) < 256 + merges and heap:
        negative, pair = heapq.heappop(heap)
        if pairs[pair] != -negative:  # it has fallen: back to where the pair belongs now
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if pairs[pair] < 2:  # too little text for so many merges
            break
        # tiktoken knows a token by its bytes: another way to the same bytes is the same token.
        merged = b"".join(tokens[ord(part)] for part in pair)
        new = chr(known.setdefault(merged, len(tokens)))
        if ord(new) == len(tokens):
            tokens.append(merged)
        # The words that hold the pair lose their old pairs and gain the new ones.
        risen = set()
        for i in where.pop(pair):
            before, words[i] = words[i], words[i].replace(pair, new)
            if before != words[i]:  # else it has lost the pair before
                for old in map(add, before, before[1:]):
                    pairs[old] -= times[i]
                for now in map(add, words[i], words[i][1:]):
                    pairs[now] += times[i]
                    if new in now:  # a pair that may be new here
                        where[now].append(i)
                        risen.add(now)
        for pair in risen:
            heapq.heappush(heap, (-pairs[pair], pair))
    return tokens


def learn_vocabulary(paths, options):
    """(tokens of a BPE without the specials, about how many documents there are)."""
    share = min(1.0, 1e8 / (1 + text_bytes(paths)))  # some 100 MB are enough
    words, documents = Counter(), 0
    for more, number in parallel(count_words, read_chunks(paths, share), options.workers):
        words.update(more)
        documents += number
    tokens = learn_bpe(words, options.vocab_size - 256 - len(SPECIALS))
    most = len(tokens) + len(SPECIALS)
    if most < options.vocab_size:
        found = f"{documents} documents hold {len(words)} words of ASCII, all that is kept"
        enough = f"enough for --vocab_size {most}" if most > 260 else "too little for any"
        fail(f"{found}, {enough}: give more text")
    return tokens, documents / share


# ---- Encoding and ordering -----------------------------------------------------------------------
def encode_chunk(chunk, tokenizer, threshold, cut):
    """([(hash, tokens as bytes of uint16, [SEP] last)] of the documents that stay, counts)."""
    sep = tokenizer.encode_single_token("[SEP]")
    if cut:
        chunk = [piece for text in chunk for piece in PIECE.findall(text) or [""]]
    documents, seen = [], Counter(read=len(chunk))
    for text in chunk:
        text = normalise(text)
        if len(text) < 20:  # teaches nothing about context
            seen["too_short"] += 1
            continue
        ids = tokenizer.encode_to_numpy(text, disallowed_special=())  # no special from text
        if len(ids) >= threshold * len(text):  # compresses badly: numbers, code, other languages
            seen["filtered"] += 1
            continue
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        tokens = np.append(ids, sep).astype("<u2").tobytes()
        documents.append((int.from_bytes(digest, "little"), tokens))
    return documents, seen


def encode(paths, tokenizer, cut, options, folder):
    """Writes the tokens of the documents that stay to train.part and val.part; returns counts."""
    function = partial(encode_chunk, tokenizer=tokenizer, threshold=options.filter, cut=cut)
    chunks = read_chunks(paths, documents=options.max_docs)
    seen, known = Counter(read=0, too_short=0, filtered=0, duplicate=0, kept=0), set()
    with open(folder / "train.part", "wb") as train, open(folder / "val.part", "wb") as val:
        for documents, counts in parallel(function, chunks, options.workers):
            seen.update(counts)
            for number, tokens in documents:
                if number in known:
                    seen["duplicate"] += 1
                    continue
                known.add(number)
                # Hashes are spread evenly over 64 bits: they decide on the side of the split.
                held_out = number < options.val_share * 2.0**64
                (val if held_out else train).write(tokens)
            show(f"encoded {seen['read']} documents")
    seen["kept"] = len(known)
    return seen


def sort_rows(rows, target, score, rng=None, most=2**21):
    """Writes the rows (R, S) to `target`, those with the smallest sum of the score (V,) of their
    tokens first; equal ones in their order, or shuffled by rng. Holds `most` rows in memory."""
    blocks = np.array_split(rows, 1 + len(rows) // 2**14)
    keys = np.concatenate([score[block].sum(1, dtype=np.float32) for block in blocks])
    if rng is not None:  # scores are then whole numbers: this shuffles equal ones only
        keys = keys + rng.random(len(keys))
    order = np.argsort(keys, kind="stable")
    # For each part of the result it goes through all rows in the order of the disk.
    with open(target, "wb") as file:
        for i in range(0, len(order), most):
            part = order[i : i + most]  # numbers of rows, in the order asked for
            on_disk = np.sort(part)
            rows[on_disk][np.searchsorted(on_disk, part)].tofile(file)


# ---- From the source to the folder ---------------------------------------------------------------
def prepare(options, folder):
    """The three passes, from the source to the files in `folder`."""
    paths = find_files(options, folder)
    tokens, total = learn_vocabulary(paths, options)
    mean = text_bytes(paths) / total  # bytes of a document
    # A small text needs a larger share, or validation is noise.
    fill_in(options, val_share=0.05 if mean * min(total, options.max_docs) < 2e7 else 0.01)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))  # tiktoken's own format
    tokenizer = cram.load_tokenizer("".join(lines), PATTERN)

    # A single book, too, has something to hold out: some of its pieces.
    cut = min(total, options.max_docs) < 100 or mean > 8e6
    seen = encode(paths, tokenizer, cut, options, folder)
    fates = ", ".join(f"{number} {fate}" for fate, number in seen.items())
    say(f"{'pieces    ' if cut else 'documents '} {fates}")

    rows, counts = {}, {}  # of each split: rows of tokens, how often each token occurs in them
    for split in ("train", "val"):
        path = folder / f"{split}.part"
        number = path.stat().st_size // 2 // options.seq_len  # the last, short row is dropped
        if number == 0:
            fail(f"{split} has no row: give more text, or other --val_share, --filter or --seq_len")
        rows[split] = np.memmap(path, "<u2", "r", shape=(number, options.seq_len))
        counts[split] = np.zeros(options.vocab_size, np.int64)
        for block in np.array_split(rows[split], 1 + number // 2**14):
            counts[split] += np.bincount(block.ravel(), minlength=options.vocab_size)
    # The loss of guessing by how often a token occurs is what training has to beat.
    log_probability = np.log((counts["train"] + 1) / (counts["train"] + 1).sum())
    unigram_nats = -float((counts["val"] * log_probability).sum() / counts["val"].sum())
    stops = np.array([token.count(b".") for token in tokens] + [0] * len(SPECIALS))
    scores = {"prevalence": -log_probability, "sentences": -stops, "none": 0 * stops}
    for split, how in (("train", options.sort), ("val", "none")):  # cram.py reads val's beginning
        rng = None if how == "prevalence" else np.random.default_rng(options.seed)
        sort_rows(rows[split], folder / f"{split}.bin", scores[how], rng)
    sizes = {split: len(rows[split]) for split in rows}
    del rows, block  # Windows deletes no file that is mapped
    for path in folder.glob("*.part"):
        path.unlink()
    write_manifest(options, folder, sizes, seen, unigram_nats)
    say(f"rows       {sizes['train']} and {sizes['val']} held out, unigram {unigram_nats:.3f} nats")


def sha256(path):
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(options, folder, sizes, seen, unigram_nats):
    """Writes meta.json: what cram.py has to know, and how the files can be made again."""
    files = {}
    for path in map(folder.joinpath, FILES[:3]):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    meta = {
        "format": cram.DATA_FORMAT,
        "seq_len": options.seq_len,
        "vocab_size": options.vocab_size,
        "special_tokens": {name: options.vocab_size - 4 + i for i, name in enumerate(SPECIALS)},
        "pattern": PATTERN,
        "normalisation": "NFD, lower case, ASCII only, no control characters, white space folded",
        "rows": sizes,
        "tokens": {split: n * options.seq_len for split, n in sizes.items()},
        "files": files,
        "documents": seen,
        "unigram_nats": unigram_nats,
        "options": asdict(options),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def remove(part):
    """Deletes a folder that a preparation wrote: of the files in it those of our names."""
    for path in part.glob("*"):
        if path.name in FILES or path.suffix == ".part":
            path.unlink()
    with suppress(OSError):  # it holds something else
        part.rmdir()


def begin(target):
    """A new folder beside `target`; removes what preparations that were killed have left there."""
    if target == Path.cwd():  # it would be replaced under the feet of the shell
        fail("--out is the folder you are in: name another, as in --out data/mine")
    with suppress(FileNotFoundError):
        target.rmdir()  # an empty folder is as good as none; another is refused here
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = f".{target.name}.{socket.gethostname()}-"
    for path in target.parent.glob(".*-*.part"):
        pid = path.stem.removeprefix(ours)
        if pid.isdecimal() and hasattr(os, "getpgid"):  # Windows cannot tell who is running
            try:
                os.getpgid(int(pid))
            except ProcessLookupError:
                remove(path)
                say(f"removed    {path}, which a preparation that was stopped had left")
    part = target.parent / f"{ours}{os.getpid()}.part"
    part.mkdir(exist_ok=True)  # else it is of one that is no more and had our number
    return part


def main(argv):
    options = Options(**cram.parse_flags(Options, argv, __doc__, LIMITS))
    first, *others = options.source
    if others and {"docs", "c4"} & set(options.source):  # they are words, not paths
        fail("--source docs and c4 stand alone: for files of that name write ./docs, and --out")
    name = Path(first).resolve().name.strip(".").partition(".")[0]  # of a.jsonl.gz: a
    fill_in(options, out=f"data/{name or 'text'}", vocab_size=8192 if first == "docs" else 32768)
    halvings = max(0, 15 - math.log2(options.vocab_size))  # from the paper's vocabulary [4.4]
    fill_in(options, filter=0.25 + 0.007 * halvings**2)  # drops about as many of the documents
    fill_in(options, workers=os.cpu_count() or 1, max_docs=21_000_000 if first == "c4" else 10**9)
    try:
        part = begin(Path(options.out).resolve())
        try:
            prepare(options, part)
            os.rename(part, Path(options.out).resolve())  # from here on it is there, and whole
        finally:  # after a mistake, Ctrl-C or a full disk
            if sys.exception():  # its frames hold maps: Windows deletes no file that is mapped
                traceback.clear_frames(sys.exception().__traceback__)
            remove(part)
    except OSError as error:
        fail(f"{error}: nothing was written to {options.out}; choose another --out, or free space")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    say(f"wrote      {options.out}: python cram.py --data {shlex.quote(options.out)}")


if __name__ == "__main__":
    main(sys.argv[1:])
