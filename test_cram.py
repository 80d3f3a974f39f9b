"""What the three scripts promise, checked offline on a CPU in about a minute: pytest

Each part is checked against something independent of it: a closed form, float64, a brute-force twin, worked numbers.
"""

import csv
import errno
import gzip
import http.server
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
import zipfile
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cram
import finetune_glue
import prepare_data

HERE = Path(__file__).parent
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


# ------------------------------------------------------------------------------------------------ helpers

ANIMALS = ["cat", "dog", "horse", "fox", "bear", "wolf", "duck", "goose"]
VERBS = ["sees", "hears", "likes", "follows", "feeds", "finds"]
PLACES = ["in the garden", "near the river", "behind the old house", "under a tree", "at the market"]


def story(rng, number):
    """A document of a few sentences with a rule in them: the same animal is named at both ends of a sentence."""
    sentences = []
    for _ in range(rng.randint(3, 9)):
        a, b = rng.sample(ANIMALS, 2)
        sentences.append(f"The {a} {rng.choice(VERBS)} the {b} {rng.choice(PLACES)}, says the {a}.")
    return f"Story number x{number:04}y. " + " ".join(sentences)


@pytest.fixture(scope="session")
def stories():
    rng = random.Random(0)
    return [story(rng, number) for number in range(400)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


PREPARE = ["--vocab_size", "380", "--seq_len", "32", "--workers", "1", "--val_share", "0.1", "--filter", "0.9"]


@pytest.fixture(scope="session")
def data(tmp_path_factory, stories):
    """A small data folder made from the stories."""
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "stories.jsonl", stories)
    prepare_data.main(["--source", str(source), "--out", str(folder / "stories"), *PREPARE])
    return folder / "stories"


