"""What the scripts promise, checked offline on a CPU by pytest, and each part against something
independent: a closed form, float64, a twin, worked numbers."""

import csv
import gzip
import http.server
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from functools import partial
from itertools import chain, count, pairwise, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cram
import finetune_glue
import prepare_data
from finetune_glue import TASKS, accuracy, f1, matthews, pearson

HERE = Path(cram.__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# A small language with a rule in it: a sentence names the same animal at both of its ends.
ANIMALS = ["cat", "dog", "horse", "fox", "bear", "wolf", "duck", "goose"]
VERBS = ["sees", "hears", "likes", "follows", "feeds", "finds"]
PLACES = ["in the garden", "near the river", "behind the old house", "under a tree"]


def story(rng, number):
    """A document of a few sentences."""
    sentences = [f"Story number x{number:04}y."]
    for _ in range(rng.randint(3, 9)):
        a, b = rng.sample(ANIMALS, 2)
        sentences.append(f"The {a} {rng.choice(VERBS)} the {b} {rng.choice(PLACES)}, says the {a}.")
    return " ".join(sentences)


@pytest.fixture(scope="session")
def stories():
    rng = random.Random(0)
    return [story(rng, number) for number in range(400)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


PREPARE = "--vocab_size 380 --seq_len 32 --workers 1 --val_share 0.1 --filter 0.9".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory, stories):
    """A small data folder made from the stories."""
    folder = tmp_path_factory.mktemp("data")
    source = write_jsonl(folder / "stories.jsonl", stories)
    prepare_data.main(["--source", str(source), "--out", str(folder / "stories"), *PREPARE])
    return folder / "stories"


SMALL = "--width 32 --heads 2 --ffn_width 64 --layers 2 --dtype fp32 --device cpu".split()
SMALL += "--micro_batch 4 --batch_size 8 --lr 5e-3".split()


def words_of(data, out, budget, *flags):
    """The flags of a small run; one given here takes the place of the same in SMALL."""
    values = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
    words = [str(word) for word in ("--data", data, "--out", out, "--budget", budget)]
    for name in values.keys() - set(flags):
        words += [name, values[name]]
    return words + [str(flag) for flag in flags]


def run_cram(data, out, budget, *flags):
    """Trains a small model in this process; returns its folder."""
    cram.main(words_of(data, out, budget, *flags))
    return Path(out)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, data):
    """A finished run on the stories, of 300 steps; --out may name the checkpoint to be."""
    return run_cram(data, tmp_path_factory.mktemp("out") / "run/checkpoint.pt", "300steps").parent


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """The picture at the end of a run takes a process of its own: `trained` alone draws it."""
    monkeypatch.setattr(cram, "run_script", lambda *_, **__: 0)


def small_model(vocab_size=50, seq_len=16, **settings):
    """(model, its Config)."""
    torch.manual_seed(0)
    shape = {"size": "tiny", "layers": 2, "width": 32, "heads": 2, "ffn_width": 64}
    cfg = cram.make_config({**shape, "batch_size": 8, **settings})
    return cram.Model(cfg, vocab_size, seq_len).eval(), cfg


def log_of(out):
    return list(csv.DictReader((Path(out) / "log.csv").read_text().splitlines()))