SMALL = ["--width", "32", "--heads", "2", "--ffn_width", "64", "--layers", "2", "--dtype", "fp32", "--device", "cpu",
         "--micro_batch", "4", "--batch_size", "8", "--lr", "5e-3", "--val_rows", "32", "--log_every", "2"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """A finished run on the stories, of 300 steps."""
    out = tmp_path_factory.mktemp("out") / "run"
    cram.main(["--data", str(data), "--out", str(out), "--budget", "300steps", *SMALL])
    return out


def small_model(vocab_size=50, seq_len=16, **settings):
    torch.manual_seed(0)
    cfg = cram.make_config({"size": "tiny", "layers": 2, "width": 32, "heads": 2, "ffn_width": 64, **settings})
    return cram.Model(cfg, vocab_size, seq_len).eval(), cfg


def log_of(out):
    with open(Path(out) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def message(call, *args):
    """The sentence with which a call stops; it must be one line and an exit, not a traceback."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text, text
    return text


# ------------------------------------------------------------------------------------------- text to tokens


def test_normalise_is_the_papers():
    assert prepare_data.normalise("  Ça   va,\tNAÏVE Ångström \n\n “été” \x00ok…") == "ca va, naive angstrom ete ok"
    assert prepare_data.normalise("") == "" and prepare_data.normalise("日本") == ""


def brute_force_bpe(words, merges):
    """learn_bpe's rule with all pairs counted anew for each merge."""
    tokens = [bytes([i]) for i in range(256)]
    words = [[list(word.encode()), n] for word, n in words.items()]
    while len(tokens) < 256 + merges:
        count = Counter()
        for word, n in words:
            for pair in pairwise(word):
                count[pair] += n
        if not count or max(count.values()) < 2:
            break
        pair = min(count, key=lambda pair: (-count[pair], pair))
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in tokens:
            tokens.append(merged)
        for word, _ in words:
            for j in range(len(word) - 1):
                if tuple(word[j : j + 2]) == pair:
                    word[j : j + 2] = [tokens.index(merged)]
    return tokens


@pytest.mark.parametrize("seed", range(6))
def test_bpe_equals_its_brute_force_twin(seed):
    rng = random.Random(seed)
    alphabet = "abc" if seed % 2 else "ab"  # few letters: many ties, many runs such as aaaa
    words = Counter("".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(60))
    assert prepare_data.learn_bpe(words, 60) == brute_force_bpe(words, 60)


def test_bpe_by_hand():
    # Counts: (a, b) 4, (b, a) 2, (space, a) 2. After ab: (ab, ab) 2 and (space, ab) 2, of which 32 is the smaller id.
    tokens = prepare_data.learn_bpe({" abab": 2}, 3)
    assert tokens[256:] == [b"ab", b" ab", b" abab"]


def test_tokenizer_round_trip(data, stories):
    tokenizer = prepare_data.load_tokenizer((data / "tokenizer.tiktoken").read_text())
    assert tokenizer.n_vocab == 380
    for text in [*stories[:20], "it's 12345 (x+y)*z != [MASK] \\ ~ ``quoted''"]:
        text = prepare_data.normalise(text)
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 376  # a special never comes out of text, not even out of the letters [MASK]


def test_pattern_cuts_all_text_the_same_way_in_python_and_in_tiktoken(data):
    text = "don't  we'll 1234567 a_b -- x's 'tis ''' $%&  end"
    pieces = re.findall(prepare_data.PATTERN, text)
    assert "".join(pieces) == text
    tokenizer = prepare_data.load_tokenizer((data / "tokenizer.tiktoken").read_text())
    apart = [token for piece in pieces for token in tokenizer.encode_ordinary(piece)]
    assert tokenizer.encode_ordinary(text) == apart


def rows_as_text(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = prepare_data.load_tokenizer((folder / "tokenizer.tiktoken").read_text())
    rows = np.fromfile(folder / name, "<u2").reshape(-1, meta["seq_len"])
    return [tokenizer.decode(row.tolist()) for row in rows], rows


def test_train_and_val_share_no_document(data, stories):
    train, val = (set(re.findall(r"x(\d{4})y", " ".join(rows_as_text(data, name)[0]))) for name in ("train.bin", "val.bin"))
    assert len(val) > 20 and len(train) > 300
    assert not train & val
    meta = json.loads((data / "meta.json").read_text())
    assert meta["documents"]["kept"] == len(stories)


def test_rows_are_the_documents_joined_with_sep(tmp_path, stories):
    source = write_jsonl(tmp_path / "s.jsonl", stories)
    prepare_data.main(["--source", str(source), "--out", str(tmp_path / "d"), *PREPARE])
    tokenizer = prepare_data.load_tokenizer((tmp_path / "d/tokenizer.tiktoken").read_text())
    stream = []
    for text in stories:
        stream += [*tokenizer.encode_ordinary(prepare_data.normalise(text)), tokenizer.encode_single_token("[SEP]")]
    whole = np.array(stream, np.uint16).tobytes()
    _, rows = rows_as_text(tmp_path / "d", "val.bin")
    # A validation row is a piece of the stream of the validation documents; one inside a single document is also a
    # piece of the stream of all.
    inside = [row for row in rows if tokenizer.n_vocab - 2 not in row]
    assert inside and all(row.tobytes() in whole for row in inside)
    assert sum(int((rows_as_text(tmp_path / "d", n)[1] == tokenizer.n_vocab - 2).sum()) for n in ("train.bin", "val.bin")) >= 395


def test_rows_are_ordered_as_asked(tmp_path, stories):
    source = write_jsonl(tmp_path / "s.jsonl", stories)
    rows = {}
    for how in ("prevalence", "sentences", "none"):
        prepare_data.main(["--source", str(source), "--out", str(tmp_path / how), "--sort", how, *PREPARE])
        rows[how] = rows_as_text(tmp_path / how, "train.bin")[1]
    assert sorted(map(bytes, rows["prevalence"])) == sorted(map(bytes, rows["sentences"])) == sorted(map(bytes, rows["none"]))
    counts = np.bincount(rows["none"].ravel(), minlength=380).astype(np.float64) + 1
    scores = np.log(counts / counts.sum())[rows["prevalence"]].mean(1)
    assert (np.diff(scores) < 1e-5).all() and scores[0] > scores[-1]
    tokenizer = prepare_data.load_tokenizer((tmp_path / "none/tokenizer.tiktoken").read_text())
    stops = [tokenizer.decode(row.tolist()).count(".") for row in rows["sentences"]]
    assert stops == sorted(stops, reverse=True) and stops[0] > stops[-1]


def test_sorting_through_buckets_equals_sorting_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 64)  # 4 kB files instead of 64 MB
    rng = np.random.default_rng(0)
    rows, score = rng.integers(0, 500, (2000, 16), np.uint16), rng.integers(0, 9, 500)  # many equal sums
    prepare_data.sort_rows(lambda: iter(np.split(rows, [100, 100, 900])), tmp_path / "sorted", score)
    order = np.argsort(score[rows].sum(1), kind="stable")
    assert (np.fromfile(tmp_path / "sorted", np.uint16).reshape(-1, 16) == rows[order]).all()
    assert os.listdir(tmp_path) == ["sorted"]


def test_the_output_does_not_depend_on_the_workers(tmp_path, data, stories, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 4000)  # so that there is more than one chunk to share
    source = write_jsonl(tmp_path / "stories.jsonl", stories)
    prepare_data.main(["--source", str(source), "--out", str(tmp_path / "two"), *PREPARE, "--workers", "2"])
    for name in cram.FILES:
        assert (tmp_path / "two" / name).read_bytes() == (data / name).read_bytes()


def test_documents_are_dropped_and_counted(tmp_path, stories, capsys):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", [*stories, stories[3], stories[4].upper(), "too short", "q9#" * 100])  # two duplicates, one too short, one that stays in single characters
    with gzip.open(folder / "deep/b.json.gz", "wt") as file:
        file.write(json.dumps({"text": stories[5], "url": "http://x"}) + "\n\n")
    (folder / "c.txt").write_text("A text file is one document.\nIt may have many lines, and this one has two of them.")
    (folder / "ignored.md").write_text("not text that is read")
    (tmp_path / "gaps.jsonl").write_text((folder / "a.jsonl").read_text().replace("\n", "\n\n \n"))
    prepare_data.main(["--source", str(folder), "--out", str(tmp_path / "d"), *PREPARE[:-1], "0.8"])
    documents = json.loads((tmp_path / "d/meta.json").read_text())["documents"]
    assert documents["read"] == 406 and documents["too_short"] == 1 and documents["filtered"] == 1
    assert documents["duplicate"] == 3 and documents["kept"] == 401
    assert "406 documents, " in capsys.readouterr().out
    prepare_data.main(["--source", str(tmp_path / "gaps.jsonl"), "--out", str(tmp_path / "e"), "--max_docs", "300", *PREPARE])
    assert json.loads((tmp_path / "e/meta.json").read_text())["documents"]["read"] == 300  # blank lines are none


def test_the_sample_for_the_vocabulary_has_its_share_of_every_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_BYTES", 2000)
    monkeypatch.setattr(prepare_data, "CHUNK", 300)
    text = "".join(f"line {i} of a text\n" for i in range(400))
    for name, content in (("big.txt", text), ("lines.jsonl", text), *((f"short{i}.txt", text[:500]) for i in range(10))):
        (tmp_path / name).write_text(content)

    def sampled(share, *names):
        items = prepare_data.read_items([tmp_path / name for name in names], share)
        return b"".join(raw for _, raw in items).decode()

    for name in ("big.txt", "lines.jsonl"):
        assert sampled(1.0, name) == text and sampled(0.3, name) == text[: len(sampled(0.3, name))]
        assert 0.3 * len(text) <= len(sampled(0.3, name)) <= 0.3 * len(text) + 320  # to the end of a piece, or a line
    assert sampled(0.3, *(f"short{i}.txt" for i in range(10))) == 3 * text[:500]
    monkeypatch.setattr(prepare_data, "BPE_BYTES", len(text) // 2)
    options = prepare_data.Options(vocab_size=270, workers=1)
    assert len(prepare_data.learn_vocabulary([tmp_path / "big.txt"], options)) == 266


def test_unigram_line_of_the_manifest(data):
    _, train = rows_as_text(data, "train.bin")
    _, val = rows_as_text(data, "val.bin")
    counts = np.bincount(train.ravel(), minlength=380) + 1
    expected = -np.log(counts / counts.sum())[val].mean()
    assert json.loads((data / "meta.json").read_text())["unigram_nats"] == pytest.approx(expected, abs=1e-9)


def test_docstrings_are_read_without_importing(tmp_path):
    code = '"""Top."""\nraise SystemExit\nclass A:\n    """A class.\n\n    More."""\n    def f(self):\n        "Inner."\n'
    (tmp_path / "code.py").write_text(code)
    assert sorted(prepare_data.docstrings(tmp_path / "code.py")) == ["A class.\n\nMore.", "Inner.", "Top."]
    for other in (b"print 'python 2'", b"'no UTF-8: \xe9'", b"NUL = '\0'"):
        (tmp_path / "code.py").write_bytes(other)
        assert prepare_data.docstrings(tmp_path / "code.py") == []


# ------------------------------------------------------------------------------- downloads, hostile input


@pytest.fixture
def server(monkeypatch):
    """A local HTTP server that plays a list of answers, one a request, the last one for ever; and what it was asked."""
    rng = random.Random(0)
    texts = [f"document {i} of a shard, with {rng.randbytes(100).hex()}" for i in range(3000)]
    content = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    plan, asked, waits = [], [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            answer = plan.pop(0) if len(plan) > 1 else plan[0]
            start = int(asked[-1][6:-1]) if asked[-1] and answer != "no range" else 0
            if answer in (404, 416, 429, 503):
                self.send_response(answer)
                self.send_header("Retry-After", "7")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", "text/html" if answer == "html" else "application/gzip")
            if answer != "no length":
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            rest = content[start:]
            self.wfile.write(rest[: len(rest) // 2] if answer == "drop" else rest)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare_data, "C4_URL", f"http://127.0.0.1:{httpd.server_port}/c4-{{:05}}.json.gz")
    monkeypatch.setattr(prepare_data.time, "sleep", waits.append)
    yield plan, asked, waits, content
    httpd.shutdown()


@pytest.mark.parametrize("answers, ranges", [
    (["whole"], [None]),
    (["drop", "drop", "whole"], [None, "half", "more"]),  # goes on where it broke off
    (["drop", 416, "whole"], [None, "half", None]),  # what had come is no start of the file: taken from the start
    (["drop", "no range"], [None, "half"]),  # sends all of it again: taken from the start
    ([429, 503, "whole"], [None, None, None]),
    (["no length"], [None]),
])  # fmt: skip
def test_downloads_arrive_whole(tmp_path, server, answers, ranges):
    plan, asked, waits, content = server
    plan += answers
    path = tmp_path / "deep/file.json.gz"
    prepare_data.download(prepare_data.C4_URL.format(3), path)
    assert path.read_bytes() == content and [a != "bytes=0-" for a in asked] == [bool(r) for r in ranges]
    assert os.listdir(path.parent) == ["file.json.gz"]
    if 429 in answers:
        assert waits == [0, 7, 7]  # as long as the server asked for
    prepare_data.download(prepare_data.C4_URL.format(3), path)  # there already: no request
    assert len(asked) == len(answers)


def test_downloads_that_fail_say_so(tmp_path, server, capsys):
    plan, asked, waits, _ = server
    for answer, expected in ((404, "answered 404"), ("html", "answered 200 OK text/html"), (503, "could not be downloaded: the server answered 503")):
        plan[:] = [answer]
        with pytest.raises(prepare_data.BadInput, match=expected):
            prepare_data.download(prepare_data.C4_URL.format(1), tmp_path / "x.gz")
    assert len(asked) == 1 + 1 + 8 and list(tmp_path.iterdir()) == []
    with pytest.raises(prepare_data.BadInput, match="no connection"):
        prepare_data.download("http://127.0.0.1:9/nothing", tmp_path / "x.gz")
    assert waits[-8:] == [0, 1, 2, 4, 8, 16, 32, 60]  # each wait longer than the last, to a minute
    assert "x.gz: no connection, or it broke (ConnectionError); again in 60 s" in capsys.readouterr().out


def test_c4_is_downloaded_and_prepared(tmp_path, server, monkeypatch):
    plan, asked, _, _ = server
    plan += ["drop", "whole"]
    monkeypatch.setattr(prepare_data, "DOWNLOADS", tmp_path / "got")
    flags = ["--source", "c4", "--vocab_size", "300", "--seq_len", "32",
             "--workers", "1", "--filter", "5"]
    prepare_data.main([*flags, "--max_docs", "2000", "--out", str(tmp_path / "c4")])
    assert json.loads((tmp_path / "c4/meta.json").read_text())["documents"]["read"] == 2000
    prepare_data.main([*flags, "--max_docs", "2500", "--out", str(tmp_path / "more")])
    assert len(asked) == 2  # the shard was kept
    cram.load_data(tmp_path / "more")


def locked(path, *mode):
    """open, for somebody who may not read secret.txt."""
    if Path(path).name == "secret.txt":
        raise PermissionError(errno.EACCES, "Permission denied")
    return open(path, *mode)


def test_hostile_input_is_counted_or_refused(tmp_path, stories, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_BYTES", 100_000)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in stories]
    lines[10] = json.dumps({"text": "long " * 50_000})  # over MAX_BYTES: counted, never held in memory
    lines[20] = json.dumps({"text": "a" * 90_000})  # compresses well, and must not take for ever
    lines[30] = '{"text": "lone surrogates \\ud800 and NUL \\u0000 bytes are dropped"}'
    lines[40] = ""
    (folder / "a.jsonl").write_text("\n".join(lines))
    for i in range(1000):
        (folder / f"tiny{i}.txt").write_text(f"tiny file number {i}, one of a thousand")
    (folder / "loop").symlink_to(folder)
    prepare_data.main(["--source", str(folder), "--out", str(tmp_path / "d"), *PREPARE])
    documents = json.loads((tmp_path / "d/meta.json").read_text())["documents"]
    assert documents["read"] == 1399 and documents["too_long"] == 1 and documents["filtered"] == 0
    assert documents["kept"] == 1398
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    assert "does not exist" in message(prepare_data.main, ["--source", str(loop), "--out", str(tmp_path / "l"), *PREPARE])
    for name, content, expected in (
        ("not.jsonl.gz", b"no gzip at all", "not.jsonl.gz cannot be read (Not a gzipped file"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "all of it"}\n' * 999)[:-20], "cut.jsonl.gz cannot be read ("),
        ("picture.json.gz", gzip.compress(b"\x89PNG\r\n\x1a\n\0"), "picture.json.gz, line 1 is no UTF-8 text"),
        ("surrogate.txt", b"raw \xed\xa0\x80", "surrogate.txt is no UTF-8 text"),
        ("secret.txt", b"not for us", "secret.txt cannot be read ([Errno 13] Permission denied"),
    ):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(prepare_data, "open", locked, raising=False)  # root may read all files, so chmod would not do
        text = message(prepare_data.main, ["--source", str(tmp_path / name), "--out", str(tmp_path / "l"), *PREPARE])
        assert expected in text and not (tmp_path / "l").exists()
    monkeypatch.setattr(prepare_data.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    text = message(prepare_data.main, ["--source", str(folder), "--out", str(tmp_path / "full"), *PREPARE])
    assert "0.0 GB free" in text and not (tmp_path / "full").exists()


def test_a_full_disk_leaves_nothing(tmp_path, stories, monkeypatch):
    source = write_jsonl(tmp_path / "s.jsonl", stories)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_data, "sort_rows", full)
    text = message(prepare_data.main, ["--source", str(source), "--out", str(tmp_path / "d"), *PREPARE])
    assert "No space left on device" in text and not (tmp_path / "d").exists()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert "No space left on device" in message(prepare_data.main, ["--source", str(source), "--out", str(tmp_path / "link"), *PREPARE])
    assert (tmp_path / "link").is_dir() and not any((tmp_path / "link").iterdir())


def test_a_killed_preparation_is_refused_and_done_again(tmp_path, stories, data):
    source = write_jsonl(tmp_path / "stories.jsonl", stories)
    command = [sys.executable, str(HERE / "prepare_data.py"), "--source", str(source), "--out", str(tmp_path / "d"), *PREPARE]
    process = subprocess.Popen(command)
    while not (tmp_path / "d").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert "is no finished data folder" in message(cram.load_data, tmp_path / "d")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in cram.FILES:
        assert (tmp_path / "d" / name).read_bytes() == (data / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted([*cram.FILES, "meta.json"])


def test_two_preparations_at_once_do_not_mix(tmp_path, stories, data):
    source, out = write_jsonl(tmp_path / "stories.jsonl", stories), tmp_path / "d"
    out.mkdir()
    held = prepare_data.hold(out / "unfinished.part")  # as another process would
    flags = ["--source", str(source), "--out", str(out), *PREPARE]
    assert "is being prepared by another process" in message(prepare_data.main, flags)
    assert [path.name for path in out.iterdir()] == ["unfinished.part"]
    held.close()
    prepare_data.main(flags)
    assert [(out / name).read_bytes() for name in cram.FILES] == [(data / name).read_bytes() for name in cram.FILES]


def test_workers_end_with_a_killed_parent():
    code = "import time, prepare_data\nfor _ in prepare_data.parallel(time.sleep, [0] * 9 + [600] * 2, 2): print(1, flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=30)  # ends when nobody holds the pipe any more, workers included


# ---------------------------------------------------------------------------------------------------- model


def test_mask_counts_are_exact():
    rows = torch.randint(0, 996, (64, 128))
    shown, where, targets = cram.mask_rows(rows, torch.arange(64), cram.Config(), 1000)
    assert where.shape == targets.shape == (64, 32)
    assert all(len(set(row.tolist())) == 32 for row in where)
    assert torch.equal(rows.gather(1, where), targets)
    at = shown.gather(1, where)
    assert (at[:, :26] == 999).all() and (at[:, 29:] == targets[:, 29:]).all()  # 26 [MASK], 3 random, 3 as they are
    assert ((shown == 999).sum(1) == 26).all()
    outside = torch.ones_like(rows, dtype=torch.bool).scatter(1, where, False)
    assert torch.equal(shown[outside], rows[outside])
    assert cram.mask_counts(cram.Config(mask_rate=0.15), 128) == (19, 15, 2)  # 19.2, 0.8 and 0.9 of 19: 15.2 and 17.1


def test_masked_positions_and_random_tokens_are_spread_evenly():
    rows = torch.full((20000, 16), 7)
    shown, where, _ = cram.mask_rows(rows, torch.arange(20000), cram.Config(mask_rate=1.0), 100)
    randoms = shown.gather(1, where)[:, 13:14].flatten()
    counts = torch.bincount(randoms, minlength=100)
    assert (counts[96:] == 0).all() and counts[:96].min() > 130  # 208 each on average; the specials never
    shown, where, _ = cram.mask_rows(rows, torch.arange(20000), cram.Config(), 100)
    first = torch.bincount(where[:, 0], minlength=16)  # 1250 each on average
    assert first.min() > 1050 and first.max() < 1450


def splitmix(x):
    """The finaliser of splitmix64 on Python's unbounded integers."""
    mask = 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def test_masks_are_a_hash_of_seed_read_and_column():
    reads = torch.tensor([0, 1, 7, 123456789])
    for seed in (0, 3):
        found = cram.uniform(seed, reads, 5)
        for i, read in enumerate(reads.tolist()):
            starts = [(seed * 2**32 + read) * 0x1E3779B97F4A7C15 + k * 0x3F58476D1CE4E5B9 for k in range(5)]
            assert found[i].tolist() == [(splitmix(x % 2**64) & 0xFFFFFF) / 2**24 for x in starts]
    rows = torch.randint(0, 996, (8, 128))
    whole = cram.mask_rows(rows, torch.arange(8), cram.Config(), 1000)
    parts = [cram.mask_rows(rows[i : i + 2], torch.arange(i, i + 2), cram.Config(), 1000) for i in range(0, 8, 2)]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
    other = cram.mask_rows(rows, torch.arange(8), cram.Config(seed=1), 1000)
    assert not torch.equal(whole[1], other[1])


def test_plain_attention_equals_the_fused_one(monkeypatch):
    """On a CPU short rows take the plain formula and long ones torch's kernel: with and without padding the same."""
    model, _ = small_model(seq_len=300, zero_init=False)
    tokens = torch.randint(0, 46, (2, 300))
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 200:] = False
    fused = model.encode(tokens, mask)
    calls = []
    monkeypatch.setattr(cram.F, "scaled_dot_product_attention", lambda *_, **__: calls.append(1))
    short = model.encode(tokens[:, :200], mask[:, :200])
    assert not calls and torch.allclose(short[1], fused[1, :200], atol=1e-5)  # the second row is padded beyond 200


def test_sparse_loss_equals_dense_loss():
    model, cfg = small_model()
    shown, where, targets = cram.mask_rows(torch.randint(0, 46, (5, 16)), torch.arange(5), cfg, 50)
    dense = F.linear(model.encode(shown), model.embedding.weight)  # every position
    labels = torch.full((5, 16), -100).scatter(1, where, targets)
    expected = F.cross_entropy(dense.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert model(shown, where, targets).item() == pytest.approx(expected.item(), abs=1e-6)


def test_attention_sees_both_sides():
    model, _ = small_model(recipe="cram")
    tokens = torch.randint(0, 46, (1, 16))
    before = model.encode(tokens)
    for changed in (0, 15):
        other = tokens.clone()
        other[0, changed] = (tokens[0, changed] + 1) % 46
        assert ((model.encode(other) - before).abs().amax(2) > 1e-6).all()  # every position notices


@pytest.mark.parametrize("recipe", ["bert", "cram", "modern"])
def test_padding_does_not_change_a_sequence(recipe):
    model, _ = small_model(recipe=recipe, zero_init=False)
    tokens = torch.randint(0, 46, (3, 9))
    padded = torch.cat((tokens, torch.full((3, 7), 46)), 1)
    out = model.encode(padded, padded != 46)[:, :9]
    assert torch.allclose(out, model.encode(tokens), atol=1e-6)
    assert not torch.allclose(model.encode(padded)[:, :9], out, atol=1e-3)  # and the mask is what does it


def reference_logits(weights, tokens, cfg):
    """The model written out with numpy in float64 from the formulas: one row of tokens (S,) -> logits (S, vocab)."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    (S,), W, heads = tokens.shape, cfg.width, cfg.heads

    def norm(x, name):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def turned(x):  # rotary positions: the pair (i, i + D/2) as a complex number, times e^(i angle)
        D = x.shape[1]
        z = (x[:, : D // 2] + 1j * x[:, D // 2 :]) * np.exp(1j * np.outer(np.arange(S), 10000.0 ** (-np.arange(0, D, 2) / D)))
        return np.concatenate((z.real, z.imag), 1)

    def attention(x, block):
        parts = []
        for q, k, v in zip(*(np.split(part, heads, 1) for part in np.split(linear(x, block + "qkv"), 3, 1)), strict=True):
            q, k = (turned(q), turned(k)) if cfg.positions == "rotary" else (q, k)
            scores = np.exp(q @ k.T / math.sqrt(W / heads))
            parts.append(scores / scores.sum(1, keepdims=True) @ v)
        return linear(np.concatenate(parts, 1), block + "attn_out")

    def feed_forward(x, block):
        x = linear(x, block + "ffn_in")
        value, gate = np.split(x, 2, 1) if cfg.gated else (1, x)
        return linear(value * gelu(gate), block + "ffn_out")

    x = w["embedding.weight"][tokens]
    if cfg.positions == "sinusoidal":
        x = x + w["position_scale"] * np.array(
            [[math.sin(p / 10000 ** (i / W)) if i % 2 == 0 else math.cos(p / 10000 ** ((i - 1) / W)) for i in range(W)] for p in range(S)])
    elif cfg.positions == "learned":
        x = x + w["positions"][:S]
    x = norm(x, "embedding_norm")
    for layer in range(cfg.layers):
        b = f"blocks.{layer}."
        if cfg.norm == "pre":
            x = x + attention(norm(x, b + "attn_norm"), b)
            x = x + feed_forward(norm(x, b + "ffn_norm"), b)
        else:
            x = norm(x + attention(x, b), b + "attn_norm")
            x = norm(x + feed_forward(x, b), b + "ffn_norm")
    x = norm(x, "final_norm") if cfg.norm == "pre" else x
    x = norm(gelu(linear(x, "head.0")), "head.2") if cfg.head else x
    return x @ w["embedding.weight"].T + w.get("decoder_bias", 0)


@pytest.mark.parametrize("settings", [{"recipe": "cram"}, {"recipe": "bert"}, {"recipe": "modern"}, {"recipe": "cram", "norm": "post"},
                                      {"recipe": "modern", "linear_bias": True, "gated": False, "head": True}])  # fmt: skip
def test_model_equals_a_float64_recomputation(settings):
    model, cfg = small_model(**settings)
    for p in model.parameters():  # norms and biases at 1 and 0, and matrices at 0, would hide a mix-up
        torch.nn.init.normal_(p, mean=0.3 if p.ndim < 2 else 0, std=0.3)
    tokens = torch.randint(0, 46, (16,))
    expected = reference_logits(model.state_dict(), tokens.numpy(), cfg)
    got = model.double()(tokens[None], torch.arange(16)[None])[0].detach().numpy()
    assert np.abs(got - expected).max() < 1e-5  # the position table itself is float32


def test_later_blocks_join_as_the_identity():
    depths = {layers: cram.depth_at(0.49, cram.Config(layers=layers, shallow=0.5)) for layers in (1, 2, 3, 4, 6, 16)}
    assert depths == {1: 1, 2: 2, 3: 2, 4: 2, 6: 3, 16: 8}
    assert cram.depth_at(0.5, cram.Config(layers=16, shallow=0.5)) == cram.depth_at(0, cram.Config(layers=16)) == 16
    model, _ = small_model(layers=4)
    for block in model.blocks[:2]:
        torch.nn.init.normal_(block.attn_out.weight)
        torch.nn.init.normal_(block.ffn_out.weight)
    tokens, flops = torch.randint(0, 46, (2, 16)), model.flops_per_token()
    whole = model.encode(tokens)
    model.depth = 2
    assert torch.equal(whole, model.encode(tokens))
    assert flops - model.flops_per_token() == 2 * (6 * (4 * 32 * 32 + 32 * 64 + 32 * 32) + 12 * 32 * 16)
    model.depth = 1
    assert not torch.allclose(whole, model.encode(tokens))


def test_base_is_the_papers_model():
    cfg = cram.make_config({"size": "base", "recipe": "cram"})
    with torch.device("meta"):
        model = cram.Model(cfg, 32768, 128)
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert weights == 16 * (4 * 768 * 768 + 768 * 3072 + 1536 * 768) == 94_371_840
    assert model.flops_per_token() == 6 * weights + 6 * 0.25 * 32768 * 768 + 12 * 16 * 768 * 128
    assert not [name for name, _ in model.named_parameters() if "bias" in name and "norm" not in name]
    c = cram.Config()
    assert (c.mask_rate, c.weight_decay, c.grad_clip, cram.BETAS, cram.EPS) == (0.25, 0.01, 0.5, (0.9, 0.98), 1e-12)
    assert (c.init_std, c.dropout, c.micro_batch, c.batch_ramp) == (0.02, 0, 128, 0.6)
    assert {name: getattr(cfg, name) for name in vars(c) if getattr(cfg, name) != getattr(c, name)}.keys() == {
        "recipe", "size", "layers", "width", "heads", "ffn_width", "lr"}  # the recipe changes nothing else


def test_modern_masks_more_where_the_model_is_wide():
    rates = [[cram.make_config({"recipe": r, "size": size}).mask_rate for size in ("tiny", "mini", "base")] for r in cram.RECIPES | {"cram": {}}]
    assert rates == [[0.15] * 3, [0.25, 0.4, 0.4], [0.25] * 3]  # bert, modern, cram
    given = cram.parse_flags(cram.Config, ["--mask_rate", "auto", "--width", "64"], "")  # the default that -h shows can be typed
    assert given == {"mask_rate": "auto", "width": 64} and cram.make_config(given).mask_rate == 0.25
    assert cram.make_config({"mask_rate": 0.3, "size": "mini"}).mask_rate == 0.3


def test_initialisation():
    model, _ = small_model(recipe="cram", width=256, heads=4, ffn_width=1024)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
    assert model.position_scale.item() == pytest.approx(1 / 16)
    model, _ = small_model(recipe="modern")
    tokens = torch.randint(0, 46, (2, 16))
    assert torch.equal(model.encode(tokens), model.final_norm(model.embedding_norm(model.embedding(tokens))))  # blocks add 0
    model, _ = small_model(recipe="bert")
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_only_matrices_decay_and_muon_takes_those_of_the_blocks():
    model, cfg = small_model(recipe="cram")
    (adamw,) = cram.make_optimizers(model, cfg, "fp32")
    decayed, plain = adamw.param_groups
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0 and decayed["peak"] == plain["peak"] == cfg.lr
    assert len(decayed["params"]) == 1 + 2 * 4 and len(plain["params"]) == 1 + 2 + 2 * 4 + 2  # scale, norms
    assert decayed["betas"] == (0.9, 0.98) and decayed["eps"] == 1e-12
    model, cfg = small_model(recipe="modern")
    muon, adamw = cram.make_optimizers(model, cfg, "fp32")
    assert [cram.make_optimizers(model, cfg, d)[0].dtype for d in ("fp32", "fp16", "bf16")] == [torch.float32] * 2 + [torch.bfloat16]
    assert [len(group["params"]) for group in adamw.param_groups] == [1, 2 + 2 * 2] and muon.param_groups[0]["peak"] == 0.02
    before, grad = model.blocks[0].qkv.weight.detach().clone(), torch.randn(96, 32)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.blocks[0].qkv.weight.grad = grad.clone()
    cram.update([muon, adamw], scaler, 0.5, True)
    step = (before * (1 - 0.01 * 0.01) - model.blocks[0].qkv.weight.detach()) / (0.01 * math.sqrt(3))  # 0.5 of 0.02, 96 / 32
    u, _, v = torch.linalg.svd(grad, full_matrices=False)  # the nearest orthogonal matrix, which Muon approximates
    assert torch.linalg.svdvals(step).min() > 0.6 and torch.linalg.svdvals(step).max() < 1.25
    assert (step * (u @ v)).sum() / (step.norm() * (u @ v).norm()) > 0.98


@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 24)])
def test_muon_is_torchs_in_bf16_and_near_it_in_fp32(shape):
    start, optimizers = torch.randn(*shape), []
    for make in (lambda ps: torch.optim.Muon(ps, lr=0.02, weight_decay=0.1),
                 lambda ps: cram.Muon(ps, 0.02, 0.1, torch.bfloat16), lambda ps: cram.Muon(ps, 0.02, 0.1, torch.float32)):
        optimizers.append(make([torch.nn.Parameter(start.clone())]))
        optimizers[-1].param_groups[0]["lr"] = 0.02
    for _ in range(6):
        grad = torch.randn(*shape)
        for optimizer in optimizers:
            optimizer.param_groups[0]["params"][0].grad = grad.clone()
            optimizer.step()
    theirs, same, fp32 = (optimizer.param_groups[0]["params"][0].detach() for optimizer in optimizers)
    moved = (theirs - start).norm()
    assert (same - theirs).norm() < 0.04 * moved and (fp32 - theirs).norm() < 0.04 * moved  # bf16 rounds at 0.4% a time


def test_one_batch_is_learnt_by_heart():
    model, cfg = small_model(lr=1e-2)
    optimizers = cram.make_optimizers(model.train(), cfg, "fp32")
    batch = cram.mask_rows(torch.randint(0, 46, (4, 16)), torch.arange(4), cfg, 50)
    for _ in range(150):
        loss = model(*batch)
        loss.backward()
        cram.update(optimizers, torch.amp.GradScaler("cpu", enabled=False), 1.0, True)
    assert loss.item() < 0.02


# ---------------------------------------------------------------------------------------- budget, schedule


def test_schedule_and_ramp_are_the_papers():
    cfg = cram.make_config({"recipe": "cram", "batch_size": 8192, "size": "base"})
    for p in np.linspace(0, 1, 101):
        assert cram.lr_at(p, cfg) == pytest.approx(min(0.25 + p, 4 * (1 - p)), abs=1e-12)
    assert [cram.batch_at(p, cfg) for p in (0, 0.3, 0.6, 1)] == [128, 128 * 32, 8192, 8192]
    assert all(cram.batch_at(p, cfg) % 128 == 0 for p in np.linspace(0, 1, 77))
    cfg.batch_ramp = 0
    assert cram.batch_at(0, cfg) == 8192
    bert, modern = (cram.make_config({"recipe": recipe, "size": "base"}) for recipe in ("bert", "modern"))
    assert [cram.lr_at(p, bert) for p in (0, 0.005, 0.01, 1)] == pytest.approx([0, 0.5, 1, 0])
    assert [cram.lr_at(p, modern) for p in (0, 0.025, 0.05, 0.3, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 1, 1, 0.5, 0])


@pytest.mark.parametrize("text, expected", [
    ("90s", (90, "seconds")), ("5m", (300, "seconds")), ("24h", (86400, "seconds")), ("1.5h", (5400, "seconds")),
    ("2000steps", (2000, "steps")), ("50Mtokens", (5e7, "tokens")), ("1e15flops", (1e15, "flops")), ("2Gflops", (2e9, "flops")),
])  # fmt: skip
def test_budgets(text, expected):
    assert cram.parse_budget(text) == expected


def test_auto_batch_and_lr_give_the_papers_for_a_day_at_base():
    cfg = cram.make_config({"size": "base", "recipe": "cram"})
    tokens = cram.choose_batch(cfg, 86400, "seconds", 128, 6e8, 1e10 / 86400)
    assert tokens == pytest.approx(1e10)
    assert cfg.batch_size == 8192 and cfg.lr == pytest.approx(1e-3)


@pytest.mark.parametrize("unit, amount", [("steps", 3000), ("tokens", 2e7), ("flops", 2e13)])
def test_the_plan_is_what_the_loop_then_spends(unit, amount):
    cfg = cram.make_config({"size": "mini", "micro_batch": 8, "recipe": "cram"})
    planned = cram.choose_batch(cfg, amount, unit, 128, 1e6, 0)
    spent = steps = 0
    while (p := {"steps": steps, "tokens": spent, "flops": spent * 1e6}[unit] / amount) < 1:
        spent, steps = spent + 128 * cram.batch_at(p, cfg), steps + 1
    assert planned == pytest.approx(spent, rel=0.05)


def test_a_time_budget_under_a_fake_clock(tmp_path, data, monkeypatch):
    """Time passes only in the loop, 0.1 s a call: the stop, the learning rate and the ramp follow it."""
    now = [1000.0]

    def tick():
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(cram.time, "monotonic", tick)
    monkeypatch.setattr(cram, "time_of", lambda *_, **__: 0.05)
    flags = [*SMALL, "--batch_size", "16", "--log_every", "1", "--lr", "1e-3", "--recipe", "cram"]
    cram.main(["--data", str(data), "--out", str(tmp_path), "--budget", "60s", *flags])
    rows = log_of(tmp_path)
    progress = [float(row["progress"]) for row in rows]
    assert progress == sorted(progress) and progress[-1] == 1
    for row in rows[:-1]:  # the clock ticks a few times between the update and the log
        assert float(row["lr"]) == pytest.approx(1e-3 * cram.lr_at(float(row["progress"]), cram.Config()), abs=5e-5)
    assert float(rows[-1]["lr"]) < 3e-5 and int(rows[0]["batch_rows"]) == 4 and int(rows[-1]["batch_rows"]) == 16
    step = max(float(b["seconds"]) - float(a["seconds"]) for a, b in pairwise(rows))
    assert 59 < float(rows[-1]["seconds"]) < 60 + step


def test_a_time_budget_by_the_real_clock(tmp_path, data):
    start = time.monotonic()
    cram.main(["--data", str(data), "--out", str(tmp_path), "--budget", "3s", *SMALL])
    seconds = float(log_of(tmp_path)[-1]["seconds"])
    assert 2.5 < seconds < 3.5 and time.monotonic() - start < 5


def test_validation_has_the_same_masks_whatever_the_run_hides(tmp_path, data):
    """Nothing is learnt at these rates, so only the masks of the validation rows could make a difference."""
    still = ["--data", str(data), "--budget", "1steps", *SMALL, "--lr", "1e-9", "--muon_lr", "1e-9"]
    losses = []
    for rate in ("0.1", "0.25", "0.9"):
        cram.main([*still, "--mask_rate", rate, "--out", str(tmp_path / rate)])
        losses.append(float(log_of(tmp_path / rate)[-1]["val_loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] == pytest.approx(losses[2], abs=1e-5)


@pytest.mark.parametrize("budget", ["6000tokens", "3e9flops"])
def test_counted_budgets_overshoot_by_less_than_a_step(tmp_path, data, budget):
    cram.main(["--data", str(data), "--out", str(tmp_path), "--budget", budget, *SMALL])
    last = log_of(tmp_path)[-1]
    amount, unit = cram.parse_budget(budget)
    spent = float(last["tokens"]) if unit == "tokens" else float(last["exaflops"]) * 1e18
    step = spent / float(last["tokens"]) * int(last["batch_rows"]) * 32
    assert amount <= spent < amount + step and float(last["lr"]) == 0


@pytest.mark.parametrize("recipe", ["modern", "cram"])
def test_half_of_the_blocks_train_alone_until_shallow(tmp_path, data, monkeypatch, recipe):
    """Till then the other blocks keep their first weights, and a token costs less: flops and estimate say how much."""
    flags = ["--data", str(data), "--recipe", recipe, *SMALL, "--layers", "4", "--shallow", "0.5", "--batch_ramp", "0", "--log_every", "1"]
    first = cram.build(cram.make_config(cram.parse_flags(cram.Config, flags, "")), 380, 32, torch.device("cpu"), "fp32")[0]
    weights, update = [], cram.update

    def remember(optimizers, scaler, share, finite):
        update(optimizers, scaler, share, finite)
        weights.append([p.detach().clone() for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]])

    monkeypatch.setattr(cram, "update", remember)
    cram.main([*flags, "--out", str(tmp_path), "--budget", "1.5e9flops"])
    rows = log_of(tmp_path)
    spent = [float(b["exaflops"]) * 1e18 - float(a["exaflops"]) * 1e18 for a, b in pairwise([{"exaflops": 0}, *rows])]
    deep = first.flops_per_token()
    first.depth = 2
    costs = [8 * 32 * (first.flops_per_token() if p < 0.5 else deep) for p in (0, *(float(row["progress"]) for row in rows[:-1]))]
    assert spent == pytest.approx(costs) and costs[0] < costs[-1] and 1.5e9 <= sum(spent) < 1.5e9 + costs[-1]
    rates = [float(row["mfu"]) / float(row["tokens_per_s"]) / cost for row, cost in zip(rows, costs, strict=True) if float(row["mfu"]) >= 0.002]
    assert len(rates) > 9 and max(rates) / min(rates) < 1.3, rates  # of one machine, apart from rounding: also where the depth changes
    run = cram.load_checkpoint(tmp_path)["run"]
    assert abs(run["planned_rows"] - run["reads"]) <= 16  # a step of 8 rows may end late in either half
    step = costs.index(costs[-1])  # the first with all blocks
    moved = [[not torch.equal(a, b) for a, b in zip(weights[i], weights[j], strict=True)] for i, j in ((0, step - 1), (step - 1, -1))]
    idle = 4 * 2 + 2 * 2 * (1 + (recipe == "cram"))  # tensors of two blocks: four matrices, two norms with or without bias
    assert len(moved[0]) - sum(moved[0]) == idle and all(moved[1])


def test_first_pass_keeps_the_order_and_covers_it_all():
    def rows(reads, planned, shuffle=False):
        return [int(cram.row_at(read, 10, planned, cram.Config(shuffle=shuffle))) for read in reads]

    assert rows(range(10), 25) == list(range(10))  # more is planned than there is
    assert rows(range(5), 5) == [0, 2, 4, 6, 8]  # the budget buys half: every other row
    assert rows(range(7), 7) == [0, 1, 2, 4, 5, 7, 8]
    later = rows(range(35), 35)
    assert later[:10] == list(range(10))
    for i in (10, 20):
        assert sorted(later[i : i + 10]) == list(range(10)) and later[i : i + 10] != list(range(10))
    assert later[10:20] != later[20:30]
    assert sorted(rows(range(10), 25, True)) == list(range(10)) != rows(range(10), 25, True)


# ---------------------------------------------------------------------------------------- training, resume


def test_training_beats_the_unigram_line(trained, data):
    unigram = json.loads((data / "meta.json").read_text())["unigram_nats"]
    rows = log_of(trained)
    assert tuple(rows[0]) == cram.COLUMNS
    assert float(rows[-1]["val_loss"]) < unigram - 1.5
    assert int(rows[-1]["step"]) == 300 and float(rows[-1]["lr"]) == 0
    xml.etree.ElementTree.parse(trained / "curve.svg")
    assert sorted(path.name for path in trained.iterdir()) == ["checkpoint.prev.pt", "checkpoint.pt", "curve.svg", "log.csv"]


def test_accumulated_batch_is_one_batch(tmp_path, data):
    """Two micro-batches of 4 rows give the gradient of one of 8 (Adam would hide its scale), and their mean loss."""
    losses = {}
    for micro in ("4", "8"):
        out = tmp_path / micro
        flags = [*SMALL, "--micro_batch", micro, "--batch_ramp", "0", "--mask_rate", "0.999999", "--random_share", "0",
                 "--mask_share", "0", "--log_every", "1"]  # nothing is hidden and all is predicted: masks play no part
        cram.main(["--data", str(data), "--out", str(out), "--budget", "6steps", *flags])
        losses[micro] = [float(row[name]) for row in log_of(out) for name in ("train_loss", "grad_norm")]
    assert losses["4"] == pytest.approx(losses["8"], abs=1e-4)


def comparable(out):
    """All that two equal runs share: weights, optimiser, numbers, and the log but for its clock."""
    state = cram.load_checkpoint(out)
    tensors = dict(state["model"])
    for k, optimizer in enumerate(state["optimizers"]):
        tensors.update({f"{k}.{i}.{name}": v for i, values in optimizer["state"].items() for name, v in values.items()})
    clock = ("seconds", "tokens_per_s", "mfu")
    run = {k: v for k, v in state["run"].items() if k not in clock}
    return tensors, run, [{k: v for k, v in row.items() if k not in clock} for row in log_of(out)]


def assert_equal_runs(a, b):
    (tensors_a, run_a, log_a), (tensors_b, run_b, log_b) = comparable(a), comparable(b)
    assert log_a == log_b and run_a == run_b and tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)


def script(*words):
    """The command line of a cram.py of its own, on one thread."""
    return {"args": [sys.executable, str(HERE / "cram.py"), *words], "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def test_resume_equals_uninterrupted(tmp_path, data):
    """Killed (SIGKILL, real processes) at random moments and resumed until it is done: the same run, bit for bit."""
    flags = ["--data", str(data), "--budget", "240steps", *SMALL, "--dropout", "0.1", "--layers", "3", "--shallow", "0.5"]
    cram.main([*flags, "--out", str(tmp_path / "whole")])
    out, kills, resumed = tmp_path / "killed", 0, ["--resume", "--out", str(tmp_path / "killed"), "--data", str(data)]
    while kills < 2:
        started = any(out.glob("checkpoint*.pt"))
        process = subprocess.Popen(**script(*(resumed if started else [*flags, "--out", str(out)])), stdout=subprocess.DEVNULL)
        first = log_of(out)[-1:] if started else []
        while process.poll() is None and (not (out / "log.csv").exists() or log_of(out)[-1:] == first):
            time.sleep(0.01)  # so that each life gets somewhere
        time.sleep(random.random() * 0.4)
        process.kill()
        process.wait()
        kills += 1
        assert cram.load_checkpoint(out)["run"]["step"] < 240
    cram.main(resumed)
    assert_equal_runs(tmp_path / "whole", out)


def test_interrupt_saves_and_says_how_to_go_on(tmp_path, data):
    command = script("--data", str(data), "--out", str(tmp_path), "--budget", "10m", *SMALL)
    process = subprocess.Popen(**command, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "log.csv").exists() or len(log_of(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and f"--resume --out {tmp_path}" in output
    assert cram.load_checkpoint(tmp_path)["run"]["step"] >= 6


@pytest.mark.parametrize("rows", ["1", "128"])
def test_another_micro_batch_at_a_resume_leaves_the_batches_as_they_were(tmp_path, data, monkeypatch, rows):
    flags = ["--data", str(data), "--budget", "20steps", *SMALL, "--batch_ramp", "0.9", "--log_every", "1"]
    cram.main([*flags, "--out", str(tmp_path / "whole")])
    batch_at = cram.batch_at  # called once a step
    monkeypatch.setattr(cram, "batch_at", lambda p, cfg: (p == 0.25 and os.kill(os.getpid(), signal.SIGTERM)) or batch_at(p, cfg))
    with pytest.raises(SystemExit):
        cram.main([*flags, "--out", str(tmp_path / "cut")])
    cram.main(["--resume", "--data", str(data), "--out", str(tmp_path / "cut"), "--micro_batch", rows])
    batches = [[row["batch_rows"] for row in log_of(tmp_path / name)] for name in ("whole", "cut")]
    assert batches[0] == batches[1] and len(set(batches[0])) > 1


def test_a_run_that_was_moved_goes_on_where_it_is(tmp_path, data, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "out/cram")  # the folder that is meant without --out
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    cram.main(["--resume", "--data", str(data)])
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    assert Path("out/cram/checkpoint.pt").stat().st_mtime_ns > before["checkpoint.pt"]


def test_resume_of_a_finished_run_changes_nothing(trained, data):
    before = comparable(trained)
    cram.main(["--resume", "--out", str(trained), "--data", str(data)])
    after = comparable(trained)
    assert before[2] == after[2] and before[1] == after[1]


def test_a_failed_save_keeps_the_old_file(tmp_path):
    cram.write_whole(tmp_path / "file", lambda file: file.write(b"old"))

    def write(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cram.write_whole(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk_costs_a_save_and_not_the_run(tmp_path, data, monkeypatch, capsys):
    """Every save between the first and the last ends in the middle: the run ends well, with the warning, and says so in
    its exit. (Past the limit on a file's size the system refuses to write, as on a full disk.)"""
    saves, save, limits = [], torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fails(state, file):
        saves.append(state["run"]["step"])
        if 0 < saves[-1] < 60:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(state, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(torch, "save", fails)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # saving may take 1% of the time: on a busy disk there would be none ...
    monkeypatch.setattr(cram, "plot", lambda *_: None)  # ... between the first and the last
    text = message(cram.main, ["--data", str(data), "--out", str(tmp_path / "a"), "--budget", "60steps", *SMALL])
    assert "File too large" in text and re.match(r"error: \d+ times a file could not be written", text)
    assert "warning: step" in capsys.readouterr().out and len(log_of(tmp_path / "a")) == 30
    assert cram.load_checkpoint(tmp_path / "a")["run"]["step"] == 60 and not list(tmp_path.glob("a/*.part"))
    saves.clear()
    monkeypatch.setattr(torch, "save", lambda state, file: fails({**state, "run": {"step": 1}}, file))
    message(cram.main, ["--data", str(data), "--out", str(tmp_path / "b"), "--budget", "60steps", *SMALL])
    assert saves == [1] and not list((tmp_path / "b").glob("checkpoint*"))  # nothing is lost yet: stop at once


def test_rows_of_the_log_after_the_last_save_and_half_a_row_are_dropped(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "a")
    whole = (tmp_path / "a/log.csv").read_text()
    later = whole.splitlines()[-1].replace("300,", "302,", 1)
    for cut in ("304,12.5,0.", later[:-1]):  # the second has all its columns, and lacks a digit of the last
        (tmp_path / "a/log.csv").write_text(f"{whole}{later}\n{cut}")
        assert [row["step"] for row in cram.read_log(tmp_path / "a/log.csv")][-2:] == ["300", "302"]
        cram.plot([tmp_path / "a"], cram.Plot(str(tmp_path / "a/curve.svg")))
        with cram.open_log(tmp_path / "a/log.csv", 300):
            assert (tmp_path / "a/log.csv").read_text() == whole


def test_the_checkpoint_before_is_kept_and_offered(tmp_path, trained, capsys):
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    text = message(cram.load_checkpoint, tmp_path)
    assert f"mv {tmp_path / 'checkpoint.prev.pt'} {tmp_path / 'checkpoint.pt'}" in text
    (tmp_path / "checkpoint.pt").unlink()  # as a kill between the two renames leaves it
    assert cram.load_checkpoint(tmp_path)["run"]["step"] == 300
    assert "holds a run already" in message(cram.main, ["--data", "data", "--out", str(tmp_path), *SMALL])


def spoil(monkeypatch, steps, value=math.nan):
    """Makes the loss of the optimiser steps in `steps` (counted from 0, two micro-batches each) not finite."""
    forward, calls = cram.Model.forward, []

    def spoilt(self, tokens, where, targets=None):
        loss = forward(self, tokens, where, targets)
        if self.training and targets is not None:
            calls.append(1)
            return loss * (value if (len(calls) - 1) // 2 in steps else 1)
        return loss

    monkeypatch.setattr(cram.Model, "forward", spoilt)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, data, monkeypatch, capsys):
    flags = ["--data", str(data), *SMALL, "--batch_ramp", "0", "--log_every", "1"]
    spoil(monkeypatch, {3, 4, 9}, math.inf)
    cram.main([*flags, "--out", str(tmp_path / "a"), "--budget", "20steps"])
    assert "(3 steps skipped: not finite)" in capsys.readouterr().out
    assert [i for i, row in enumerate(log_of(tmp_path / "a")) if row["train_loss"] == "nan"] == [3, 4, 9]
    state = cram.load_checkpoint(tmp_path / "a")
    assert state["run"]["skipped"] == 3 and all(w.isfinite().all() for w in state["model"].values())
    assert state["optimizers"][-1]["state"][0]["step"] == 17  # AdamW has not seen them
    monkeypatch.undo()
    spoil(monkeypatch, {0, 1}, math.inf)
    batch_at = cram.batch_at  # called once a step
    monkeypatch.setattr(cram, "batch_at", lambda p, cfg: (p == 1 / 20 and os.kill(os.getpid(), signal.SIGTERM)) or batch_at(p, cfg))
    with pytest.raises(SystemExit) as stopped:  # at a save that finds no loss to draw
        cram.main([*flags, "--out", str(tmp_path / "c"), "--budget", "20steps"])
    assert stopped.value.code == 128 + signal.SIGTERM and [row["train_loss"] for row in log_of(tmp_path / "c")] == ["nan", "nan"]
    monkeypatch.undo()
    spoil(monkeypatch, range(30, 1000))
    text = message(cram.main, [*flags, "--out", str(tmp_path / "b"), "--budget", "100steps"])
    assert "for 10 steps up to step 40, at learning rate" in text and "holds the last good save" in text
    assert all(w.isfinite().all() for w in cram.load_checkpoint(tmp_path / "b")["model"].values())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS allocated")])
def test_out_of_memory_halves_the_micro_batch_and_nothing_else(tmp_path, data, monkeypatch, capsys, error):
    flags = ["--data", str(data), "--budget", "12steps", *SMALL, "--log_every", "1", "--batch_size", "32"]
    cram.main([*flags, "--out", str(tmp_path / "a")])
    forward, sizes = cram.Model.forward, []

    def little_memory(self, tokens, where, targets=None):
        if self.training and len(sizes) > 9 and len(tokens) > 2:
            raise error
        sizes.append(len(tokens))
        return forward(self, tokens, where, targets)

    monkeypatch.setattr(cram.Model, "forward", little_memory)
    cram.main([*flags, "--out", str(tmp_path / "b")])
    assert "out of memory: on with 2 rows at a time" in capsys.readouterr().out and {4, 2} <= set(sizes)
    for a, b in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b"), strict=True):
        assert a["batch_rows"] == b["batch_rows"] and float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), abs=1e-4)
    lengths, failed = [], []

    def once(tokens, where, targets):
        if not failed:
            failed.append(1)
            raise error
        lengths.append(len(tokens))
        return torch.zeros((), requires_grad=True)

    once.zero_grad = lambda: None
    scaler, cpu = torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu")
    _, micro = cram.accumulate(once, lambda part: (torch.zeros(len(part), 1),) * 3, [range(8), range(8, 9)], 9, 8, scaler, cpu, "fp32")
    assert micro == 4 and lengths == [4, 4, 1]  # half of the largest part, not of the last
    monkeypatch.setattr(cram.Model, "forward", lambda *_: (_ for _ in ()).throw(error))
    assert "choose a smaller --size" in message(cram.main, [*flags, "--out", str(tmp_path / "c")])
    with pytest.raises(RuntimeError, match="a shape"):  # another error is not taken for it
        cram.accumulate(lambda *_: (_ for _ in ()).throw(RuntimeError("a shape")), lambda _: (torch.zeros(1, 1),) * 3, [range(1)], 1, 1, scaler, cpu, "fp32")


def test_compiled_parts_may_have_many_sizes(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # the limit is the tracer's, not the compiler's
    cfg = cram.make_config({"layers": 1, "width": 8, "heads": 1, "ffn_width": 8, "compile": True, "device": "cpu"})
    _, forward, *_ = cram.build(cfg, 270, 16, torch.device("cpu"), "fp32")
    for rows in range(1, 12):  # under torchrun a ramp deals out another number at each of its stages; torch stops at 8
        assert forward(torch.zeros(rows, 16, dtype=torch.long), torch.zeros(rows, 4, dtype=torch.long)).shape == (rows, 4, 270)


def test_two_processes_train_like_one(tmp_path, data):
    """torchrun with two gloo processes, stopped by SIGTERM, and ended by one process: the losses of one process that
    did it all."""
    flags = ["--data", str(data), "--budget", "200steps", *SMALL, "--batch_size", "16", "--log_every", "1", "--recipe", "cram",
             "--lr", "1e-3", "--layers", "3", "--shallow", "0.5"]
    one, both = tmp_path / "one", tmp_path / "both"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "cram.py")]
    cram.main([*flags, "--out", str(one)])
    process = subprocess.Popen([*torchrun, *flags, "--out", str(both)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (both / "log.csv").exists() or len(log_of(both)) < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert output.count("stopped at step") == 1  # rank 0 speaks for all
    assert 20 <= cram.load_checkpoint(both)["run"]["step"] < 200
    cram.main(["--resume", "--data", str(data), "--out", str(both)])
    columns = ("step", "tokens", "batch_rows", "lr", "train_loss", "grad_norm")
    a, b = (np.array([[float(row[name]) for name in columns] for row in log_of(out)]) for out in (one, both))
    assert len(a) == 200 and np.allclose(a, b, rtol=0, atol=1e-4)


def test_bench_measures(capsys, monkeypatch):
    cram.main(["bench", *SMALL])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["model", "machine", "speed", "outside"]
    tokens, tflops = (float(word) for word in re.match(r"(\d+) tokens/s, (\S+) TFLOP/s", lines["speed"]).groups())
    mflop = float(re.search(r"(\S+) MFLOP a token, 4 rows", lines["model"])[1])
    assert tflops == pytest.approx(tokens * mflop / 1e6, rel=0.05)
    share, rate = re.search(r"MFU (\S+)% of (\S+) TFLOP/s", lines["speed"]).groups()
    assert float(share) / 100 == pytest.approx(tflops / float(rate), rel=0.1)
    forward = cram.Model.forward

    def little_memory(self, tokens, *rest):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, tokens, *rest)

    monkeypatch.setattr(cram.Model, "forward", little_memory)
    cram.main(["bench", *SMALL])
    assert capsys.readouterr().out.count("out of memory") == 1  # found out once, and not in every step that is timed


def test_a_checkpoint_alone_is_enough_to_fill(trained, tmp_path, capsys):
    (tmp_path / "checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes())
    cram.main(["fill", str(tmp_path), "The cat sees [MASK] dog near the [mask]."])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("[MASK] 1  the ")
    answers = cram.fill(tmp_path, "the dog likes the [MASK] under a tree")
    assert len(answers) == 1 and len(answers[0]) == 5
    assert [p for _, p in answers[0]] == sorted((p for _, p in answers[0]), reverse=True)
    assert {token.strip() for token, _ in answers[0]} & set(ANIMALS)
    assert cram.fill(tmp_path, " the dog likes the \u201c[MASK]\u201d under\u2026 a tree") == answers  # normalised away


def test_python_cram_py_alone_prepares_the_docs(tmp_path, monkeypatch, data):
    """On a fresh machine the default data folder does not exist: it is made, and training starts on it."""
    asked = []

    def prepare(argv):
        asked.append(argv)
        Path("data").mkdir()
        os.symlink(data, "data/docs")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, "main", prepare)
    cram.main(["--budget", "4steps", *SMALL])
    assert asked == [["--out", "data/docs"]] and Path("out/cram/checkpoint.pt").is_file()


def svg_lines(path):
    """[(class, stroke, [(x, y), ...])] of the paths of an SVG that stand in its box, in pixels; and its words."""
    elements = list(xml.etree.ElementTree.parse(path).iter())
    lines = []
    for e in elements:
        if e.get("d") and e.get("stroke"):
            pairs = [tuple(map(float, pair.split())) for pair in re.split("h0M|M|L", e.get("d").removesuffix("h0")) if pair and "h20" not in pair]
            lines.append((e.get("class"), e.get("stroke"), pairs))
    return lines, [e.text for e in elements if e.tag.endswith("text")]


def test_curves_have_the_numbers_where_they_belong(tmp_path):
    series = [("a < b", 0, "line", [(1, 3.0), (2, 1.0)]), ("", 1, "dots", [(2, 2.0)]), ("none yet", 2, "dots", [])]
    cram.draw(tmp_path / "c.svg", series, "x", False)
    (line, dots, none), words = svg_lines(tmp_path / "c.svg")
    assert line[2] == [(340.0, pytest.approx(20.3, abs=1)), (630.0, pytest.approx(351.7, abs=1))]  # a fall goes down
    assert dots[0] == "dots" and dots[2][0][1] == pytest.approx((line[2][0][1] + line[2][1][1]) / 2, abs=0.1) and not none[2]
    assert {"a < b", "none yet", "x", "nats", "0.5", "1.5"} <= set(words)
    cram.draw(tmp_path / "c.svg", [("a", 0, "line", [(1e-6, 3.0), (1e-5, 2.0), (1e-4, 1.0)])], "x", True)
    ((_, _, pairs),), words = svg_lines(tmp_path / "c.svg")
    assert [x for x, _ in pairs] == pytest.approx([50, 340, 630], abs=0.2) and {"1e-06", "1e-05", "2e-05"} <= set(words)
    cram.draw(tmp_path / "new/c.svg", [("a", 0, "line", [(1.1e-4, 4.45), (1.9e-4, 4.28)])], "x", True)
    assert {"4.3", "4.4", "0.00011", "0.00019"} <= set(svg_lines(tmp_path / "new/c.svg")[1])  # never an axis without a number


@pytest.mark.parametrize("floor, a, b", [(2.0, 0.5, 0.3), (0.0, 3.0, 0.15), (3.5, 1e-4, 0.6)])
def test_the_power_law_of_the_lower_envelope_is_found(floor, a, b):
    best = [(c, floor + a * c**-b) for c in np.geomspace(1e-7, 1e-3, 8)]
    worse = [(c * 1.5, loss + 0.3) for c, loss in best]
    envelope, law = cram.power_law([*worse, *best[::-1]])
    assert envelope == best and law == (pytest.approx(floor, abs=0.12), pytest.approx(a, rel=0.05), pytest.approx(b, rel=0.05))
    assert cram.power_law(best[:3])[1] is None and cram.power_law([])[0] == []
    assert cram.power_law([(c, 1 / (1 + c)) for c in (1.0, 2.0, 3.0, 4.0, 50.0)])[1][0] >= 0  # no loss under 0, however far


def test_plot_reads_runs_logs_and_folders_of_them(tmp_path, trained, capsys):
    (tmp_path / "many").mkdir()
    for name in ("one", "two"):
        shutil.copy(trained / "log.csv", tmp_path / "many" / f"{name}.csv")
    log = log_of(trained)
    losses = [(float(row["tokens"]) / 1e6, float(row["val_loss"])) for row in log if row["val_loss"]]
    cram.main(["plot", str(trained), str(tmp_path / "many"), "--to", str(tmp_path / "p.svg"), "--x", "tokens", "--log", "false"])
    assert re.search(rf"{3 * len(losses)} validation losses, \d+ on the lower envelope", capsys.readouterr().out)
    lines, words = svg_lines(tmp_path / "p.svg")
    one, dots, many, level = lines[:4]
    assert [line[0] for line in (one, dots, many, level)] == ["line", "dots", "dots", "dash"] and one[1] == dots[1] != many[1]
    assert len(one[2]) == len(log) and len(dots[2]) == len(losses) and len(many[2]) == 2 * len(losses)
    assert dots[2][-1][0] == pytest.approx(50 + 580 * losses[-1][0] / (float(log[-1]["tokens"]) / 1e6), abs=0.2)
    unigram = json.loads((Path(cram.load_checkpoint(trained)["config"]["data"]) / "meta.json").read_text())["unigram_nats"]
    assert {"/".join(trained.parts[-2:]), f"{tmp_path.name}/many", f"unigram model {unigram:.3f}", "tokens, millions"} <= set(words)
    cram.main(["plot", str(trained / "log.csv"), "--to", str(tmp_path / "q.svg"), "--x", "seconds", "--unigram", "5.5"])
    assert {"unigram model 5.500", "seconds"} <= set(svg_lines(tmp_path / "q.svg")[1])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    shutil.copytree(trained, tmp_path / "outer")
    shutil.copytree(trained, tmp_path / "outer/inner")  # a run in the folder of another is not part of it
    capsys.readouterr()
    cram.main(["plot", str(tmp_path / "outer"), "--to", str(tmp_path / "r.svg"), "--unigram", "5"])
    assert f": {len(losses)} validation losses" in capsys.readouterr().out
    state = torch.load(trained / "checkpoint.pt")
    state["meta"]["unigram_nats"] = 4.25
    torch.save(state, tmp_path / "outer/checkpoint.pt")
    cram.main(["plot", str(trained), str(tmp_path / "outer"), "--to", str(tmp_path / "r.svg")])
    assert {f"unigram model {unigram:.3f}", "unigram model 4.250"} <= set(svg_lines(tmp_path / "r.svg")[1])  # two texts
    (tmp_path / "r.svg").unlink()
    for out in ("nowhere", tmp_path / "other.csv", trained / "checkpoint.pt"):
        assert f"{out} has no log with a loss" in message(cram.main, ["plot", str(out), "--to", str(tmp_path / "r.svg")])
    assert "argument --x: got 'steps', expected exaflops, tokens, seconds" in message(cram.main, ["plot", str(trained), "--x", "steps"])
    assert "is not understood: expected train, bench, plot OUT" in message(cram.main, ["plot"])
    assert "other.csv" in message(cram.main, ["plot", str(trained), "--to", str(tmp_path / "other.csv/p.svg")])  # no folder
    assert "many" in message(cram.main, ["plot", str(trained), "--to", str(tmp_path / "many")]) and not list(tmp_path.glob("*.part"))
    assert not (tmp_path / "r.svg").exists()


# ------------------------------------------------------------------------------------------------ messages


def test_messages_of_prepare_data(tmp_path, stories):
    def prepare(*flags):
        return message(prepare_data.main, ["--out", str(tmp_path / "d"), *PREPARE, *flags])

    good = write_jsonl(tmp_path / "good.jsonl", stories)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"text": "fine and long enough"}\n{"text": broken\n')
    (tmp_path / "other.jsonl").write_text('{"body": "no text"}\n')
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:2000])
    assert "nowhere does not exist" in prepare("--source", "nowhere")
    assert "picture.png" in prepare("--source", str(tmp_path / "picture.png"))
    assert "empty.txt the first, gives 0 merges" in prepare("--source", str(tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("aaaa bbbb aaaa bbbb aaaa bbbb")
    assert "too little text: 1 documents gave 0 rows" in prepare("--source", str(tmp_path / "short.txt"), "--vocab_size", "261")
    assert "can't decode byte 0xe9 in position 1" in prepare("--source", str(tmp_path / "latin.txt"))
    assert "broken.jsonl, line 2 is no UTF-8 text, or not JSON" in prepare("--source", str(tmp_path / "broken.jsonl"))
    assert 'other.jsonl, line 1 is no UTF-8 text, or not JSON with a "text" (KeyError' in prepare("--source", str(tmp_path / "other.jsonl"))
    assert "cut.jsonl.gz cannot be read" in prepare("--source", str(tmp_path / "cut.jsonl.gz"))
    assert "got '70000', expected a whole number from 0 to 65536" in prepare("--source", str(good), "--vocab_size", "70000")
    assert "vocab_size is 260: expected more than the 256 bytes" in prepare("--source", str(good), "--vocab_size", "260")
    text = prepare("--source", str(good), "--vocab_size", "5000")
    most = re.search(r"use --vocab_size (\d+) or less", text)[1]
    assert "expected prevalence, sentences, none" in prepare("--source", str(good), "--sort", "length")
    assert not (tmp_path / "d").exists()  # nothing half-written is left
    prepare_data.main(["--source", str(good), "--out", str(tmp_path / "d"), *PREPARE, "--vocab_size", most])
    assert "finished data folder already" in prepare("--source", str(good))


def test_messages_about_data_folders(tmp_path, data):
    def broken(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for path in data.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        return message(cram.load_data, folder)

    def flip(folder):
        content = bytearray((folder / "train.bin").read_bytes())
        content[100] ^= 1
        (folder / "train.bin").write_bytes(content)

    assert "is no finished data folder" in message(cram.load_data, tmp_path / "none")
    for change in (lambda path: path.unlink(), lambda path: path.write_text("{}"), lambda path: path.write_text("not json")):
        assert "meta.json is missing, or of another version" in broken(lambda folder, change=change: change(folder / "meta.json"))
    assert "train.bin does not match the manifest (it is missing, or its checksum" in broken(flip)
    assert "val.bin does not match the manifest" in broken(lambda folder: (folder / "val.bin").unlink())
    assert "tokenizer.tiktoken does not match" in broken(lambda folder: (folder / "tokenizer.tiktoken").write_text("x"))


def test_messages_of_cram(tmp_path, data, trained, capsys):
    def run(*flags):
        return message(cram.main, ["--data", str(data), "--out", str(tmp_path / "o"), *flags])

    for budget in ("5", "5 minutes", "m", "-3s", "0s", "1e400steps", "1e308h", "5Ms"):
        assert "is not understood: expected one like 90s" in run(f"--budget={budget}")
    assert "'tarin' is not understood" in message(cram.main, ["tarin"])
    assert "expected even ones, the width even for each head" in run("--width", "100", "--heads", "3")
    for device in ("abacus", "meta", "hpu"):
        assert "cannot be used here" in run("--device", device)
    assert "mask_share 0.9 and random_share 0.5 sum to 1.4: expected at most 1" in run("--mask_share", "0.9", "--random_share", "0.5")
    assert "warmup 0.75 and cooldown 0.5 sum to 1.25: expected at most 1" in run("--warmup", "0.75")  # modern falls over half
    assert "muon_lr does nothing with the optimizer adamw" in run("--recipe", "cram", "--muon_lr", "0.02")
    for flag, word, expected in (
        ("recipe", "gpt", "bert, cram, modern"), ("size", "huge", "auto, tiny, mini, small, base, large"), ("mask_rate", "1.5", "a number from 0.001 to 1"),
        ("dtype", "int8", "auto, bf16, fp16, fp32"), ("lr", "fast", "a number from 1e-09 to 10"), ("lr", "nan", "a number from 1e-09 to 10"),
        ("layers", "1.5", "a whole number from 0 to 1000"), ("compile", "maybe", "auto, True, False"), ("resume", "maybe", "true or false"), ("positions", "auto", "sinusoidal, learned, rotary"),
        ("batch_size", "0", "a whole number from 1 to"),
    ):  # fmt: skip
        text = run(f"--{flag}", word)
        assert f"argument --{flag}: got {word!r}, expected" in text and expected in text
    assert "unrecognized arguments: --lrr" in run("--lrr", "1")
    assert not (tmp_path / "o").exists()

    assert "holds a run already" in message(cram.main, ["--data", str(data), "--out", str(trained), *SMALL])
    assert "checkpoint.pt does not exist" in run("--resume")
    resume = ["--resume", "--data", str(data), "--out", str(trained)]
    text = message(cram.main, [*resume, "--width", "64", "--recipe", "cram", "--budget", "9steps"])
    assert "width was 32 and is now 64; recipe was modern and is now cram; budget was 300steps and is now 9steps" in text
    (tmp_path / "o").mkdir()
    for content in (b"", b"not a checkpoint", (trained / "checkpoint.pt").read_bytes()[:3000]):
        (tmp_path / "o/checkpoint.pt").write_bytes(content)
        assert "is damaged, or no checkpoint" in run("--resume")
    torch.save({"format": 1, "code": Path}, tmp_path / "o/checkpoint.pt")  # a pickled object is code, and refused
    assert "is damaged, or no checkpoint" in run("--resume")
    torch.save({"format": 99}, tmp_path / "o/checkpoint.pt")
    assert "is damaged, or no checkpoint of this version" in run("--resume")
    assert "has 0 times [MASK]" in message(cram.main, ["fill", str(trained), "nothing to fill"])
    assert "at most 32 tokens" in message(cram.main, ["fill", str(trained), "word " * 60 + "[MASK]"])
    assert "expected train, bench, plot OUT ... or fill OUT" in message(cram.main, ["fill", str(trained)])


def test_resume_refuses_other_data(tmp_path, trained, stories):
    source = write_jsonl(tmp_path / "s.jsonl", stories[:300])
    prepare_data.main(["--source", str(source), "--out", str(tmp_path / "d"), *PREPARE])
    assert "is not the data" in message(cram.main, ["--resume", "--data", str(tmp_path / "d"), "--out", str(trained)])


def test_flags_both_ways_and_help(capsys):
    given = cram.parse_flags(cram.Config, ["--lr=1e-3", "--width", "64", "--resume", "--compile=false"], "")
    assert given == {"lr": 1e-3, "width": 64, "resume": True, "compile": False}
    for main in (cram.main, prepare_data.main, finetune_glue.main):
        with pytest.raises(SystemExit) as stop:
            main(["-h"])
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in ("mask_rate", "vocab_size", "glue_dir"))
    assert "0.4 from width 256, else 0.25 (default: auto)" in " ".join(text.split()) and "(default: 0.5)" in text
    groups = [line[:-1] for line in text.rpartition("usage:")[2].splitlines() if re.fullmatch(r"\w.*:", line)]
    assert groups == ["options", "the score", "the setting [2]", "the machine"]


# ---------------------------------------------------------------------------------------------------- GLUE


def test_metrics_by_hand():
    predicted, true = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 1, 1, 0])
    assert finetune_glue.accuracy(predicted, true) == pytest.approx(4 / 6)
    assert finetune_glue.f1(predicted, true) == pytest.approx(2 / 3)  # 2 hits, 1 false, 1 missed: 4 / (4 + 1 + 1)
    # tp 2, tn 2, fp 1, fn 1: (4 - 1) / sqrt(3 * 3 * 3 * 3)
    assert finetune_glue.matthews(predicted, true) == pytest.approx(3 / 9)
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6)
    assert finetune_glue.pearson([1, 2, 3], [0, 3, 3]) == pytest.approx(3 / math.sqrt(12))
    assert finetune_glue.pearson([1, 2, 3], [5, 3, 1]) == pytest.approx(-1)
    # ranks (1, 2, 3, 4) and (1.5, 1.5, 3, 4): (3.75 + ...) / sqrt(5 * 4.5) = 4.5 / sqrt(22.5)
    assert finetune_glue.spearman([1, 10, 100, 1000], [2, 2, 3, 9]) == pytest.approx(4.5 / math.sqrt(22.5))


def ranks(values):
    """One plus the smaller values, and half of the other equal ones."""
    return [1 + sum(v < x for v in values) + (values.count(x) - 1) / 2 for x in values]


def correlation(x, y):
    """From the differences of all pairs, with no mean in it."""
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x))]
    xx, yy = (sum((z[i] - z[j]) ** 2 for i, j in pairs) for z in (x, y))
    return sum((x[i] - x[j]) * (y[i] - y[j]) for i, j in pairs) / math.sqrt(xx * yy) if xx * yy else math.nan


def test_metrics_equal_their_brute_force_twins():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(2, 30)
        p, t = ([rng.randint(0, 4) for _ in range(n)] for _ in "pt")
        for metric, expected in (("pearson", correlation(p, t)), ("spearman", correlation(ranks(p), ranks(t)))):
            assert getattr(finetune_glue, metric)(p, t) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        p, t = (np.array([value > 2 for value in side], float) for side in (p, t))
        tp, tn, fp, fn = (int(np.sum((p == a) & (t == b))) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
        scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert finetune_glue.matthews(p, t) == pytest.approx((tp * tn - fp * fn) / scale if scale else 0, abs=1e-12)
        assert finetune_glue.f1(p, t) == pytest.approx(tp / (tp + (fp + fn) / 2) if tp + fp + fn else math.nan, nan_ok=True)


def test_undefined_metrics_are_nan_and_no_number():
    true, no = np.array([1, 0, 0, 1]), np.zeros(4)
    assert math.isnan(finetune_glue.f1(no, no)) and finetune_glue.f1(no, true) == 0
    assert finetune_glue.matthews(np.ones(4), true) == 0
    for metric in (finetune_glue.pearson, finetune_glue.spearman):
        assert math.isnan(metric(np.full(1000, 0.1), np.arange(1000)))  # the mean of these is not exactly 0.1
        assert math.isnan(metric(np.array([1, 2, math.nan]), np.array([1, 2, 3])))
    for task in finetune_glue.TASKS.values():
        scores = finetune_glue.score(task, np.array([1, 0, 0, math.nan]), true)
        assert set(scores) == set(task.metrics) and all(map(math.isnan, scores.values()))


def test_pairs_are_encoded_and_cut_longest_first(trained):
    _, tokenizer, _ = cram.load_model(trained)
    tokens, lengths, cut = finetune_glue.encode([("The cat.",), ("The cat. The cat.",)], tokenizer, 32)
    one = [377, *tokenizer.encode_ordinary("the cat."), 378]
    assert tokens[0].tolist() == one + [376] * (lengths[1] - len(one)) and lengths[0] == len(one) and cut == 0
    a, b = "the cat sees " * 20, "the dog"
    (row,), _, cut = finetune_glue.encode([(a, b)], tokenizer, 32)
    row = row.tolist()
    assert len(row) == 32 and row[0] == 377 and row[-1] == 378 and row.count(378) == 2 and cut == 1
    assert row[row.index(378) + 1 : -1] == tokenizer.encode_ordinary("the dog")  # the short text stays whole
    (row,), _, _ = finetune_glue.encode([(a, a)], tokenizer, 32)
    assert row.tolist().index(378) in (15, 16) and row[31] == 378  # texts of one length are cut in turn: 29 = 14 + 15


def test_batches_hold_every_example_once_with_little_padding():
    lengths = np.random.default_rng(0).integers(4, 120, 1003)
    tokens = torch.arange(1003, dtype=torch.int32)[:, None].repeat(1, 120) + 1
    tokens[torch.arange(120) >= torch.from_numpy(lengths)[:, None]] = 0

    def run(seed):
        return list(finetune_glue.batches(tokens, lengths, 16, 0, None if seed is None else np.random.default_rng(seed)))

    for seed in (None, 1):
        batches = run(seed)
        assert sorted(i for index, _, _ in batches for i in index.tolist()) == list(range(1003))
        assert max(len(index) for index, _, _ in batches) == 16
        for index, rows, mask in batches:
            assert (mask.sum(1).numpy() == lengths[index]).all() and (rows[:, 0] == index + 1).all()
        assert sum(rows.numel() for _, rows, _ in batches) < 1.15 * lengths.sum()
    widths = [rows.shape[1] for _, rows, _ in batches[:50]]
    assert widths != sorted(widths)  # a random order, and no curriculum of lengths
    order = [index.tolist() for index, _, _ in batches]
    assert order == [index.tolist() for index, _, _ in run(1)] != [index.tolist() for index, _, _ in run(2)]


SPLITS = {"train": 160, "dev": 40, "test": 9}


def glue_rows(name, split, count, rng):
    """Lines of a file of the official layout that the stories' words can solve."""
    task, labelled = finetune_glue.TASKS[name], not split.startswith("test")
    rows = [] if name == "cola" and labelled else [["index", "extra", *task.texts, *[task.label] * labelled]]
    for i in range(count):
        yes, place = rng.random() < 0.5, rng.choice(PLACES)
        a = f'The "{"cat" if yes else "dog"} likes the fox {place}'  # a lone quote, as in the real files
        label = task.labels[yes] if task.labels else f"{5.0 * yes:.3f}"
        texts = [a, f"the wolf {place}"][: len(task.texts)]
        rows.append(["gj04", label, "", a] if name == "cola" and labelled else [str(i), "x", *texts, *[label] * labelled])
    return "".join("\t".join(row) + "\n" for row in rows)


def write_glue(folder, names=("cola", "sst2", "stsb", "rte")):
    rng = random.Random(1)
    for name in names:
        task = finetune_glue.TASKS[name]
        (folder / task.folder).mkdir(parents=True)
        for split in task.rows:
            count = SPLITS[split.partition("_")[0]]
            (folder / task.folder / f"{split}.tsv").write_text(glue_rows(name, split, count, rng))
    return folder


@pytest.fixture
def scored(tmp_path, trained):
    """A checkpoint of its own, so that its glue.json starts empty."""
    return Path(shutil.copytree(trained, tmp_path / "scored"))


FAST = ["--epochs", "5", "--batch_size", "4", "--lr", "2e-3", "--device", "cpu", "--dtype", "fp32"]


def readme_row(text):
    """{column and metric: score} of the closing table."""
    header, _, row = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return dict(zip(header, row, strict=True))


def test_all_of_glue_from_start_to_submission(tmp_path, scored, capsys):
    glue = write_glue(tmp_path / "glue", finetune_glue.TASKS)
    submit = tmp_path / "submit"
    finetune_glue.main(["--checkpoint", str(scored), "--glue_dir", str(glue), "--seeds", "1", "--submit", str(submit), *FAST])
    text = capsys.readouterr().out
    row = readme_row(text)
    assert list(row)[1:] == ["CoLA matthews", "SST-2 accuracy", "MRPC f1", "QQP f1", "STS-B pearson", "MNLI-m accuracy",
                             "MNLI-mm accuracy", "QNLI accuracy", "RTE accuracy", "GLUE average"]
    scores = [float(row[column]) for column in list(row)[1:]]
    assert min(scores) > 80 and scores[-1] == pytest.approx(sum(scores[:9]) / 9, abs=0.1), row
    assert all(f"{metric}: median" in text for metric in ("accuracy", "spearman"))
    assert f"warning: {glue}/MNLI/dev_matched.tsv has 40 examples, expected the 9815 of the official file" in text
    names = ["CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI-m", "MNLI-mm", "QNLI", "RTE"]
    with zipfile.ZipFile(submit / "submission.zip") as archive:
        assert archive.namelist() == [f"{name}.tsv" for name in names]
        for name in names:
            header, *rows = archive.read(f"{name}.tsv").decode().splitlines()
            assert header == "index\tprediction" and [row.split("\t")[0] for row in rows] == list(map(str, range(9)))
            words = {row.split("\t")[1] for row in rows}
            expected = {"MNLI-m": {"entailment", "neutral"}, "RTE": {"entailment", "not_entailment"}, "MRPC": {"0", "1"}}
            assert words <= expected.get(name, words)
    yes = ["cat" in line for line in (glue / "RTE/test.tsv").read_text().splitlines()[1:]]
    assert [line.endswith("not_entailment") for line in (submit / "RTE.tsv").read_text().splitlines()[1:]] == yes


def test_finished_runs_are_kept_and_never_mixed(tmp_path, scored, trained, capsys, monkeypatch):
    glue, calls, real = write_glue(tmp_path / "glue"), [], finetune_glue.finetune

    def finetune(task, *args):
        calls.append((task.folder, args[-1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(task, *args)

    monkeypatch.setattr(finetune_glue, "finetune", finetune)

    def run(*flags, checkpoint=scored):
        calls.clear()
        finetune_glue.main(["--checkpoint", str(checkpoint), "--glue_dir", str(glue), "--tasks", "rte,stsb", "--seeds", "2", *FAST,
                            "--epochs", "1", *flags])
        return capsys.readouterr().out

    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        run()
    assert stop.type is SystemExit and stop.value.code == 130
    assert f"\nstopped: finished runs are kept in {scored}/glue.json, and" in capsys.readouterr().out
    calls += [None] * 3  # no more interruptions
    before = (scored / "glue.json").read_text()
    monkeypatch.setattr(finetune_glue, "finetune", lambda task, *args: calls.append((task.folder, args[-1])) or real(task, *args))
    capsys.readouterr()
    text = run()
    assert calls == [("STS-B", 0), ("STS-B", 1)] and text.count("taken from") == 2
    assert json.loads((scored / "glue.json").read_text())[:2] == json.loads(before)
    assert "mean of these 2 columns" in text and "GLUE average" not in text and "median of seeds 0 to 1" in text
    again = run()
    assert not calls and readme_row(again) == readme_row(text)
    run("--submit", str(tmp_path / "submit"))  # predictions are not kept: the run in the middle is made again
    assert len(calls) == 2
    run("--lr", "1e-3")
    assert len(calls) == 4
    run("--like", str(scored), checkpoint="none")
    assert len(calls) == 4
    (glue / "RTE/dev.tsv").write_text((glue / "RTE/dev.tsv").read_text().replace("fox", "cat"))
    run()
    assert calls == [("RTE", 0), ("RTE", 1)]
    state = torch.load(scored / "checkpoint.pt", weights_only=True)
    state["model"]["final_norm.weight"] += 1
    torch.save(state, scored / "checkpoint.pt")
    run()
    assert len(calls) == 4


@pytest.fixture
def score_rte(tmp_path, scored, monkeypatch):
    """Scores RTE with two seeds and perfect predictions instead of fine-tuning; and the seeds that were made so."""
    glue, seeds = write_glue(tmp_path / "glue", ["rte"]), []

    def finetune(task, data, *args):
        seeds.append(args[-1])
        return {"dev": data["dev"][2].astype(float), "test": np.ones(9)}

    def run(*flags):
        seeds.clear()
        finetune_glue.main(["--checkpoint", str(scored), "--glue_dir", str(glue), "--tasks", "rte", "--seeds", "2", *FAST, *flags])

    monkeypatch.setattr(finetune_glue, "finetune", finetune)
    return run, seeds


def test_sigterm_ends_fine_tuning_like_ctrl_c(scored, score_rte, capsys, monkeypatch):
    run, seeds = score_rte
    perfect, before = finetune_glue.finetune, signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not handled"))

    def finetune(*args):
        if args[-1] == 1:
            signal.raise_signal(signal.SIGTERM)
        return perfect(*args)

    monkeypatch.setattr(finetune_glue, "finetune", finetune)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
            run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.type is SystemExit and stop.value.code == 130 and "the same command goes on" in capsys.readouterr().out.splitlines()[-1]
    assert [entry["seed"] for entry in json.loads((scored / "glue.json").read_text())] == [0]
    monkeypatch.setattr(finetune_glue, "finetune", perfect)
    run()
    assert seeds == [1]


def test_the_checkpoint_before_is_scored_where_it_is_alone(scored, score_rte):
    os.replace(scored / "checkpoint.pt", scored / "checkpoint.prev.pt")  # killed between two renames
    run, seeds = score_rte
    run()
    assert len(seeds) == 2 and (scored / "glue.json").is_file()


@pytest.mark.parametrize("content", [
    b"", b'[{"task": "rte", "se', b"\xff\xfe\xff", b"{}", b"null", b"7", b'"[]"', b"[7]", b"[{}]", b'[{"task": "rte"}]',
    b'[{"task": ["rte"], "scores": {"RTE": {"accuracy": 0.5}}, "seconds": 1.0}]',
    b'[{"task": "rte", "scores": {"RTE": {}}, "seconds": 1.0}]', b'[{"task": "rte", "scores": {}, "seconds": 1.0}]',
    b'[{"task": "rte", "scores": {"RTE": {"accuracy": "0.5"}}, "seconds": 1.0}]',
    b'[{"task": "rte", "scores": {"RTE": {"accuracy": 0.5}}, "seconds": null}]',
])  # fmt: skip
def test_a_damaged_glue_json_is_named_and_kept(scored, score_rte, content):
    run, seeds = score_rte
    (scored / "glue.json").write_bytes(content)
    text = message(run)
    assert f"{scored}/glue.json is damaged" in text and "delete or rename it" in text and not seeds
    assert (scored / "glue.json").read_bytes() == content


def writes_at_most(monkeypatch, name, size):
    """From now on finetune_glue can write no more than the first `size` bytes of the file `name`, as on a full disk."""
    write_whole, limits = cram.write_whole, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path, write):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size if Path(path).name == name else limits[0], limits[1]))
        try:
            write_whole(path, write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(finetune_glue, "write_whole", limited)


def test_a_full_disk_leaves_whole_runs_and_predictions(tmp_path, scored, score_rte, monkeypatch):
    run, _ = score_rte
    writes_at_most(monkeypatch, "glue.json", 500)  # one run fits
    text, submit = message(run), tmp_path / "submit"
    assert "File too large" in text and f"finished runs are kept in {scored}/glue.json" in text
    assert [entry["seed"] for entry in json.loads((scored / "glue.json").read_text())] == [0]
    submit.mkdir()
    for name, size in (("RTE.tsv", 40), ("submission.zip", 40)):
        (submit / name).write_text("of another model")
        writes_at_most(monkeypatch, name, size)
        assert "File too large" in message(run, "--submit", str(submit))
        assert (submit / name).read_text() == "of another model"
    assert not list(tmp_path.glob("*/*.part"))


def test_folders_that_cannot_be_written_show_before_the_first_run(tmp_path, scored, score_rte):
    run, seeds = score_rte
    (tmp_path / "file").touch()
    assert "Not a directory" in message(run, "--submit", str(tmp_path / "file/submit")) and not seeds
    (scored / "glue.json.part").mkdir()  # in the way of glue.json; to root no folder is read-only
    assert "Is a directory" in message(run) and not seeds and not (scored / "glue.json").exists()
    (scored / "glue.json.part").rmdir()
    assert "Not a directory" in message(run, "--glue_dir", str(tmp_path / "file")) and not seeds


def test_the_speed_of_a_task_is_that_of_its_runs(scored, score_rte, capsys):
    run, _ = score_rte
    run()
    runs = json.loads((scored / "glue.json").read_text())
    (scored / "glue.json").write_text(json.dumps([{**entry, "seconds": 1.0 + 2 * entry["seed"]} for entry in runs]))
    capsys.readouterr()
    run()  # two runs of 5 epochs of 160 examples in 1 and 3 seconds
    assert "RTE      accuracy: median 100.0, range 100.0 to 100.0, 2 seeds, 4 s, 400 training examples/s" in capsys.readouterr().out


def test_the_seed_in_the_middle_is_submitted(tmp_path, scored, monkeypatch):
    glue = write_glue(tmp_path / "glue", ["rte"])

    def finetune(task, data, *args):  # the dev set as it is, but for 10 * (3, 1, 2) errors; test: all of label `seed`
        dev, errors = data["dev"][2].astype(float), 10 * [3, 1, 2][args[-1]]
        dev[:errors] = 1 - dev[:errors]
        return {"dev": dev, "test": np.full(9, float(args[-1] == 2))}

    monkeypatch.setattr(finetune_glue, "finetune", finetune)
    finetune_glue.main(["--checkpoint", str(scored), "--glue_dir", str(glue), "--tasks", "rte", "--seeds", "3", "--submit",
                        str(tmp_path), *FAST])
    assert (tmp_path / "RTE.tsv").read_text().count("not_entailment") == 9


def test_an_undefined_score_is_called_so(tmp_path, scored, monkeypatch, capsys):
    glue = write_glue(tmp_path / "glue", ["stsb", "rte"])
    real = finetune_glue.predict
    monkeypatch.setattr(finetune_glue, "predict", lambda model, *args: real(model, *args) * math.nan)
    finetune_glue.main(["--checkpoint", str(scored), "--glue_dir", str(glue), "--tasks", "stsb,rte", "--seeds", "1", *FAST, "--epochs", "1"])
    text = capsys.readouterr().out
    assert list(readme_row(text).values())[1:] == ["nan"] * 3 and "nan: undefined" in text


def test_fine_tuning_repeats_with_its_seed_and_starts_from_the_weights(tmp_path, trained):
    glue, task = write_glue(tmp_path / "glue", ["stsb"]), finetune_glue.TASKS["stsb"]
    options = finetune_glue.Options(epochs=1, lr=4e-5)
    model, tokenizer, _ = cram.load_model(trained, dropout=0.1)
    data = {}
    for split in ("train", "dev"):
        texts, labels, _ = finetune_glue.read_split(glue / f"STS-B/{split}.tsv", task)
        data[split] = (*finetune_glue.encode(texts, tokenizer, 32)[:2], labels)

    def run(seed, scratch=False):
        return finetune_glue.finetune(task, data, model, scratch, 376, options, torch.device("cpu"), "fp32", seed)["dev"].tolist()

    first = run(0)
    assert first == run(0) != run(1)
    scratch = run(0, scratch=True)
    assert scratch != first and scratch == run(0, scratch=True) != run(1, scratch=True)
    assert np.std(first) > 0


def test_padding_changes_no_prediction(trained):
    model, tokenizer, _ = cram.load_model(trained, dropout=0.1)
    classifier = finetune_glue.Classifier(model, 1)
    tokens, lengths, _ = finetune_glue.encode([(f"the cat {'sees the dog ' * (i % 4)}",) for i in range(20)], tokenizer, 32)
    args = (376, torch.device("cpu"), "fp32")
    together = finetune_glue.predict(classifier, tokens, lengths, *args)
    alone = [finetune_glue.predict(classifier, tokens[i : i + 1, : lengths[i]], lengths[i : i + 1], *args)[0] for i in range(20)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(lengths)) == 4


def test_malformed_rows_of_qqp_are_counted_and_others_refused(tmp_path, capsys):
    glue = write_glue(tmp_path, ["qqp", "qnli"])
    for name in ("qqp", "qnli"):
        task = finetune_glue.TASKS[name]
        path = glue / task.folder / "train.tsv"
        path.write_text(path.read_text() + "7\tx\thow?\n8\tx\ta\tb\tc\t1\n")
        if name == "qqp":
            texts, labels, skipped = finetune_glue.read_split(path, task)
            assert len(texts) == len(labels) == 160 and skipped == 2
        else:
            assert "line 162 has 3 columns, expected 5" in message(finetune_glue.read_split, path, task)


@pytest.fixture
def glue_server(tmp_path, monkeypatch):
    """A folder that a local HTTP server shows in the place of GLUE's; and the paths it was asked for."""
    root, asked = tmp_path / "served", []
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            asked.append(self.path)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(finetune_glue, "GLUE_URL", f"http://127.0.0.1:{httpd.server_port}/")
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    yield root, asked
    httpd.shutdown()


def serve_zip(root, name, members):
    (root / "glue/data").mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root / "glue/data" / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, text in members.items():
            archive.writestr(member, text)


def test_a_task_is_downloaded_once(tmp_path, trained, glue_server):
    root, asked = glue_server
    rte, glue = finetune_glue.TASKS["rte"], tmp_path / "glue"
    files = {split: glue_rows("rte", split, 5, random.Random(0)) for split in rte.rows}
    serve_zip(root, "RTE.zip", {"RTE/original/x.txt": "x"} | {f"RTE/{split}.tsv": text for split, text in files.items()})
    finetune_glue.fetch(glue / "RTE", rte)
    assert {path.stem: path.read_text() for path in (glue / "RTE").iterdir()} == files and len(asked) == 1
    finetune_glue.load_task(rte, finetune_glue.Options(glue_dir=str(glue)), cram.load_model(trained)[1], 32)
    assert len(asked) == 1 and not (glue / "RTE.part").exists()
    (glue / "RTE/dev.tsv").unlink()
    text = message(finetune_glue.main, ["--checkpoint", str(trained), "--glue_dir", str(glue), "--tasks", "rte"])
    assert "RTE/dev.tsv cannot be read ([Errno 2]" in text and f"move {glue}/RTE away" in text and len(asked) == 1


def test_mrpc_is_built_from_its_files(tmp_path, glue_server, monkeypatch):
    root, _ = glue_server
    mrpc, header = finetune_glue.TASKS["mrpc"], "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = [f'{i % 2}\t{i}\t{i + 50}\tone "{i}\ttwo {i}\r\n' for i in range(8)]
    texts = [header + "".join(rows), header + "".join(rows[:3]).replace("1\t1\t", "SECRET\t1\t"), "2\t52\n5\t55\n3\t99\n"]
    for name, text in zip(mrpc.sources, texts, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    assert "another checksum" in message(finetune_glue.fetch, tmp_path / "MRPC", mrpc)
    monkeypatch.setattr(mrpc, "sources", {name: cram.sha256(root / name) for name in mrpc.sources})
    finetune_glue.fetch(tmp_path / "MRPC", mrpc)
    train, dev, test = (finetune_glue.read_split(tmp_path / f"MRPC/{split}.tsv", mrpc) for split in ("train", "dev", "test"))
    assert train[0] == [(f'one "{i}', f"two {i}") for i in (0, 1, 3, 4, 6, 7)] and train[1].tolist() == [0, 1, 1, 0, 0, 1]
    assert dev[0] == [('one "2', "two 2"), ('one "5', "two 5")] and dev[1].tolist() == [0, 1]
    assert len(test[0]) == 3 and test[1] is None and "SECRET" not in (tmp_path / "MRPC/test.tsv").read_text()


def test_bad_archives_leave_nothing_behind(tmp_path, trained, glue_server):
    root, _ = glue_server
    rte, outside = finetune_glue.TASKS["rte"], tmp_path / "evil.tsv"
    good = {f"RTE/{split}.tsv": glue_rows("rte", split, 500, random.Random(0)) for split in rte.rows}

    def problem(number):
        glue = tmp_path / f"glue{number}"
        text = message(finetune_glue.main, ["--checkpoint", str(trained), "--glue_dir", str(glue), "--tasks", "rte"])
        assert not (glue / "RTE").exists() and not outside.exists()
        return text

    assert "answered 404" in problem(0)
    for number, name in enumerate(("../../evil.tsv", "RTE/../../../evil.tsv", "/tmp/evil.tsv", "C:\\evil.tsv", "..\\evil.tsv"), 1):
        serve_zip(root, "RTE.zip", good | {name: "x"})
        assert "a path out of its folder" in problem(number)
    serve_zip(root, "RTE.zip", {"RTE/train.tsv": "x"})
    assert "RTE/dev.tsv" in problem(10)
    serve_zip(root, "RTE.zip", good)
    path = root / "glue/data/RTE.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "RTE.zip is damaged" in problem(11)
    path.write_bytes(whole[:200] + bytes(50) + whole[250:])
    assert "RTE.zip is damaged" in problem(12)
    path.write_text("<html>")
    assert "RTE.zip is damaged" in problem(13)
    path.write_bytes(whole[:-4] + b"\xff" + whole[-3:])  # a directory before the start of the file
    assert "RTE.zip is damaged" in problem(14)


def test_messages_of_finetune(tmp_path, trained, glue_server):
    def run(*flags):
        return message(finetune_glue.main, ["--checkpoint", str(trained), "--glue_dir", str(tmp_path), *flags])

    assert "unknown task 'mnnli'" in run("--tasks", "cola,mnnli")
    for flag, value in (("seeds", "0"), ("epochs", "-1"), ("lr", "0"), ("lr", "nan"), ("batch_size", "0")):
        assert f"argument --{flag}: got {value!r}, expected" in run(f"--{flag}={value}")
    assert "CoLA.zip: the server answered 404" in run()
    assert "checkpoint.pt does not exist" in message(finetune_glue.main, ["--checkpoint", str(tmp_path / "no")])
    for content in (b"no checkpoint", b""):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert "no checkpoint of this version" in message(finetune_glue.main, ["--checkpoint", str(tmp_path)])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint.pt")
    assert "no checkpoint of this version" in message(finetune_glue.main, ["--checkpoint", "none", "--like", str(tmp_path)])
    glue = write_glue(tmp_path)
    for content, expected in [
        ("sentence\tgrade\nfine\t1\n", "has no column 'label'"), ("", "an empty file"), ("sentence\tlabel\n", "no examples"),
        ("sentence\tlabel\nfine\t2\n", "has the label '2': expected 0 or 1"), ("sentence\tlabel\nfine\n", "line 2 has 1 columns"),
    ]:  # fmt: skip
        (glue / "SST-2/train.tsv").write_text(content)
        assert expected in run("--tasks", "sst2")
    (glue / "SST-2/train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    assert "can't decode byte 0xff" in run("--tasks", "sst2")
    for label in ("5.5", "nan", "-1", "good"):
        (glue / "STS-B/dev.tsv").write_text(f"sentence1\tsentence2\tscore\na\tb\t{label}\n")
        assert f"has the label '{label}': expected a number from 0 to 5" in run("--tasks", "stsb")


# -------------------------------------------------------------------------------------------------- README


def readme_commands():
    """The commands of the README's code blocks that call our scripts, as lists of words."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(part) for line in lines for part in line.split("&&")]
    words = [["python", *w[w.index("cram.py") :]] if w[:1] == ["torchrun"] else w for w in words]
    return [w for w in words if w[:1] == ["python"]]


README = (HERE / "README.md").read_text()


def test_the_commands_of_the_readme_run(tmp_path, data, monkeypatch, capsys):
    """All of them, in their order, in a fresh folder, with small models, budgets and files."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("docs", "c4", "corpus8k"):
        os.symlink(data, f"data/{name}")
    os.symlink(HERE / "assets", "assets")
    monkeypatch.setitem(SPLITS, "train", 16)
    write_glue(Path("data/glue"), finetune_glue.TASKS)
    Path("my_texts").mkdir()
    rng = random.Random(1)
    Path("my_texts/a.txt").write_text(" ".join(story(rng, 1000 + i) for i in range(300)))
    write_jsonl(Path("notes.jsonl"), [story(rng, 2000 + i) for i in range(300)])
    commands = readme_commands()
    assert {words[1] for words in commands} == {"cram.py", "prepare_data.py", "finetune_glue.py"} and len(commands) > 20
    for _, script, *words in commands:
        if "c4" in words:  # test_c4_is_downloaded_and_prepared runs it
            prepare_data.check_options(prepare_data.Options(**cram.parse_flags(prepare_data.Options, words, "")))
        elif script == "prepare_data.py":
            prepare_data.main([*words, *PREPARE])
        elif script == "finetune_glue.py":
            finetune_glue.main([*words, *FAST, "--epochs", "1", "--seeds", "1"])
        elif words[:1] == ["plot"]:
            cram.main([*words, "--to", "drawn.svg"])
            assert xml.etree.ElementTree.parse("drawn.svg")
        elif words[:1] == ["fill"]:
            cram.main(words)
        elif "--resume" in words:
            cram.main([*words, "--device", "cpu"])
        else:
            words = [word for word in words if word != "--compile"]  # takes a minute
            small = [*SMALL, "--size", "tiny", "--mask_rate", "0.25"]
            cram.main([*words, *small] if words[:1] == ["bench"] else [*words, *small, "--budget", "4steps", "--overwrite"])
    assert "under the unigram line" in capsys.readouterr().out


def test_the_readme_points_at_what_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (HERE / target).exists(), target
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)", README, re.MULTILINE)}
    assert {a for a in re.findall(r"\]\(#([^)]+)\)", README)} <= anchors | set(re.findall(r'id="([^"]+)"', README))
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 20
    for name, file, line in links:
        text = (HERE / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), f"{file}#L{line} is no longer {name}: {text}"


def test_the_losses_of_the_readme_are_those_of_its_logs():
    """In a table a link's text is the loss of its log, or the row has the median, and the range, of the logs it links."""
    def last_loss(log):
        with open(HERE / log, newline="") as file:
            return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]][-1]

    checked = 0
    for line in README.splitlines():
        links = re.findall(r"\[([^\]]+)\]\((assets/[^)]+\.csv)\)", line) if line.startswith("|") else []
        alone = [(text, log) for text, log in links if "." in text]
        for text, log in alone:
            assert text == f"{last_loss(log):.2f}", line
        if losses := [last_loss(log) for text, log in links if "." not in text]:
            for figure in (f"{np.median(losses):.2f}", *[f"({min(losses):.2f} to {max(losses):.2f})"] * (len(losses) > 1)):
                assert figure in line, (figure, line)
        checked += len(links)
    assert checked > 60


def test_the_messages_that_the_readme_explains_exist():
    source = "".join((HERE / name).read_text() for name in ("cram.py", "prepare_data.py", "finetune_glue.py"))
    table = README[README.index("| the message says |") : README.index("## Tests")]
    fragments = [part for row in table.splitlines()[2:] if row.startswith("|") for part in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(fragments) > 15
    for fragment in set(fragments) - {"unrecognized arguments"}:  # argparse's
        assert fragment in source, fragment