def message(call, *args):
    """The sentence with which a call stops; it must be one line and an exit, not a traceback."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    text = str(stop.value)
    assert text.startswith("error: ") and "\n" not in text, text
    return text


def script(*words, **settings):
    """A script run as a user does, in the repository: a CompletedProcess with its output."""
    words = [sys.executable, *(str(word) for word in words)]
    settings = {"cwd": HERE, "env": ONE_THREAD, "capture_output": True, "text": True, **settings}
    return subprocess.run(words, check=False, timeout=120, **settings)


def bash(line, **variables):
    """A line of a shell, in the repository: a CompletedProcess with its output."""
    how = {"cwd": HERE, "env": {**ONE_THREAD, **variables}, "capture_output": True, "text": True}
    return subprocess.run(["bash", "-c", line], check=False, timeout=120, **how)


# Text is normalised and cut into tokens as the paper does ----------------------------------------
def test_normalise_is_the_papers():
    text = "  Ça   va,\tNAÏVE Ångström \n\n “été” \x00ok…"
    assert cram.normalise(text) == "ca va, naive angstrom ete ok"
    assert cram.normalise("") == cram.normalise("日本") == ""


def brute_force_bpe(words, merges):
    tokens = [bytes([i]) for i in range(256)]
    words = [[list(word.encode()), n] for word, n in words.items()]
    while len(tokens) < 256 + merges:
        pairs = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < 2:
            break
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = tokens[pair[0]] + tokens[pair[1]]
        if merged not in tokens:
            tokens.append(merged)
        for word, _ in words:
            for j in range(len(word) - 1):
                if tuple(word[j : j + 2]) == pair:
                    word[j : j + 2] = [tokens.index(merged)]
    return tokens


def test_bpe_equals_its_brute_force_twin():
    rng = random.Random(0)
    for alphabet in ["ab", "abc", "abcdefgh"] * 4:  # few letters: many ties and runs
        words = Counter("".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(60))
        assert prepare_data.learn_bpe(words, 60) == brute_force_bpe(words, 60)


def load(folder):
    meta, train, val = cram.load_data(folder)
    tokenizer = cram.load_tokenizer((folder / "tokenizer.tiktoken").read_text(), meta["pattern"])
    return meta, tokenizer, {"train": np.array(train), "val": np.array(val)}


def test_the_tokenizer_gives_back_what_it_encoded(data, stories):
    _, tokenizer, _ = load(data)
    for text in [*stories[:20], "it's 12345 (x+y)*z != [MASK] \\ ~ ``quoted'' don't  we'll"]:
        text = cram.normalise(text)
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < 376  # a special never comes out of text, not even of the letters [MASK]
        pieces = re.findall(cram.PATTERN, text)  # Python cuts as tiktoken does
        assert [i for piece in pieces for i in tokenizer.encode_ordinary(piece)] == ids


# Rows are the documents, split and ordered as asked ----------------------------------------------
def words_for(source, out, **flags):
    """The command line of a small preparation, some of its usual flags changed."""
    given = dict(zip(PREPARE[::2], PREPARE[1::2], strict=True))
    given |= {f"--{name}": value for name, value in flags.items()}
    words = ["--source", source, "--out", out, *(word for pair in given.items() for word in pair)]
    return [str(word) for word in words]


def prepare(source, out, **flags):
    Path(out).mkdir()  # an empty folder is as good as none
    prepare_data.main(words_for(source, out, **flags))
    return out


@pytest.fixture
def source(tmp_path, stories):
    return write_jsonl(tmp_path / "s.jsonl", stories)


def test_rows_are_the_documents_and_none_is_on_both_sides(data, stories):
    meta, tokenizer, rows = load(data)
    sep = meta["special_tokens"]["[SEP]"]
    tokens = [[*tokenizer.encode_ordinary(cram.normalise(text)), sep] for text in stories]
    stream = np.array(list(chain.from_iterable(tokens)), "<u2").tobytes()
    seen = {}
    for split in rows:
        assert all(row.tobytes() in stream for row in rows[split] if sep not in row)
        text = " ".join(tokenizer.decode(row.tolist()) for row in rows[split])
        seen[split] = set(re.findall(r"x(\d{4})y", text))
    assert len(seen["val"]) > 20 and len(seen["train"]) > 300
    assert not seen["train"] & seen["val"]


def test_rows_are_ordered_as_asked(tmp_path, source):
    train = {}
    for how in ("sentences", "prevalence", "none"):
        _, tokenizer, rows = load(prepare(source, tmp_path / how, sort=how))
        train[how] = rows["train"]
        assert sorted(map(bytes, rows["train"])) == sorted(map(bytes, train["sentences"]))
    counts = np.bincount(train["none"].ravel(), minlength=380) + 1.0
    scores = np.log(counts / counts.sum())[train["prevalence"]].mean(1)
    assert (np.diff(scores) < 1e-5).all() and scores[0] > scores[-1]
    stops = [tokenizer.decode(row.tolist()).count(".") for row in train["sentences"]]
    assert stops == sorted(stops, reverse=True) and stops[0] > stops[-1]
    assert train["none"].tobytes() != train["sentences"].tobytes()


def test_sorting_in_parts_equals_sorting_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 500, (2000, 16), np.uint16)
    score = rng.integers(0, 9, 500)  # many equal sums
    prepare_data.sort_rows(rows, tmp_path / "sorted", score, most=300)
    order = np.argsort(score[rows].sum(1), kind="stable")
    assert (np.fromfile(tmp_path / "sorted", "<u2").reshape(-1, 16) == rows[order]).all()


def test_the_files_do_not_depend_on_the_workers(tmp_path, data, source, monkeypatch):
    monkeypatch.setattr(prepare_data, "CHUNK", 4000)  # so that there are chunks to share
    prepare(source, tmp_path / "three", workers=3)
    for name in ("train.bin", "val.bin", "tokenizer.tiktoken"):
        assert (tmp_path / "three" / name).read_bytes() == (data / name).read_bytes()


def test_the_manifest_says_what_is_there(data):
    meta, _, rows = load(data)
    assert meta["rows"] == {split: len(rows[split]) for split in rows}
    assert meta["options"]["sort"] == "sentences"  # the paper's final order is the default
    assert meta["tokens"] == {split: rows[split].size for split in rows}
    assert meta["special_tokens"] == {"[PAD]": 376, "[CLS]": 377, "[SEP]": 378, "[MASK]": 379}
    for name, file in meta["files"].items():
        assert file["sha256"] == prepare_data.sha256(data / name)
    assert sorted(os.listdir(data)) == sorted([*meta["files"], "meta.json"])
    counts = np.bincount(rows["train"].ravel(), minlength=380) + 1
    expected = -np.log(counts / counts.sum())[rows["val"]].mean()
    assert meta["unigram_nats"] == pytest.approx(expected, abs=1e-9)


# What is read, dropped and passed over is said ---------------------------------------------------
def test_documents_are_dropped_and_counted(tmp_path, stories):
    more = [stories[3], stories[4].upper(), "too short", "", "q9#" * 100]
    source = write_jsonl(tmp_path / "a.jsonl", [*stories, *more])
    source.write_text(source.read_text().replace("\n", "\n\n \n"))  # blank lines are none
    documents = load(prepare(source, tmp_path / "d", filter=0.8))[0]["documents"]
    assert list(documents.values()) == [405, 2, 1, 2, 400] and list(documents)[-1] == "kept"


def test_all_spellings_of_text_files_are_read_and_others_named(tmp_path, stories, capsys):
    folder = tmp_path / "texts"
    (folder / "deep/.git").mkdir(parents=True)
    write_jsonl(folder / "a.JSONL", stories[:100])
    write_jsonl(folder / "b.json", stories[100:397])
    (folder / "c.TXT").write_text(stories[397])
    (folder / "deep/d.txt.gz").write_bytes(gzip.compress(stories[398].encode()))
    (folder / "windows.txt").write_bytes(b"\xef\xbb\xbf" + stories[399].encode())
    for name in ("f.md", "README", "._book.txt", "deep/.git/h.txt"):
        (folder / name).write_bytes(b"\xff not read")
    (folder / "loop").symlink_to(folder)
    assert load(prepare(folder, tmp_path / "d"))[0]["documents"]["kept"] == 400
    assert "passed over 5 hidden or other files: ._book.txt, README" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["\n\n", "\n", "\r\n", "\r", " "])
def test_a_single_book_has_something_to_hold_out(tmp_path, stories, ends, monkeypatch):
    monkeypatch.setattr(prepare_data, "MAX_BYTES", 9000)  # it is read in parts
    (tmp_path / "book.txt").write_bytes(ends.join(stories).encode())
    auto = {"val_share": "auto", "filter": "auto"}
    meta, _, rows = load(prepare(tmp_path / "book.txt", tmp_path / "d", **auto))
    assert meta["documents"]["read"] > 50 and len(rows["val"]) > 0
    assert 34000 < sum(meta["tokens"].values()) < 35000  # all of it
    halvings = 15 - math.log2(380)  # from the vocabulary to which the paper's 0.25 belongs
    assert meta["options"]["filter"] == pytest.approx(0.25 + 0.007 * halvings**2)


def test_docstrings_are_read_without_importing(tmp_path):
    code, bad = tmp_path / "code.py", tmp_path / "bad.py"
    code.write_text('"""Top."""\nraise SystemExit\nclass A:\n    def f(self):\n        "Inner."\n')
    bad.write_text("print 'python 2'")
    assert prepare_data.docstrings([bad, code]) == ["Top.", "Inner."]


# Downloads arrive whole --------------------------------------------------------------------------
@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local server that plays a list of answers, the last one for ever; and what it was asked."""
    texts = [f"document {i} of a shard, with {random.randbytes(100).hex()}" for i in range(3000)]
    content = gzip.compress(write_jsonl(tmp_path / "shard.jsonl", texts).read_bytes())
    plan, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers["Range"][6:-1])
            asked.append(start)
            answer = plan.pop(0) if len(plan) > 1 else plan[0]
            if answer == "late":  # another process has had all of it meanwhile
                part = next(Path("data/downloads").glob("*.part"))
                part.rename(part.with_suffix("")).write_bytes(content)
            start = 0 if answer == "no range" else start
            status = 206 if start else 200
            if isinstance(answer, int):
                status = answer
            body = content[start:] if status < 300 else b""
            self.send_response(status)
            self.send_header("Content-Type", f"text/{answer}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if answer == "drop" else body)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/c4-{{:05}}.json.gz"
    monkeypatch.setattr(prepare_data, "C4_URL", url)
    monkeypatch.setattr(prepare_data.time, "sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    yield plan, asked, content
    httpd.shutdown()


ANSWERS = [
    (["drop", "drop", "whole"], "0<<"),  # goes on where it broke off
    (["drop", 416, "whole"], "0<0"),  # what had come is no beginning of the file
    (["drop", "no range"], "0<"),  # sends all of it again
    (["drop", "late"], "0<"),
    ([429, 503, "whole"], "000"),
]


@pytest.mark.parametrize("answers, starts", ANSWERS)
def test_c4_is_downloaded_and_goes_on_where_it_broke(tmp_path, server, answers, starts):
    plan, asked, content = server
    plan += answers
    prepare("c4", tmp_path / "c4", max_docs=2000, filter=5)
    assert "".join("<" if start else "0" for start in asked) == starts
    assert [path.read_bytes() for path in (tmp_path / "data/downloads").iterdir()] == [content]
    assert load(tmp_path / "c4")[0]["documents"]["read"] == 2000
    prepare("c4", tmp_path / "more", max_docs=2500, filter=5)
    assert len(asked) == len(answers)  # the shard was kept


def test_downloads_that_fail_say_so(tmp_path, server, monkeypatch):
    plan, asked, _ = server
    words = words_for("c4", tmp_path / "c4", max_docs=10)
    for answer, tries, expected in (
        (404, 1, "the server answered 404 Not Found and no file"),
        ("html", 1, "the server answered 200 OK and no file"),
        (503, 10, "503 Service Unavailable. Check the network, or HTTPS_PROXY, and start again"),
    ):
        plan[:], asked[:] = [answer], []
        assert expected in message(prepare_data.main, words) and len(asked) == tries
    monkeypatch.setattr(prepare_data, "C4_URL", "http://127.0.0.1:9/{}.json.gz")
    assert "no connection" in message(prepare_data.main, words)
    assert not (tmp_path / "c4").exists()


# Every mistake is a sentence, and nothing is left behind -----------------------------------------
GOOD = '{"text": "a fine text of some length"}\n'
MISTAKES = [  # (name of the file, its content, what the sentence says)
    ("empty.txt", b"", "0 words of ASCII, all that is kept, too little for any"),
    ("chinese.txt", "没有一个字母。".encode() * 99, "1 documents hold 0 words of ASCII"),
    ("latin.jsonl", GOOD.encode() + b'{"text": "\xe9"}', "latin.jsonl, line 2 is"),
    ("broken.jsonl", f'{GOOD}\n{{"text": broken\n'.encode(), 'line 3 is \'{"text": broken'),
    ("array.json", b'[{"text": "a"}, {"text": "b"}]', 'expected one {"text": "a string"}'),
    ("long.jsonl", b'{"text": "' + b"x" * 3000 + b'"}', "line 1 is"),
    ("cut.jsonl.gz", gzip.compress(GOOD.encode() * 999)[:-20], "gz cannot be read as UTF-8"),
    ("picture.png", b"png", "picture.png is not there, or holds no .txt"),
    ("nowhere", None, "nowhere is not there, or holds no .txt"),
]


@pytest.mark.parametrize("name, content, expected", MISTAKES)
def test_hostile_input_is_refused(tmp_path, monkeypatch, name, content, expected):
    monkeypatch.setattr(prepare_data, "MAX_BYTES", 2500)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    text = message(prepare_data.main, words_for(tmp_path / name, tmp_path / "out/d"))
    assert expected in text and len(text) < 500
    assert list((tmp_path / "out").iterdir()) == []


def test_advice_works_when_it_is_followed(tmp_path, source):
    words = ["--source", "docs", "--source", "x.txt"]
    assert "docs and c4 stand alone" in message(prepare_data.main, words)
    assert "is the folder you are in" in message(prepare_data.main, ["--out", "."])
    text = message(prepare_data.main, words_for(source, tmp_path / "d", vocab_size=5000))
    most = re.search(r"enough for --vocab_size (\d+)", text)[1]
    text = message(prepare_data.main, words_for(source, tmp_path / "d", filter=0.01))
    assert "train has no row: give more text, or other --val_share, --filter or --seq_len" in text
    prepare(source, tmp_path / "d", vocab_size=most, filter=2)


# The folder is there and whole, or not there -----------------------------------------------------
def command(source, out, **flags):
    return [sys.executable, str(HERE / "prepare_data.py"), *words_for(source, out, **flags)]


def begun(source, out):
    """(A preparation that was stopped as soon as it had its folder, that folder)."""
    process = subprocess.Popen(command(source, out), stderr=subprocess.PIPE, text=True)
    while not list(out.parent.glob(f".{out.name}.*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    return process, *out.parent.glob(f".{out.name}.*.part")


def test_the_next_one_clears_up_after_a_killed_preparation(tmp_path, source, capsys):
    process, left = begun(source, tmp_path / "d")
    process.kill()
    process.wait()
    (left / "train.part").write_text("ours")
    (left / "notes.txt").write_text("mine")
    assert not (tmp_path / "d").exists()
    load(prepare(source, tmp_path / "d"))
    assert f"removed    {left}" in capsys.readouterr().out
    assert os.listdir(left) == ["notes.txt"]  # what is not ours stays


def test_files_of_the_user_are_never_touched(tmp_path, data, source):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for taken in (out, data, source):
        text = message(prepare_data.main, words_for(source, taken))
        assert "choose another --out" in text and "delete" not in text
    assert sorted(os.listdir(tmp_path)) == ["mine", "s.jsonl"]
    assert (out / "notes.txt").read_text() == "mine"


def test_of_two_preparations_at_once_the_first_to_finish_stays(tmp_path, source):
    process, part = begun(source, tmp_path / "d")
    prepare(source, tmp_path / "d")
    process.send_signal(signal.SIGCONT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1 and "choose another --out" in text
    assert load(tmp_path / "d") and not part.exists()


def test_a_worker_that_is_killed_is_a_sentence():
    text = message(list, prepare_data.parallel(signal.raise_signal, [signal.SIGKILL] * 20, 2))
    assert "a worker process failed (" in text and "use fewer with --workers" in text


# ---- The masks are those of the paper, and the same however the rows are cut ---------------------
def test_mask_counts_are_exact():
    rows = np.random.default_rng(0).integers(0, 46, (64, 128))
    for rate, predicted in ((0.25, 32), (0.15, 19), (0.4, 51)):
        cfg = cram.Config(mask_rate=rate)
        tokens, where, targets = cram.mask_rows(rows, np.random.default_rng(1), cfg, 50)
        assert where.shape == (64, predicted)
        assert (np.take_along_axis(rows, where, 1) == targets).all()
        assert [len(set(row)) for row in where.tolist()] == [predicted] * 64
        assert ((tokens == 49).sum(1) == round(0.8 * predicted)).all()  # [MASK]
        replaced = (tokens != rows).sum(1)
        assert (replaced <= round(0.9 * predicted)).all()  # a random token may be the one there
        assert replaced.mean() > round(0.9 * predicted) - 0.4
        assert tokens[tokens != 49].max() < 46  # none of the specials


def test_masks_are_spread_evenly_over_positions_and_vocabulary():
    rows = np.zeros((20000, 16), np.int64)
    rng, cfg = np.random.default_rng(0), cram.Config(mask_rate=0.5)
    tokens, where, _ = cram.mask_rows(rows, rng, cfg, 50)
    positions = np.bincount(where.ravel(), minlength=16) / 20000
    assert np.abs(positions - 0.5).max() < 0.015
    seen = np.bincount(tokens[(tokens > 0) & (tokens < 49)], minlength=46)[1:46]
    assert 0.8 * seen.mean() < seen.min() < seen.max() < 1.2 * seen.mean()


# ---- The model is the one of the formulas --------------------------------------------------------
def reference_logits(w, tokens, cfg, keep, looks):
    """The model in float64 from the formulas: weights, tokens (S,) -> logits (S, vocab). keep: an
    iterator of dropout's factors, as the model draws them; looks: a list for attention's shares."""
    S, W, heads = len(tokens), cfg.width, cfg.heads

    def drop(x):
        return x * next(keep).squeeze(0)

    def norm(x, name):
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-12).sqrt()
        return x * w.get(name + ".weight", 1) + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def turned(x):  # rotary positions: pairs as complex numbers, times e^(i angle)
        a, b = x.chunk(2, dim=2)
        speed = 10000.0 ** (-torch.arange(0, W / heads, 2) * heads / W)
        angle = torch.outer(torch.arange(S), speed)
        z = torch.complex(a, b) * torch.exp(1j * angle.double())
        return torch.cat((z.real, z.imag), 2)

    def attention(x, block):
        parts = linear(x, block + "qkv").chunk(3, dim=1)
        q, k, v = (part.view(S, heads, -1).transpose(0, 1) for part in parts)
        if cfg.neighbours:
            q, k = q + w[block + "qk_bias"][0], k + w[block + "qk_bias"][1]
        if cfg.positions == "rotary":
            q, k = turned(q), turned(k)
        scores = torch.exp(q @ k.mT / math.sqrt(W / heads))
        looks.append(scores / scores.sum(2, keepdim=True))
        shares = drop(looks[-1])
        return drop(linear((shares @ v).transpose(0, 1).reshape(S, W), block + "attn_out"))

    def feed_forward(x, block):
        x = linear(x, block + "ffn_in")
        x = x[:, : x.shape[1] // 2] * gelu(x[:, x.shape[1] // 2 :]) if cfg.gated else gelu(x)
        return drop(linear(x, block + "ffn_out"))

    x = w["embedding.weight"][tokens]
    if cfg.positions == "sinusoidal":
        angle = np.outer(np.arange(S), 10000.0 ** (-(np.arange(W) // 2 * 2) / W))
        table = np.where(np.arange(W) % 2, np.cos(angle), np.sin(angle))
        x = x + w["position_scale"] * torch.from_numpy(table)
    elif cfg.positions == "learned":
        x = x + w["positions"][:S]
    x = drop(norm(x, "embedding_norm"))
    for b in (f"blocks.{layer}." for layer in range(cfg.layers)):
        if cfg.norm == "pre":
            x = x + attention(norm(x, b + "attn_norm"), b)
            x = x + feed_forward(norm(x, b + "ffn_norm"), b)
        else:
            x = norm(x + attention(x, b), b + "attn_norm")
            x = norm(x + feed_forward(x, b), b + "ffn_norm")
    if cfg.norm == "pre":
        x = norm(x, "final_norm")
    if cfg.head:
        x = norm(gelu(linear(x, "head.0")), "head.2")
    return x @ w["embedding.weight"].T + w.get("decoder_bias", 0)


VARIANTS = [
    {"recipe": "cram"},
    {"recipe": "bert"},
    {"recipe": "modern"},
    {"recipe": "cram", "norm": "post"},
    {"recipe": "modern", "linear_bias": True, "gated": False, "head": True},
    {"recipe": "modern", "positions": "learned"},
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", VARIANTS)
def test_model_equals_a_float64_recomputation(settings, dropout, monkeypatch):
    """Dropout too: on embedding, attention probabilities, attention and feed-forward outputs."""
    model, cfg = small_model(**settings, dropout=dropout)
    for p in model.parameters():  # 1, 0 and small numbers would hide a mix-up
        torch.nn.init.normal_(p, mean=0.3 if p.ndim < 2 else 0, std=0.3)
    factors = []
    real = torch.nn.functional.dropout

    def noted(x, p=0.5, training=True, inplace=False):
        factors.append(real(torch.ones_like(x), p, training) if p > 0 else torch.ones(1, 1))
        return x * factors[-1]

    monkeypatch.setattr(torch.nn.functional, "dropout", noted)
    tokens = torch.randint(0, 46, (16,))
    model = model.double().train()
    where = torch.arange(16) if dropout else torch.randperm(16)[:5]  # of the last block
    got = model(tokens[None], where[None])[0]
    assert len(factors) == 1 + 3 * cfg.layers
    assert any((factor == 0).any() for factor in factors) == (dropout > 0)
    expected = reference_logits(model.state_dict(), tokens, cfg, iter(factors), [])
    assert (got - expected[where]).abs().max() < 1e-5  # the position table itself is float32


def test_heads_start_out_at_a_neighbour():
    model, cfg = small_model(seq_len=20, layers=4, width=256, heads=4)
    for block in model.blocks:
        torch.nn.init.zeros_(block.qkv.weight)  # what the tokens add
    looks, tokens = [], torch.randint(0, 46, (20,))
    reference_logits(model.double().state_dict(), tokens, cfg, repeat(torch.ones(1)), looks)
    heads = torch.cat(looks)[:, 10]  # of all blocks, from position 10
    assert (heads.argmax(1) - 10).tolist() == [-1, 1, -2, 2, -3, 3, -4, 4] * 2
    assert (heads.amax(1) > 0.35).all()  # a start, not a rule


@pytest.mark.parametrize("recipe", ["bert", "cram", "modern"])
def test_padding_does_not_change_a_sequence(recipe):
    model, _ = small_model(recipe=recipe, zero_init=False)
    tokens = torch.randint(0, 46, (3, 9))
    padded = torch.cat((tokens, torch.full((3, 7), 46)), 1)
    out = model.encode(padded, padded != 46)[:, :9]
    assert torch.allclose(out, model.encode(tokens), atol=1e-6)
    assert not torch.allclose(model.encode(padded)[:, :9], out, atol=1e-3)


def test_sparse_prediction_equals_dense():
    model, _ = small_model(recipe="bert")
    tokens = torch.randint(0, 46, (4, 16))
    where = torch.stack([torch.randperm(16)[:5] for _ in range(4)])
    targets = torch.randint(0, 50, (4, 5))
    dense = model(tokens, torch.arange(16).expand(4, 16), depth=1)  # (4, 16, 50)
    chances = torch.stack([dense[b, where[b]] for b in range(4)]).log_softmax(2)
    loss = -chances.gather(2, targets[:, :, None]).mean()
    assert model(tokens, where, targets, 1).item() == pytest.approx(loss.item(), abs=1e-5)


def test_base_is_the_papers_model():
    cfg = cram.make_config({"size": "base", "recipe": "cram"})
    with torch.device("meta"):
        model = cram.Model(cfg, 32768, 128)
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert weights == 16 * (4 * 768 * 768 + 768 * 3072 + 1536 * 768) == 94_371_840
    scores, rest = 12 * 768 * 128, 6 * (768 * 768 + 768 * 3072 + 1536 * 768)  # a block
    flops = 6 * (weights + 0.25 * 32768 * 768) + 16 * scores - 0.75 * (scores + rest)
    assert model.flops_per_token() == flops
    assert all("norm" in name for name, _ in model.named_parameters() if "bias" in name)
    assert (cfg.heads, cfg.grad_clip, cfg.weight_decay, cfg.dropout) == (12, 0.5, 0.01, 0)
    assert (cfg.lr, cfg.mask_rate, cfg.batch_ramp) == (1e-3, 0.25, 0.6)


def test_bert_is_the_fair_baseline_of_the_papers_tables():
    cfg = cram.make_config({"size": "base", "recipe": "bert"})
    assert (cfg.layers, cfg.lr, cfg.grad_clip, cfg.dropout) == (12, 5e-4, 0, 0)
    assert [cram.lr_at(p, cfg) for p in (0, 0.015, 0.03, 1)] == pytest.approx([0, 0.5, 1, 0])


def test_later_blocks_join_as_the_identity():
    for p, expected in ((0.24, [1, 2, 3, 1, 1, 4]), (0.49, [1, 2, 3, 2, 3, 8])):
        configs = [cram.Config(layers=n, shallow=0.5) for n in (1, 2, 3, 4, 6, 16)]
        assert [cram.depth_at(p, cfg) for cfg in configs] == expected
    assert cram.depth_at(0.5, cram.Config(layers=16, shallow=0.5)) == 16
    model, _ = small_model(layers=4)
    for block in model.blocks[:2]:
        torch.nn.init.normal_(block.attn_out.weight)
        torch.nn.init.normal_(block.ffn_out.weight)
    tokens = torch.randint(0, 46, (2, 16))
    assert torch.equal(model.encode(tokens), model.encode(tokens, depth=2))
    assert not torch.allclose(model.encode(tokens), model.encode(tokens, depth=1))
    saved = model.flops_per_token() - model.flops_per_token(2)
    assert saved == 2 * (6 * (4 * 32 * 32 + 32 * 64 + 32 * 32) + 12 * 32 * 16)


# ---- The optimisers are AdamW as in the paper, and Muon as in torch ------------------------------
def test_only_matrices_decay_and_muon_takes_those_of_the_blocks():
    model, cfg = small_model(recipe="cram")
    (adamw,) = cram.make_optimizers(model, cfg, "fp32").values()
    decayed, plain = adamw.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0)
    assert (len(decayed["params"]), len(plain["params"])) == (1 + 2 * 4, 1 + 2 + 2 * 4 + 2)
    assert (decayed["betas"], decayed["eps"], decayed["peak"]) == ((0.9, 0.98), 1e-12, cfg.lr)
    model, cfg = small_model(recipe="modern")
    optimizers = cram.make_optimizers(model, cfg, "fp32")
    assert [len(group["params"]) for group in optimizers["adamw"].param_groups] == [1, 8]
    matrices = {p for p in model.blocks.parameters() if p.ndim == 2}
    assert set(optimizers["muon"].param_groups[0]["params"]) == matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 8), (8, 8), (8, 24)])
def test_muon_is_torchs(shape, dtype):
    torch.manual_seed(0)
    start = torch.randn(shape)
    theirs, ours = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1)]
    optimizers.append(cram.Muon([ours], 0.02, 0.1, dtype))
    optimizers[1].param_groups[0]["lr"] = 0.02
    for _ in range(6):
        theirs.grad = torch.randn(shape)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).norm() < 0.04 * (theirs - start).norm()  # bf16 rounds at 0.4% a time


# ---- The budget drives learning rate, batch, depth and the end -----------------------------------
def test_schedule_and_ramp_are_the_papers():
    cfg = cram.make_config({"recipe": "cram", "batch_size": 8192, "size": "base"})
    for p in np.linspace(0, 1, 101):
        assert cram.lr_at(p, cfg) == pytest.approx(min(0.25 + p, 4 * (1 - p)), abs=1e-12)
    for p in np.linspace(0, 0.599, 77):  # theirs, with a unit of 8 rows for their micro-batch
        assert cram.batch_at(p, cfg) == min(8192, (math.floor(8192 * (p / 0.6) / 8) + 1) * 8)
    assert [cram.batch_at(p, cfg) for p in (0, 0.6, 1)] == [8, 8192, 8192]
    modern = cram.make_config({"size": "base"})
    rates = [cram.lr_at(p, modern) for p in (0, 0.025, 0.05, 0.5, 0.75, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 0.5, 0])


def test_budgets_are_understood_and_choose_batch_and_blocks():
    budgets = {"90s": (90, "seconds"), "1.5h": (5400, "seconds"), "2ksteps": (2000, "steps")}
    budgets |= {"50Mtokens": (5e7, "tokens"), "1e15flops": (1e15, "flops")}
    assert {text: cram.parse_budget(text) for text in budgets} == budgets
    with torch.device("meta"):
        model = cram.Model(cram.make_config({"size": "base"}), 32768, 128)
    flops = model.flops_per_token()
    rate = 1e10 * flops / 86400 / 0.3  # of a machine that makes 1e10 tokens in a day

    def chosen(budget, **settings):
        cfg = cram.make_config({"size": "base", **settings})
        cram.plan(cfg, *cram.parse_budget(budget), model, rate)
        return cfg.batch_size, cfg.shallow

    assert chosen("24h") == chosen("1440m") == chosen("10Btokens") == (8192, 0)
    assert chosen(f"{1e9 * flops}flops") == (1024, 0) and chosen("86.4s") == (16, 0.8)
    assert chosen("0.01Gtokens") == (16, 0) and chosen("1Mtokens", recipe="cram") == (8, 0)
    assert chosen("9steps") == (32, 0) and chosen("24h", shallow=0.5) == (8192, 0.5)
    weights = 94_371_840 * flops  # of the blocks of base, at the price of a token
    assert [chosen(f"{n * weights}flops")[1] for n in (7.9, 8.1)] == [0.8, 0]


def test_a_time_budget_under_a_fake_clock(tmp_path, data, monkeypatch):
    """Each look at the clock takes 10 s: stop, learning rate, ramp and saves follow it."""
    clock = count(1000, 10)
    saved = []
    monkeypatch.setattr(cram, "save_checkpoint", lambda *given: saved.append(given[2].seconds))
    monkeypatch.setattr(cram.time, "monotonic", lambda: next(clock))
    flags = ["--recipe", "cram", "--lr", "1e-3", "--batch_size", "16", "--evals", "1"]
    run_cram(data, tmp_path, "3000s", *flags)
    assert saved == [10, 620, 1230, 1840, 2450, 3000, 3000]  # every ten minutes, and at the end
    rows = log_of(tmp_path)
    progress = [float(row["progress"]) for row in rows]
    assert progress == sorted(progress) and progress[-1] == 1
    cfg = cram.make_config({"recipe": "cram"})
    for row, p in zip(rows, progress, strict=True):
        assert float(row["lr"]) == pytest.approx(1e-3 * cram.lr_at(p, cfg))
    assert (int(rows[1]["batch_rows"]), int(rows[-1]["batch_rows"])) == (8, 16)
    assert float(rows[-1]["seconds"]) == 3000


@pytest.mark.parametrize("budget", ["6000tokens", "3e9flops"])
def test_counted_budgets_overshoot_by_less_than_a_step(tmp_path, data, budget):
    run_cram(data, tmp_path, budget)
    last = log_of(tmp_path)[-1]
    amount, unit = cram.parse_budget(budget)
    spent = float(last["tokens"]) if unit == "tokens" else float(last["exaflops"]) * 1e18
    step = spent / float(last["tokens"]) * int(last["batch_rows"]) * 32
    assert amount <= spent < amount + step and float(last["lr"]) == 0


def test_validation_has_the_same_masks_whatever_the_run_hides(tmp_path, data):
    """Nothing is learnt at these rates, so only the masks could make a difference."""
    losses = []
    for rate in ("0.1", "0.25", "0.9"):
        flags = ["--lr", "1e-9", "--muon_lr", "1e-9", "--mask_rate", rate]
        run_cram(data, tmp_path / rate, "1steps", *flags)
        losses.append(float(log_of(tmp_path / rate)[-1]["val_loss"]))
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_first_blocks_train_alone_until_shallow(tmp_path, data):
    """Till then the others keep their first weights, and a token costs less."""
    flags = ["--layers", "4", "--shallow", "0.5", "--evals", "20"]
    out = run_cram(data, tmp_path / "whole", "40steps", *flags)
    model, _, _ = cram.load_model(out)
    for a, b in pairwise(log_of(out)):
        spent = (float(b["exaflops"]) - float(a["exaflops"])) * 1e18
        depth = {0: 1, 1: 2}.get(int(4 * float(a["progress"])), 4)  # a quarter, half, all
        tokens = int(b["tokens"]) - int(a["tokens"])
        assert spent / tokens == pytest.approx(model.flops_per_token(depth))
    assert model.blocks[3].ffn_out.weight.abs().max() > 0
    out = run_cram(data, tmp_path / "half", "40steps", *flags[:2], "--shallow", "0.99")
    assert cram.load_checkpoint(out)["muon"]["state"].keys() == set(range(8))
    assert cram.load_model(out)[0].blocks[1].ffn_out.weight.abs().max() > 0


def test_rows_are_read_in_order_or_shuffled(tmp_path, data, monkeypatch):
    """All of them once, then again; a run reads on from where it is."""
    read = []
    make_batches = cram.make_batches

    def noted(rows, numbers, *others):
        if len(rows) > 500:  # not the validation rows
            read.extend(numbers.tolist())
        return make_batches(rows, numbers, *others)

    monkeypatch.setattr(cram, "make_batches", noted)
    _, rows, _ = cram.load_data(data)
    disk = list(range(len(rows)))
    for shuffle in ("false", "true"):
        read.clear()
        run_cram(data, tmp_path / shuffle, "250steps", "--shuffle", shuffle)
        first, second = read[: len(rows)], read[len(rows) : 2 * len(rows)]
        assert sorted(first) == disk and first == second
        assert (first == disk) == (shuffle == "false")


# ---- Training learns, and its log and files say how ----------------------------------------------
def test_training_beats_the_unigram_line(trained, data):
    unigram = cram.load_data(data)[0]["unigram_nats"]
    rows = log_of(trained)
    names = "step seconds progress tokens exaflops lr batch_rows train_loss val_loss grad_norm"
    assert list(rows[0]) == [*names.split(" "), "tokens_per_s", "mfu"]
    assert float(rows[0]["val_loss"]) == pytest.approx(unigram, abs=0.1)  # the decoder's bias
    assert float(rows[-1]["val_loss"]) < unigram - 1.5
    assert (rows[-1]["step"], float(rows[-1]["lr"])) == ("300", 0)
    assert sum(row["val_loss"] != "" for row in rows) == 6
    assert sorted(os.listdir(trained)) == ["checkpoint.pt", "curve.svg", "log.csv"]


def test_fp16_scales_its_loss(tmp_path, data, capsys):
    """The first scales are too large for the gradient: those steps are left out."""
    out = run_cram(data, tmp_path, "12steps", "--dtype", "fp16", "--unigram_bias", "false")
    assert 1 < cram.load_checkpoint(out)["scaler"]["scale"] <= 65536
    assert float(log_of(out)[-1]["val_loss"]) < 5.5


def test_a_loss_that_is_no_number_ends_the_run_before_it_harms(tmp_path, data, monkeypatch):
    real = cram.Model.forward

    def spoilt(self, *batch):
        loss = real(self, *batch)
        return loss * math.nan if self.training and torch.rand(()) < 0.05 else loss

    monkeypatch.setattr(cram.Model, "forward", spoilt)
    text = message(run_cram, data, tmp_path, "400steps")
    assert "no finite loss at step" in text and "--resume --dtype fp32" in text
    weights = cram.load_checkpoint(tmp_path)["model"].values()
    assert all(weight.isfinite().all() for weight in weights)


# ---- A resumed run equals an uninterrupted one ---------------------------------------------------
CLOCK = ("seconds", "tokens_per_s", "mfu", "log_size")


def comparable(out):
    """All that two equal runs share: tensors, numbers, and the log but for its clock."""
    state = cram.load_checkpoint(out)
    tensors = [*state["model"].values()]
    for name in ("adamw", "muon"):
        for values in state[name]["state"].values():
            tensors += values.values()
    run = {name: value for name, value in state["run"].items() if name not in CLOCK}
    log = [{k: v for k, v in row.items() if k not in CLOCK} for row in log_of(out)]
    return tensors, run, log


def assert_equal_runs(a, b):
    (tensors_a, *numbers_a), (tensors_b, *numbers_b) = comparable(a), comparable(b)
    assert numbers_a == numbers_b and len(tensors_a) == len(tensors_b)
    assert all(torch.equal(x, y) for x, y in zip(tensors_a, tensors_b, strict=True))


def start_cram(*words, python=()):
    """A cram.py of its own, on one thread."""
    words = [sys.executable, *python, HERE / "cram.py", *(str(word) for word in words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": ONE_THREAD}
    return subprocess.Popen(words, text=True, **pipes)


def wait_for_rows(process, out, count):
    """Waits until the log has that many rows."""
    while not (out / "log.csv").exists() or len(log_of(out)) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is Unix's")
@pytest.mark.parametrize("budget", ["120steps", "31ktokens", "3e9flops"])
def test_resume_after_a_kill_equals_an_uninterrupted_run(tmp_path, data, budget):
    """Killed (SIGKILL, a real process) at a random moment and resumed: the same, bit for bit."""
    flags = ["--dropout", "0.1", "--layers", "4", "--shallow", "0.5", "--evals", "12"]
    whole = run_cram(data, tmp_path / "whole", budget, *flags)
    out = tmp_path / "killed"
    process = start_cram(*words_of(data, out, budget, *flags))
    wait_for_rows(process, out, 5)
    time.sleep(random.random() * 0.3)
    process.kill()
    process.communicate()
    assert cram.load_checkpoint(out)["run"]["progress"] < 1
    cram.main(["--resume", "--out", str(out), "--data", str(data)])
    assert_equal_runs(whole, out)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix's")
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, data, name, code):
    out = tmp_path / "a run"
    process = start_cram(*words_of(data, out, "10m"))
    wait_for_rows(process, out, 3)
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == code
    step = int(re.search(r"stopped at step (\d+)", output)[1])
    assert cram.load_checkpoint(out)["run"]["step"] == step >= 20
    advice = re.search(r"python (cram.py .*)", output)[1]
    given = cram.parse_flags(cram.Config, shlex.split(advice)[1:], "", {})
    assert given == {"resume": True, "out": str(out)}


def test_a_checkpoint_of_when_heads_started_out_copying_still_opens(tmp_path, trained):
    state = cram.load_checkpoint(trained)
    torch.save(state | {"config": state["config"] | {"copying": True}}, tmp_path / "old.pt")
    assert cram.load_model(tmp_path / "old.pt")[2]["config"] == state["config"]


def test_another_micro_batch_at_a_resume_changes_nothing_else(tmp_path, data, monkeypatch):
    flags = ["--recipe", "cram", "--batch_size", "32"]
    whole = run_cram(data, tmp_path / "whole", "40steps", *flags)
    batch_at = cram.batch_at

    def stopping(p, cfg):
        if p == 0.5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(p, cfg)

    monkeypatch.setattr(cram, "batch_at", stopping)
    with pytest.raises(SystemExit):
        run_cram(data, tmp_path / "cut", "40steps", *flags)
    monkeypatch.undo()
    out = str(tmp_path / "cut")
    cram.main(["--resume", "--data", str(data), "--out", out, "--micro_batch", "5"])
    for a, b in zip(log_of(whole), log_of(out), strict=True):
        assert a["batch_rows"] == b["batch_rows"]
        expected = pytest.approx(float(b["train_loss"]), rel=1e-3, nan_ok=True)
        assert float(a["train_loss"]) == expected


def test_a_log_that_was_edited_or_runs_ahead_does_not_stop_a_resume(tmp_path, trained, data):
    shutil.copytree(trained, tmp_path / "a")
    whole = (tmp_path / "a/log.csv").read_text()
    for text in (whole + "302,12.5,0.", whole[:200], "nonsense\n"):
        (tmp_path / "a/log.csv").write_text(text)
        cram.main(["--resume", "--out", str(tmp_path / "a"), "--data", str(data)])
        assert (tmp_path / "a/log.csv").read_text() == (whole if whole in text else text)
        spent = [cram.load_checkpoint(out)["run"]["seconds"] for out in (trained, tmp_path / "a")]
        assert spent[0] == spent[1]  # it had ended


def test_two_processes_train_like_one(tmp_path, data):
    """torchrun with two gloo processes, stopped by SIGTERM, and ended by one process alone."""
    flags = ["--batch_size", "16", "--recipe", "cram", "--lr", "1e-3", "--evals", "10"]
    whole = run_cram(data, tmp_path / "one", "80steps", *flags)
    out = tmp_path / "two"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = start_cram(*words_of(data, out, "80steps", *flags), python=torchrun)
    wait_for_rows(process, out, 5)
    process.terminate()
    process.communicate(timeout=60)
    assert cram.load_checkpoint(out)["run"]["progress"] < 1
    cram.main(["--resume", "--out", str(out), "--data", str(data)])
    a, b = log_of(whole), log_of(out)
    assert [row["tokens"] for row in a] == [row["tokens"] for row in b]
    losses = [[float(row["train_loss"]) for row in rows[1:]] for rows in (a, b)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


# ---- Nothing is lost: not to a full disk, a second run, a print, a small memory, a compiler ------
def test_a_full_disk_is_a_sentence_and_the_last_save_is_whole(tmp_path, data, monkeypatch):
    save = torch.save

    def full(state, file):
        save(state, file)
        if state["run"]["step"] > 10:
            file.truncate(99)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    text = message(run_cram, data, tmp_path, "40steps")
    assert "could not be written" in text and "No space left on device" in text
    assert cram.load_checkpoint(tmp_path)["run"]["step"] == 8
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.undo()
    cram.main(["--resume", "--out", str(tmp_path), "--data", str(data)])
    assert cram.load_checkpoint(tmp_path)["run"]["step"] == 40


def test_of_two_runs_that_start_at_once_one_is_refused(tmp_path, data):
    words = words_of(data, tmp_path / "a", "60steps")
    runs = [start_cram(*words), start_cram(*words)]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1], outputs
    assert cram.load_checkpoint(tmp_path / "a")["run"]["step"] == 60


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where, code", [("> /dev/full", 0), (">&-", 0), ("| head -n 2", 141)])
def test_no_print_ends_a_run(tmp_path, data, where, code):
    """But a reader that has seen enough stops it, as SIGTERM would: saved, to be resumed."""
    words = words_of(data, tmp_path / "a", "50steps", "--evals", "10")
    line = shlex.join([sys.executable, "cram.py", *words])
    done = bash(f"set -o pipefail; {line} {where}", PYTHONIOENCODING="ascii")
    progress = cram.load_checkpoint(tmp_path / "a")["run"]["progress"]
    assert "Traceback" not in done.stderr
    assert done.returncode == code and (progress == 1) == (code == 0)


def test_a_file_gets_few_plain_lines(tmp_path, data):
    done = script("cram.py", *words_of(data, tmp_path / "a", "90steps", "--layers", "1"))
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout and "\033" not in done.stdout
    assert len(done.stdout.splitlines()) == 11 and len(log_of(tmp_path / "a")) >= 10


def test_a_micro_batch_that_does_not_fit_is_halved(monkeypatch):
    model, cfg = small_model()
    real, sizes = cram.Model.forward, []

    def little_memory(self, tokens, *others):
        sizes.append(len(tokens))
        if len(tokens) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens, *others)

    gpu, zeros = SimpleNamespace(type="cuda"), torch.zeros  # what fit() asks of a GPU
    monkeypatch.setattr(cram.Model, "forward", little_memory)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(shape, dtype=dtype))
    autocast = torch.autocast("cpu", enabled=False)
    cfg.compile, limit = False, 20
    assert cram.fit(model, cfg, 64, gpu, autocast)[1] == 16
    assert sizes == [64, 32, 16] and all(p.grad is None for p in model.parameters())
    limit = 0
    assert "choose a smaller --size" in message(cram.fit, model, cfg, 64, gpu, autocast)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("words", ["CUDA out of", "MPS: out of", "can't allocate"])
def test_later_out_of_memory_is_a_sentence(words, error, tmp_path, data, monkeypatch):
    def forward(*_):
        raise error(f"{words} memory")

    monkeypatch.setattr(cram.Model, "forward", forward)
    assert "--resume with a smaller --micro_batch" in message(run_cram, data, tmp_path, "9steps")


def test_without_a_compiler_a_run_goes_on_uncompiled(tmp_path, data):
    words = words_of(data, tmp_path / "a", "9steps", "--compile")
    env = {**ONE_THREAD, "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = script("cram.py", *words, env=env)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stdout.splitlines() if "not compiled" in line]
    assert len(warnings) == 1 and "Traceback" not in done.stdout + done.stderr


def test_a_compiled_run_learns_like_one_that_is_not(tmp_path, data, monkeypatch):
    """And compiles few graphs for the 12 sizes of its batch: at 9 torch would give up."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    flags = ["--recipe", "cram", "--layers", 1, "--batch_size", 96, "--micro_batch", 96]
    losses = []
    for compile in ("false", "true"):
        out = run_cram(data, tmp_path / compile, "20steps", *flags, "--compile", compile)
        losses.append([float(row["val_loss"]) for row in log_of(out) if row["val_loss"]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_python_cram_py_alone_prepares_the_docs(tmp_path, monkeypatch, data):
    """On a fresh machine the folder is made by a prepare_data.py of its own."""
    calls = []

    def prepare(path, *words, **_):
        calls.append([path, *words])
        if path == "prepare_data.py":
            shutil.copytree(data, words[-1])
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cram, "run_script", prepare)
    for _ in range(2):
        cram.main(["--budget", "2steps", "--overwrite", *SMALL])
    assert calls[0] == ["prepare_data.py", "--out", "data/docs"]
    assert [call[0] for call in calls] == ["prepare_data.py", "assets/plot.py", "assets/plot.py"]


# ---- Every mistake is a sentence -----------------------------------------------------------------
MISTAKES = [
    ("--lr fast", "--lr: got 'fast', expected float from 0 to 1e+09 (-h lists all flags)"),
    ("--mask_rate 1.5", "expected float from 0 to 1"),
    ("--dropout nan", "expected float from 0 to 1"),
    ("--compile maybe", "got 'maybe', expected true or false"),
    ("--size huge", "got 'huge', expected auto or tiny or mini"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
    ("--budget 5", "budget '5' is not understood: expected one like 90s"),
    ("--budget 1e308h", "budget '1e308h' is not understood"),
    ("--width 33", "width is 33: expected a multiple of 2, twice the heads"),
    ("--device tpu", "device 'tpu' cannot be used here"),
    ("--data nowhere", "nowhere is no folder made by"),
    ("--resume --out nowhere", "nowhere/checkpoint.pt does not exist: train first"),
    ("tran", "no command 'tran': expected train, fill, plot, bench or export"),
    ("--out OUT", "holds a run: --resume goes on with it, --overwrite replaces it"),
    ("--resume --out OUT --lr 1", "--lr was 0.005 and cannot change in a resumed run"),
    ("--resume --out OUT --data OTHER", "is not the data of this run: name its folder"),
    ("--resume --out DAMAGED", "is damaged, locked, or not from this version"),
    ("--data SHORT", "train.bin is not"),
    ("--data OLD", "this version of prepare_data.py"),
    ("--data TORN", "this version of prepare_data.py"),
]


@pytest.fixture(scope="session")
def spoilt(tmp_path_factory, trained, data):
    """Folders with something wrong about them, by the names in MISTAKES."""
    root = tmp_path_factory.mktemp("spoilt")
    for name in ("OTHER", "SHORT", "OLD", "TORN"):
        shutil.copytree(data, root / name)
    meta = json.loads((data / "meta.json").read_text())
    (root / "OLD/meta.json").write_text(json.dumps({**meta, "format": 1}))
    (root / "TORN/meta.json").write_text("")  # by a power cut
    meta["files"]["train.bin"]["sha256"] = "0"
    (root / "OTHER/meta.json").write_text(json.dumps(meta))
    (root / "SHORT/train.bin").write_bytes((data / "train.bin").read_bytes()[:-2])
    shutil.copytree(trained, root / "OUT")
    (root / "DAMAGED").mkdir()
    (root / "DAMAGED/checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes()[:999])
    return root


@pytest.mark.parametrize("flags, words", MISTAKES)
def test_mistakes_of_cram(flags, words, spoilt, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = [str(spoilt / word) if word.isupper() else word for word in flags.split()]
    if "--data" not in typed and not flags.startswith("tran"):
        typed += ["--data", str(data)]
    assert words in message(cram.main, typed)


def test_flags_both_ways_and_help(capsys):
    given = cram.parse_flags(cram.Config, ["--lr=1e-3", "--seed", "4", "--resume"], "", {})
    assert given == {"lr": 1e-3, "seed": 4, "resume": True}
    auto = cram.parse_flags(cram.Config, "--lr auto --compile auto --size auto".split(), "", {})
    assert set(auto.values()) == {"auto"}
    with pytest.raises(SystemExit) as stop:
        cram.main(["-h"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and 'budget: str = "5m"' in text and "# peak rate of Muon" in text


# GLUE: the metrics are right, and what is undefined is nan ---------------------------------------
def test_metrics_by_hand():
    predicted, true = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 1, 0])
    assert accuracy(predicted, true) == pytest.approx(5 / 6)
    assert f1(predicted, true) == pytest.approx(4 / 5)  # precision 2 / 3, recall 2 / 2
    assert matthews(predicted, true) == pytest.approx(2 * 3 / math.sqrt(3 * 2 * 3 * 4))
    assert pearson([1, 2, 3], [0, 3, 3]) == pytest.approx(3 / math.sqrt(12))  # of -1 0 1, -2 1 1


def correlation(x, y):
    """From the differences of all pairs, with no mean in it."""
    dx, dy = np.subtract.outer(x, x), np.subtract.outer(y, y)
    scale = math.sqrt((dx**2).sum() * (dy**2).sum())
    return (dx * dy).sum() / scale if scale else math.nan


def test_metrics_equal_their_brute_force_twins():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, t = rng.integers(0, 5, (2, rng.integers(2, 30)))
        same = {"abs": 1e-12, "nan_ok": True}
        assert pearson(p, t) == pytest.approx(correlation(p, t), **same)


def test_undefined_metrics_are_nan():
    no = np.zeros(4)
    assert math.isnan(f1(no, no)) and f1(no, 1 - no) == 0
    assert matthews(no, np.arange(4) % 2) == 0  # as scikit-learn has it
    assert math.isnan(pearson(np.full(1000, 0.1), np.arange(1000)))  # their mean is not 0.1


def test_texts_are_encoded_and_cut_longest_first(trained):
    _, tokenizer, _ = cram.load_model(trained)
    cls, sep = (tokenizer.encode_single_token(name) for name in ("[CLS]", "[SEP]"))
    cat, dog = tokenizer.encode_ordinary(" the cat."), tokenizer.encode_ordinary(" a dog")
    assert finetune_glue.encode(["The  Cat."], tokenizer, 32) == [cls, *cat, sep, sep]
    assert finetune_glue.encode(["The cat.", "a dog"], tokenizer, 32) == [cls, *cat, sep, *dog, sep]
    long = "the cat sees " * 20
    for texts in ([long, "a dog"], ["a dog", long]):  # the short one stays whole
        tokens = finetune_glue.encode(texts, tokenizer, 32)
        middle = tokens.index(sep)
        assert len(tokens) == 32 and dog in (tokens[1:middle], tokens[middle + 1 : -1])
    tokens = finetune_glue.encode([long, long], tokenizer, 32)  # 29 = 14 + 15
    assert tokens.index(sep) in (15, 16) and tokens[31] == sep


def test_batches_hold_every_example_once_with_little_padding():
    lengths = torch.from_numpy(np.random.default_rng(0).integers(4, 120, 1003))
    tokens = torch.arange(1003)[:, None].repeat(1, 120) + 1
    tokens[torch.arange(120) >= lengths[:, None]] = 0

    batches = list(finetune_glue.batches(tokens, 0, 16, np.random.default_rng(1)))
    assert sorted(i for index, _ in batches for i in index.tolist()) == list(range(1003))
    for index, rows in batches:
        assert ((rows != 0).sum(1) == lengths[index]).all() and (rows[:, 0] == index + 1).all()
    assert max(len(index) for index, _ in batches) == 16
    assert sum(rows.numel() for _, rows in batches) < 1.15 * lengths.sum()
    widths = [rows.shape[1] for _, rows in batches]
    assert widths != sorted(widths)  # no curriculum of lengths


# From files to scores and predictions, all tasks --------------------------------------------------
def write_glue(folder, names):
    """Files of the official layout, of few examples that the stories' words can solve."""
    rng = random.Random(1)
    for name in names:
        task = TASKS[name]
        (folder / task.folder).mkdir(parents=True)
        for split in task.splits:
            labelled = not split.startswith("test")
            header = ["index", *task.texts, task.label][: 1 + len(task.texts) + labelled]
            rows = [header]
            if name == "cola" and labelled:
                header, rows = task.header, []
            for i in range({"t": 9, "d": 40}[split[0]] if split != "train" else 160):
                yes = rng.random() < 0.5
                place = rng.choice(["in the garden", "near the river", "under a tree"])
                text = f'The "{"cat" if yes else "dog"} likes the fox {place}'  # a lone quote
                label = task.labels[yes] if task.labels else f"{5.0 * yes:.3f}"
                values = {task.texts[0]: text, task.label: label, "index": str(i)}
                rows.append([values.get(column, "the wolf") for column in header])
            content = "".join("\t".join(row) + "\n" for row in rows)
            (folder / task.folder / f"{split}.tsv").write_text(content)
    return folder


@pytest.fixture
def glue(tmp_path):
    return write_glue(tmp_path / "glue files", ["rte", "stsb"])


@pytest.fixture
def run(tmp_path, trained, capsys):
    """The trained model, copied, in a folder with a space in its name."""
    return Path(shutil.copytree(trained, tmp_path / "my run"))


FAST = ["--batch_size", "4", "--lr", "2e-3", "--device", "cpu", "--dtype", "fp32"]


def flags(run, glue, *more):
    """RTE for one epoch with two seeds, unless `more` says otherwise."""
    words = ["--checkpoint", run, "--glue_dir", glue, *FAST, *more]
    for name, value in {"--tasks": "rte", "--seeds": 2, "--epochs": 1}.items():
        if name not in words:
            words += [name, value]
    return list(map(str, words))


def score(*words):
    finetune_glue.main(flags(*words))


def problem(*words):
    """The sentence with which it stops."""
    return message(finetune_glue.main, flags(*words))


def table(text):
    """{column and metric: score} of the closing table."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, row = (line.strip("| ").split(" | ") for line in lines)
    return dict(zip(header, row, strict=True))


def kept(run):
    return {path.name: path.read_text() for path in (run / "glue").glob("*")}


def submission(folder):
    """{file of the submission: its lines}."""
    with zipfile.ZipFile(folder / "submission.zip") as archive:
        return {name: archive.read(name).decode().splitlines() for name in archive.namelist()}


def test_all_of_glue_from_start_to_submission(tmp_path, run, capsys):
    glue = write_glue(tmp_path / "all", TASKS)
    words = ["--tasks", "all", "--seeds", 1, "--epochs", 5, "--submit", tmp_path / "submit"]
    score(run, glue, *words)
    text = capsys.readouterr().out
    _, *scores = table(text).items()
    assert [name for name, _ in scores] == [
        "CoLA matthews", "SST-2 accuracy", "MRPC f1", "QQP f1", "STS-B pearson", "MNLI-m accuracy",
        "MNLI-mm accuracy", "QNLI accuracy", "RTE accuracy", "GLUE average",
    ]  # fmt: skip
    *values, average = (float(value) for _, value in scores)
    assert min(values) > 80 and average == pytest.approx(sum(values) / 9, abs=0.1)
    assert "STS-B pearson: median" in text and "MRPC accuracy: median" in text
    files = submission(tmp_path / "submit")
    assert list(files) == [f"{name.split()[0]}.tsv" for name, _ in scores[:9]]
    for header, *rows in files.values():
        assert header == "index\tprediction"
        assert [row.split("\t")[0] for row in rows] == list(map(str, range(9)))
    for line, row in zip((glue / "RTE/test.tsv").open(), files["RTE.tsv"], strict=True):
        assert line.startswith("index") or row.endswith("not_entailment") == ("cat" in line)
    assert {row.split("\t")[1] for row in files["MNLI-m.tsv"][1:]} == {"entailment", "neutral"}


# Finished runs are kept, never lost and never mixed -----------------------------------------------
def test_finished_runs_are_kept(tmp_path, run, glue, capsys):
    score(run, glue, "--tasks", "rte, stsb")
    first, files = capsys.readouterr().out, kept(run)
    assert len(files) == 4 and "mean of these 2 columns" in first
    score(run / "checkpoint.pt", glue, "--tasks", "rte,stsb")
    again = capsys.readouterr().out
    assert kept(run) == files and list(table(again).values())[1:] == list(table(first).values())[1:]
    score(run, glue, "--submit", tmp_path)
    assert kept(run) == files and list(submission(tmp_path)) == ["RTE.tsv"]


def test_runs_of_other_settings_weights_and_files_are_other_runs(run, glue, capsys):
    def new_runs(*words):
        before = set(kept(run))
        score(*words, "--tasks", "rte,stsb", "--seeds", 1)
        return sorted(name.split("-")[0] for name in set(kept(run)) - before)

    assert new_runs(run, glue) == ["rte", "stsb"]
    assert new_runs(run, glue, "--epochs", 2) == ["rte", "stsb"]
    assert new_runs("none", glue, "--like", run) == ["rte", "stsb"]  # of random weights
    path = glue / "RTE/dev.tsv"
    path.write_text(path.read_text().replace("fox", "wolf"))
    assert new_runs(run, glue) == ["rte"]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["model"]["final_norm.weight"] += 1
    torch.save(state, run / "checkpoint.pt")
    assert new_runs(run, glue) == ["rte", "stsb"]
    for recipe, head, rate in (("modern", "pair", 1e-4), ("cram", "first", 4e-5)):
        state["config"]["recipe"] = recipe
        torch.save(state, run / "checkpoint.pt")
        words = flags(run, glue, "--seeds", 1)
        words[words.index("--lr") + 1] = "auto"  # width 32 is a 24th of the paper's
        finetune_glue.main(words)
        assert f"{head} head, lr {rate * 24**2:g}, fp32" in capsys.readouterr().out


def start_glue(words):
    command = [sys.executable, finetune_glue.__file__, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ONE_THREAD}
    return subprocess.Popen(command, text=True, **pipes)


def test_a_killed_run_goes_on(run, glue):
    words = flags(run, glue, "--seeds", 6)
    process = start_glue(words)
    while "seed 1" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGHUP)  # the terminal was closed
    text, errors = process.communicate()
    assert process.returncode == 130 and errors == ""
    files = kept(run)
    assert 2 <= len(files) < 6
    command = text.splitlines()[-1].partition("goes on from there: ")[2]
    assert shlex.split(command) == ["python", "finetune_glue.py", *words]  # quoted for pasting
    finetune_glue.main(words)
    assert len(kept(run)) == 6 and files.items() <= kept(run).items()
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_two_at_once_lose_nothing(run, glue):
    processes = [start_glue(flags(run, glue, "--seeds", 1)) for _ in range(2)]
    first, second = (table(process.communicate()[0]) for process in processes)
    assert [process.returncode for process in processes] == [0, 0] and first == second
    assert len(kept(run)) == 1


def test_a_damaged_file_is_named(run, glue):
    score(run, glue, "--seeds", 1)
    (path,) = (run / "glue").iterdir()
    for content in (b"", b'{"settings": {"se', b"\xff\xfe", b"[7]", b'{"scores": {"RTE": "0.5"}}'):
        path.write_bytes(content)
        text = problem(run, glue, "--seeds", 1)
        assert f"{path} is damaged, or not of this script: delete it" in text
        assert path.read_bytes() == content


# Fine-tuning is the paper's, and repeats ----------------------------------------------------------
def glue_problem(trained, glue, name):
    """What finetune takes: task, data, encoder, options."""
    options = finetune_glue.Options(glue_dir=glue, epochs=1, lr=1e-3, device="cpu", dtype="fp32")
    options.head, options.submit = "first", "yes"  # yes: read the test set too
    model, tokenizer, _ = cram.load_model(trained, dropout=0.1)
    data = finetune_glue.load_task(TASKS[name], options, tokenizer, 32)
    return TASKS[name], data, model, options


def test_it_repeats_with_its_seed_and_starts_from_the_weights(trained, glue):
    arguments = glue_problem(trained, glue, "stsb")

    def predict(seed):
        return finetune_glue.finetune(*arguments, seed)["dev"].tolist()

    first = predict(0)
    assert first == predict(0) != predict(1) and np.std(first) > 0
    arguments[3].checkpoint = "none"  # random weights, which the seed decides too
    assert first != predict(0) == predict(0) != predict(1)
    arguments[3].head, arguments[3].lr = "pair", 1e-9  # it starts out with the mean of the scores
    mean = arguments[1]["train"][1].mean().item()
    assert abs(np.mean(predict(0)) - mean) < 0.3 < mean


def test_the_pair_head_reads_both_texts_and_how_they_differ(trained):
    encoder, tokenizer, _ = cram.load_model(trained)
    model = finetune_glue.Classifier(encoder, 1, finetune_glue.Options(head="pair", dtype="fp32"))
    texts = [["the cat", "a dog sees"], ["the fox"], ["the wolf likes the duck", "a"]]
    rows = [torch.tensor(finetune_glue.encode(text, tokenizer, 32)) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=376)
    for row, logit in zip(rows, model(padded), strict=True):
        x = encoder.encode(row[None])[0]
        embedded = encoder.embedding_norm(encoder.embedding(row))
        first, last = (row == 378).nonzero().flatten().tolist()  # [SEP]; [CLS] is at 0
        a, b = embedded[1:first], embedded[first + 1 : last]
        parts = [x[0], x[1:first].mean(0), x[first + 1 : last].mean(0).nan_to_num()]
        for here, outside in ((a, embedded[first:]), (b, embedded[[*range(first), last]])):
            found = torch.softmax(here @ outside.T / 32**0.5, dim=1) @ outside
            parts.append((here - found).abs().mean(0).nan_to_num())  # nan: no second text
        expected = model.head(torch.cat(parts))
        assert logit.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_optimiser_and_its_schedule_are_the_papers(trained, glue, monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def spy(self, *words):
        seen.append(dict(self.param_groups[0]))
        return step(self, *words)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    finetune_glue.finetune(*glue_problem(trained, glue, "rte"), 0)  # 10 steps of 16 examples
    rates = [group["lr"] / 1e-3 for group in seen]
    expected = [0, *(0.5 + 0.5 * math.cos(math.pi * i / 9) for i in range(9))]
    assert rates == pytest.approx(expected)
    group = seen[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-6, 0)


def test_the_seed_in_the_middle_is_submitted(tmp_path, run, glue):
    words = ["--tasks", "stsb", "--seeds", 3, "--submit", tmp_path, "--head", "first"]
    score(run, glue, *words)
    for path in (run / "glue").iterdir():
        content = json.loads(path.read_text())
        content["scores"]["STS-B pearson"] = [0.1, 0.9, 0.5][content["settings"]["seed"]]
        path.write_text(json.dumps(content))
    score(run, glue, *words)
    submitted = [line.split("\t")[1] for line in submission(tmp_path)["STS-B.tsv"][1:]]
    task, data, model, options = glue_problem(run, glue, "stsb")
    options.batch_size, options.lr = 4, 2e-3
    for seed in range(3):
        predicted = finetune_glue.finetune(task, data, model, options, seed)["test"].clip(0, 5)
        assert (submitted == [f"{value:.3f}" for value in predicted]) == (seed == 2)


def test_a_diverged_run_is_nan_and_not_submitted(tmp_path, run, glue, capsys):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["model"]["embedding.weight"][:] = math.nan
    torch.save(state, run / "checkpoint.pt")
    score(run, glue)
    assert list(table(capsys.readouterr().out).values())[1:] == ["nan", "nan"]
    assert "diverged" in problem(run, glue, "--submit", tmp_path)


# Files are downloaded once, whole or not at all ---------------------------------------------------
@pytest.fixture
def glue_server(tmp_path, monkeypatch):
    """A folder that a local server shows in the place of GLUE's."""
    root = tmp_path / "served"
    (root / "glue/data").mkdir(parents=True)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(finetune_glue, "GLUE_URL", f"http://127.0.0.1:{httpd.server_port}/")
    yield root
    httpd.shutdown()


@pytest.fixture
def rte(glue):
    """{path in the archive: text} of RTE."""
    return {f"RTE/{path.name}": path.read_text() for path in (glue / "RTE").iterdir()}


def packed(members):
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


def test_a_task_is_downloaded_once(tmp_path, run, rte, glue_server):
    path = glue_server / "glue/data/RTE.zip"
    evil = {"../../evil.tsv": "x", "RTE/../../evil.tsv": "x"}
    path.write_bytes(packed({"RTE/more/x.txt": "x", **rte, **evil}))
    score(run, tmp_path / "new")
    path.unlink()  # the second time it is not needed
    score(run, tmp_path / "new", "--seeds", 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["RTE"]
    for path in (tmp_path / "new/RTE").iterdir():
        assert path.read_text() == rte[f"RTE/{path.name}"]
    assert not list(tmp_path.rglob("evil.tsv"))


def test_bad_archives_leave_nothing_behind(tmp_path, run, rte, glue_server):
    whole = packed(rte)
    contents = [
        whole[: len(whole) // 2],
        whole[:200] + bytes(50) + whole[250:],
        whole[:-4] + b"\xff" + whole[-3:],  # a directory before the start of the file
        packed({"RTE/train.tsv": "x"}),
    ]
    for content in contents:
        (glue_server / "glue/data/RTE.zip").write_bytes(content)
        text = problem(run, tmp_path / "new")
        assert "RTE.zip came damaged, or lacks one of train, dev, test" in text
    (glue_server / "glue/data/CoLA.zip").write_bytes(whole)
    assert "CoLA.zip has another checksum" in problem(run, tmp_path / "new", "--tasks", "cola")
    assert "404" in problem(run, tmp_path / "new", "--tasks", "sst2")
    assert not list((tmp_path / "new").iterdir())


def test_mrpc_is_built_from_its_files(tmp_path, trained, glue_server, monkeypatch):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    rows = [f'{i % 2}\t{i}\t{i + 50}\tone "{i}\ttwo {i}\r\n' for i in range(8)]
    texts = [header + "".join(rows), header + "".join(rows[:3]), "2\t52\n5\t55\n3\t99\n"]
    (glue_server / "senteval/senteval_data").mkdir(parents=True)
    for name, text in zip(TASKS["mrpc"].sources, texts, strict=True):
        (glue_server / name).write_bytes(text.encode())
        checksum = finetune_glue.sha256(glue_server / name)
        monkeypatch.setitem(finetune_glue.CHECKSUMS, Path(name).name, checksum)
    _, data, _, _ = glue_problem(trained, tmp_path / "new", "mrpc")
    assert data["train"][1].tolist() == [0, 1, 1, 0, 0, 1]  # of the pairs 0, 1, 3, 4, 6, 7
    assert data["dev"][1].tolist() == [0, 1]  # 2 and 5; of 3 only one of the two ids is in the list
    lines = (tmp_path / "new/MRPC/dev.tsv").read_text().splitlines()
    assert [line.split("\t")[3] for line in lines[1:]] == ['one "2', 'one "5']
    assert len(data["test"][0]) == 3 and len(data["test"][1]) == 0  # its labels are not read


# Every mistake is a sentence that names the place -------------------------------------------------
def test_malformed_rows_of_qqp_are_skipped_and_counted(tmp_path, trained, capsys):
    glue = write_glue(tmp_path / "glue", ["qqp"])
    with open(glue / "QQP/train.tsv", "a") as file:
        file.write("\n7\tx\thow?\n8\tx\ta\tb\tc\t1\n")
    _, data, _, _ = glue_problem(trained, glue, "qqp")
    assert len(data["train"][0]) == len(data["train"][1]) == 160
    assert "QQP train: 160 examples, 2 malformed rows skipped" in capsys.readouterr().out


HEAD = b"sentence\tlabel\n"
STSB = b"sentence1\tsentence2\tscore\na\tb\t"
FILES = [  # task, content of its dev.tsv, words of the sentence
    ("sst2", None, "is missing"),
    ("sst2", b"", "is empty"),
    ("sst2", b"\r\n", "is empty"),
    ("sst2", HEAD, "has no examples: expected rows of sentence, label"),
    ("sst2", b"sentence\tgrade\nfine\t1\n", "has no column 'label': found sentence, grade"),
    ("sst2", HEAD + b"\n\nfine\t1\n\r\nbad\t-1\n", "line 6: the label is '-1', expected 0 or 1"),
    ("sst2", HEAD + b"\nfine\n", "line 3: columns found: 1, expected: 2"),
    ("sst2", HEAD + b"\xff\xfe\t1\n", "no UTF-8 text"),
    ("sst2", b"sentence\tlabel\r" + b"fine\t1\r" * 999, "does not end its lines with line feeds"),
    ("stsb", STSB + b"5.5\n", "line 2: the label is '5.5', expected a number from 0 to 5"),
    ("stsb", STSB + b"5\na\tb\t\n", "line 3: the label is ''"),
]


def test_messages_about_files(tmp_path, run):
    glue = write_glue(tmp_path, ["sst2", "stsb"])
    for task, content, words in FILES:
        path = glue / TASKS[task].folder / "dev.tsv"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        text = problem(run, glue, "--tasks", task)
        assert words in text and str(path) in text and len(text) < 500


FLAGS = [  # flags after --checkpoint, words of the sentence
    (". --tasks cola,mnnli", "--tasks is 'cola,mnnli': expected all, or some of cola,sst2,"),
    (". --tasks ,", "--tasks is ',': expected all"),
    (". --seeds 0", "argument --seeds: got '0', expected"),
    (". --lr 0", "argument --lr: got '0', expected"),
    (". --glue_dir /dev/null", "/dev/null"),
    ("none --like nowhere", "checkpoint.pt does not exist"),
]


def test_messages_about_flags(run, monkeypatch):
    monkeypatch.chdir(run)
    for typed, words in FLAGS:
        assert words in message(finetune_glue.main, ["--checkpoint", *typed.split()])
