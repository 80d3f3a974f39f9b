"""What the scripts in assets/ and the pages promise, checked offline on a CPU: pytest"""

import csv
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm

import cram
import finetune_glue
import prepare_data
from assets import bench, check_export, export, fill, plot, plot_scores
from test_cram import ANIMALS, HERE, message, run_cram, script, write_jsonl


def test_bench_measures(capsys):
    bench.main(["--size", "tiny", "--layers", "1", "--width", "64", "--micro_batch", "4"])
    text = capsys.readouterr().out
    numbers = re.search(r"(\d+) tokens/s, ([\d.e-]+) TFLOP/s\nmfu +([\d.]+)% of ([\d.e-]+)", text)
    tokens, rate, mfu, peak = (float(number) for number in numbers.groups())
    cfg = cram.make_config({"size": "tiny", "layers": 1, "width": 64})
    flops = cram.Model(cfg, bench.VOCAB_SIZE, bench.SEQ_LEN).flops_per_token()
    assert rate * 1e12 == pytest.approx(tokens * flops, rel=0.02)  # three digits are printed
    assert mfu == pytest.approx(100 * rate / peak, rel=0.02, abs=0.1)


def test_a_checkpoint_alone_is_enough_to_fill(trained, tmp_path):
    shutil.copy(trained / "checkpoint.pt", tmp_path / "my model.pt")
    text = "the fox sees the bear under a tree, says the [MASK]. the [MASK] sees the cat"
    answers = fill.fill(tmp_path / "my model.pt", text)
    assert [len(answer) for answer in answers] == [5, 5]
    assert {word for word, _ in answers[0]} <= set(ANIMALS)
    assert all(0 < chance < 1 for answer in answers for _, chance in answer)
    words = tmp_path / "my model.pt", text.replace("[MASK]", "[mask]", 1)
    assert "[MASK] 2  " in script("cram.py", "fill", *words).stdout


def test_fill_reads_as_training_does_and_shows_control_characters_escaped(trained):
    plain = fill.fill(trained, "the [MASK] sees the cat")
    assert fill.fill(trained, " The  “[MASK]” sees\nthe  CÁT ") == plain  # lower case, ASCII
    assert fill.fill(trained, 'the "[MASK]" sees the cat') != plain
    assert fill.readable(b"\x1b[2J") == "\\x1b[2J" and fill.readable(b"\xc3") == "\\xc3"


def test_mistakes_of_fill(trained):
    assert "there is no [MASK] in" in message(fill.main, [str(trained), "no mask"])
    long = "the cat sees the dog " * 9 + "[MASK]"
    assert "expected at most 32" in message(fill.main, [str(trained), long])
    assert "expected a folder and a text" in message(fill.main, ["out"])


# Pictures ----------------------------------------------------------------------------------------


def write_log(path, points):
    """A log with rows of (tokens, training loss, validation loss), the last two cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{t / 1e3},{t},{t / 1e12},{train},{val}\n" for t, train, val in points]
    path.write_text(
        "seconds,tokens,exaflops,train_loss,val_loss\n" + "".join(rows) + "2,0\n9,9,9,9,9"
    )
    return path


def draw(capsys, *words, script=plot):
    """What it prints, {class: [[(x, y) in pixels, ...], ...]} of its lines, and its texts."""
    script.main([str(word) for word in words])
    lines, texts = {}, []
    for e in xml.etree.ElementTree.parse(words[words.index("--to") + 1]).iter():
        if e.tag.endswith("text"):
            texts.append(e.text)
        elif e.tag.endswith("path") and "h20" not in e.get("d"):  # h20: a sample in the key
            pairs = re.findall(r"([\d.]+) ([\d.]+)", e.get("d"))
            lines.setdefault(e.get("class"), []).append([(float(x), float(y)) for x, y in pairs])
    return capsys.readouterr().out, lines, texts


def test_numbers_are_where_they_belong(tmp_path, capsys):
    points = [(0, "", 4.0), (1e6, 3.0, ""), (2e6, 1.0, 2.0), (2e6, "nan", "nan")]
    words = write_log(tmp_path / "a < b/log.csv", points), "--to", tmp_path / "c.svg"
    flags = "--x", "tokens", "--log", "false", "--unigram", "2.5"
    said, lines, texts = draw(capsys, *words, *flags)
    low, nat = 360 - 348 * 0.05 / 3.1, 348 / 3.1  # pixels: where 1 nat is, and how long
    assert np.allclose(lines["line"], [[(340, low - 2 * nat), (630, low)]], atol=0.1)
    assert np.allclose(lines["dots"], [[(50, low - 3 * nat), (630, low - nat)]], atol=0.1)
    assert np.allclose(lines["dash"], [[(50, low - 1.5 * nat), (630, low - 1.5 * nat)]], atol=0.1)
    assert {"a < b/log.csv", "unigram model 2.500", "million tokens", "3", "0.5"} <= set(texts)
    ticks = dict(zip(texts[2:], (ends[0] for ends in lines["grid"]), strict=False))
    assert np.allclose([ticks["3"], ticks["0.5"]], [(50, low - 2 * nat), (195, 12)], atol=0.1)
    assert "c.svg: 2 validation losses, 1 on the lower envelope: no power law" in said


def test_a_logarithmic_axis_leaves_out_0_and_is_never_without_a_number(tmp_path, capsys):
    words = tmp_path / "log.csv", "--to", tmp_path / "c.svg"
    write_log(words[0], [(0, "", 9.0), (1e3, 3.0, ""), (1e4, 2.0, ""), (1e5, 1.0, "")])
    _, lines, texts = draw(capsys, *words)
    assert np.allclose([x for x, _ in lines["line"][0]], [50, 340, 630], atol=0.1)
    assert {"1e-09", "2e-09", "1e-08", "exaFLOP"} <= set(texts)
    write_log(words[0], [(1.1e3, 4.4, ""), (1.9e3, 4.3, "")])  # no round number is between
    assert {"1.1", "1.9", "seconds"} <= set(draw(capsys, *words, "--x", "seconds")[2])
    assert plot.log_grid(1e-7, 2e-1) == pytest.approx([10.0**power for power in range(-7, 0)])


@pytest.mark.parametrize("floor, a, b", [(2.0, 0.5, 0.3), (0.0, 3.0, 0.15), (3.5, 1e-4, 0.6)])
def test_the_power_law_of_the_lower_envelope_is_found(floor, a, b):
    best = [(c, floor + a * c**-b) for c in np.geomspace(1e-7, 1e-3, 8)]
    worse = [(c * 1.5, loss + 0.3) for c, loss in best]
    assert plot.lower_envelope([*worse, *best[::-1]]) == best
    law = plot.power_law(best)
    assert abs(law[0] - floor) < 0.12 and np.allclose(law[1:], (a, b), rtol=0.05)
    assert plot.power_law(best[:3]) is None  # three numbers want four points
    assert plot.power_law([(c, 1 / (1 + c)) for c in (1, 2, 3, 4, 50)])[0] >= 0  # as losses are


def test_runs_logs_and_folders_of_them_are_read(tmp_path, trained, capsys):
    for name in ("many/1.csv", "many/2.csv", "run/log.csv", "run/inner/log.csv"):
        write_log(tmp_path / name, [(1e3, 5.0, 4.0)])
    (tmp_path / "run/checkpoint.pt").write_text("damaged: it cannot tell the unigram line")
    runs = trained, trained / "log.csv", tmp_path / "many", tmp_path / "run"
    said, lines, texts = draw(capsys, *runs, "--to", tmp_path / "c.svg")
    one, same, many, run = (len(dots) for dots in lines["dots"])
    assert (one, many, run) == (same, 2, 1) and len(lines["line"]) == 3
    assert re.fullmatch(r".*unigram model \d\.\d{3}L = .*", "".join(texts))  # one, of the same text
    assert "no unigram line" in said and f"{2 * one + 3} validation losses" in said


def test_mistakes_in_plot_are_sentences(tmp_path, trained):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    table = [
        ([tmp_path / "other.csv"], "other.csv has no loss to draw yet: expected a run's folder"),
        ([trained / "checkpoint.pt"], "checkpoint.pt has no loss to draw yet"),
        ([trained, "--to", "c.png"], "--to c.png: the picture is an SVG, expected a name that"),
        ([trained, "--to", tmp_path / "other.csv/c.svg"], "no picture was written"),
        (["--to", "c.svg"], "no run is named: expected python cram.py plot OUT"),
    ]
    for words, sentence in table:
        assert sentence in message(plot.main, [str(word) for word in words])


def test_scores_are_drawn_seed_by_seed_with_a_line_at_random_weights(tmp_path, capsys):
    def write(name, scores):
        seeds = [f"STS-B    seed {i}: STS-B pearson {y}, 9 s\n" for i, y in enumerate(scores)]
        (tmp_path / name).write_text("data\n" + "".join(seeds))

    write("pair-0M.log", [60.0, 70.0, 71.0])
    write("pair-0.5M.log", [60.0, 62.0])
    write("pair-2M.log", [71.0])
    write("pair-8M.log", [79.0, 75.0, 80.0])
    write("first-8M.log", [-10.0])
    write("pair-other.log", [90.0])  # no budget
    words = "--folder", tmp_path, "--to", tmp_path / "c.svg"
    said, lines, texts = draw(capsys, *words, script=plot_scores)

    def at(x, score):
        return 50 + 580 * x, 360 - 348 * (score + 10.05) / 90.1

    dots = [at(0, 60), at(0, 62), at(0.5, 71), at(1, 79), at(1, 75), at(1, 80)]
    assert np.allclose(lines["dots"][0], [at(1, -10)], atol=0.1)
    assert np.allclose(lines["dots"][1], dots, atol=0.1)
    assert np.allclose(lines["line"][1], [at(0, 61), at(0.5, 71), at(1, 79)], atol=0.1)
    assert np.allclose(lines["dash"], [[at(0, 70), at(1, 70)]], atol=0.1)
    assert {"pair, STS-B pearson", "pair, random weights", "first, STS-B pearson"} <= set(texts)
    assert "c.svg: outputs of 4 budgets" in said
    table = [
        (["--column", "RTE accuracy"], "has no NAME-TOKENSM.log with a seed's RTE accuracy"),
        (["--to", "c.png"], "expected a name that ends in .svg"),
        (["--to", tmp_path / "pair-2M.log/c.svg"], "no picture was written"),
    ]
    for more, sentence in table:
        typed = ["--folder", tmp_path, *more]
        assert sentence in message(plot_scores.main, [str(word) for word in typed])
    write("pair-9M.log", ["nan"])
    assert "has a seed without a score" in message(plot_scores.main, ["--folder", str(tmp_path)])


# A checkpoint opens elsewhere --------------------------------------------------------------------
@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hf"
    export.main([str(trained), str(folder)])
    return folder


def test_an_export_holds_the_weights_of_the_checkpoint(trained, exported):
    content = (exported / "model.safetensors").read_bytes()  # read as the format is described
    start = 8 + int.from_bytes(content[:8], "little")
    header, theirs, end = json.loads(content[8:start]), {}, 0
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, about in header.items():
        first, last = about["data_offsets"]
        assert first == end and about["dtype"] == "F32"  # no gap, no overlap
        part, end = bytearray(content[start + first : start + last]), last
        theirs[name] = torch.frombuffer(part, dtype=torch.float32).view(about["shape"])
    assert start + end == len(content) and start % 8 == 0

    ours = cram.load_checkpoint(trained)["model"]
    here = "attn_norm", "qkv", "attn_out", "ffn_norm", "ffn_in", "ffn_out"
    there = "attn_norm", "attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo"
    expected = {"model.embeddings.norm.weight": torch.ones(32)}
    expected["model.embeddings.tok_embeddings.weight"] = ours["embedding.weight"]
    for i in (0, 1):
        for a, b in zip(here, there, strict=True):
            expected[f"model.layers.{i}.{b}.weight"] = ours[f"blocks.{i}.{a}.weight"]
        up = f"model.layers.{i}.mlp.Wi.weight"
        expected[up] = expected[up].roll(32, 0)  # 64 rows: gate and value change places
        bias = torch.cat((ours[f"blocks.{i}.qk_bias"].flatten(), torch.zeros(32)))  # q, k and v
        expected[f"model.layers.{i}.attn.Wqkv.bias"] = bias
        expected[f"model.layers.{i}.attn.Wo.bias"] = torch.zeros(32)
    expected["decoder.bias"] = ours["decoder_bias"]
    expected["model.layers.0.attn.Wqkv.weight"] *= expected.pop("model.layers.0.attn_norm.weight")
    last = [theirs.pop(f"{n}.weight") for n in ("model.final_norm", "head.dense", "head.norm")]
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], expected[name]) for name in theirs)
    x = torch.randn(5, 32)  # their two norms are our last one: the matrix between undoes the first
    norm = layer_norm(x, (32,), ours["final_norm.weight"])
    assert torch.allclose(layer_norm(x, (32,), last[0]), norm)
    assert torch.allclose(layer_norm(norm @ last[1].T, (32,), last[2]), norm, atol=1e-5)


def test_transformers_computes_the_same(trained, data, tmp_path, capsys):
    """The real thing: .ci/run installs transformers after all other tests, and calls this again."""
    pytest.importorskip("transformers", reason="what is not installed cannot be compared with")
    bert = run_cram(data, tmp_path / "bert", "30steps", "--recipe", "bert")
    for out in (trained, bert):
        check_export.main([str(out), "--quick"])
        assert capsys.readouterr().out.endswith("all the same\n")


def test_an_export_tells_the_numbers_of_its_run(trained, exported):
    run = cram.load_checkpoint(trained)["run"]
    numbers = f"{run['reads'] * 32} |", f"{run['flops']:.3g} |", f"{run['val_loss']:.3f} nats"
    readme = (exported / "README.md").read_text()
    assert all(words in readme for words in ("recipe modern", "stories.jsonl", *numbers))


def test_its_merges_give_the_tokens_of_tiktoken(trained, exported):
    made = json.loads((exported / "tokenizer.json").read_text())
    order = {tuple(merge.split(" ")): i for i, merge in enumerate(made["model"]["merges"])}
    tokenizer, letters, rng = cram.load_model(trained)[1], export.byte_letters(), random.Random(0)
    texts = ["".join(rng.choices("aehnorst .", k=rng.randint(1, 40))) for _ in range(300)]
    for piece in re.findall(cram.PATTERN, "|".join([*texts, " behind the garden", "a" * 32])):
        parts = [letters[byte] for byte in piece.encode()]
        while order.keys() & set(pairwise(parts)):  # byte-level BPE: the first merge, leftmost
            ranks = [order.get(pair, 1e9) for pair in pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids = [made["model"]["vocab"][part] for part in parts]
        assert ids == tokenizer.encode_ordinary(piece)


def test_what_cannot_be_exported_is_a_sentence_and_leaves_nothing(trained, data, tmp_path):
    run_cram(data, tmp_path / "cram", "1steps", "--recipe", "cram")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("not to be lost")
    torch.save({"format": 99}, tmp_path / "other.pt")
    before = sorted(tmp_path.rglob("*"))
    for out, folder, words in (
        (tmp_path / "cram", "a", "no class for recipe cram with positions sinusoidal, norm_bias"),
        (tmp_path / "other.pt", "a", "not from this version"),
        (trained, "mine", "mine exists already: choose another folder"),
        (trained, "other.pt/a", "nothing was written to"),
    ):
        assert words in message(export.main, [str(out), str(tmp_path / folder)])
    assert "expected two folders" in message(export.main, ["out/cram"])
    limit = f"ulimit -f 20; exec '{sys.executable}' assets/export.py '{trained}' '{tmp_path}/a'"
    full = subprocess.run(["bash", "-c", limit], cwd=HERE, capture_output=True, check=False)
    assert full.returncode == 1 and b"nothing was written to" in full.stderr
    assert sorted(tmp_path.rglob("*")) == before


# The pages ---------------------------------------------------------------------------------------

NAMES = ("README.md", "assets/experiments.md", "assets/course.md")
PAGES = {HERE / name: (HERE / name).read_text() for name in NAMES}
README, EXPERIMENTS, COURSE = PAGES.values()


def commands(page):
    """Of the commands in a page's blocks that call our scripts, the words from the script on."""
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        for line in re.split(r"\n|&&", block):
            command = re.search(r"^ *(python|torchrun .*) (\w+\.py.*)", line)
            if command:
                yield shlex.split(command[2], comments=True)


def with_flags(words, flags):
    """`words` with these flags in place of what they say about them."""
    for name, value in flags.items():
        if name in words:
            del words[words.index(name) : words.index(name) + 2]
        words += [name, value]
    return words


LITTLE = {"--size": "tiny", "--layers": "1", "--width": "32", "--budget": "4steps"}
SHORT = {"--vocab_size": "380", "--seq_len": "32", "--workers": "1", "--filter": "0.9"}


def test_the_commands_of_readme_and_course_run(tmp_path, data, stories, monkeypatch):
    """In their order, in a fresh folder, on little text. Of those that download, the flags."""
    monkeypatch.chdir(tmp_path)
    Path("my_texts").mkdir()
    write_jsonl(Path("my_texts/a.jsonl"), stories)
    write_jsonl(Path("notes.jsonl"), stories[:9])
    shutil.copytree(data, "data/docs")
    shutil.copytree(data, "data/c4")
    others = {"plot": plot, "fill": fill, "export": export}
    runs = {}  # data: a run on it; of the others on it only the settings are checked
    for name, *words in [*commands(README), *commands(COURSE)]:
        if name == "finetune_glue.py" or "c4" in words:
            options = {"finetune_glue.py": finetune_glue.Options}.get(name, prepare_data.Options)
            assert cram.parse_flags(options, words, "", {})
        elif name == "prepare_data.py":
            prepare_data.main(with_flags(words, SHORT))
        elif words and words[0] in others:
            others[words[0]].main(words[1:])
        elif "--resume" in words:
            cram.main(words)
        else:
            cfg = cram.make_config(cram.parse_flags(cram.Config, words, "", {}))
            if cfg.data in runs:
                shutil.copytree(runs[cfg.data], cfg.out, dirs_exist_ok=True)
            else:
                cram.main(with_flags(words, LITTLE))
                runs[cfg.data] = cfg.out
    assert len(runs) == 3 and Path("law.svg").exists()


def test_links_lead_to_what_exists_and_every_log_has_one():
    linked = set()
    for page, text in PAGES.items():
        for words, target in re.findall(r"\[([^\]]*)\]\((?!https)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            linked.add(file)
            assert file.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)", PAGES[file].lower(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", t).replace(" ", "-") for t in titles]
            if file.suffix == ".py" and words[0] == "`":
                defined = re.findall(r"^(?:def|class) (\w+)", file.read_text(), re.MULTILINE)
                assert words.strip("`") in defined, words
    logs = [file for kind in ("csv", "log", "svg") for file in HERE.glob(f"assets/**/*.{kind}")]
    assert set(logs) <= linked


def test_losses_are_those_of_the_logs_beside_them():
    """A link's text is the loss of its log, or the row has median and range of those it links."""
    checked = 0
    for page, text in PAGES.items():
        for line in text.splitlines():
            seeds = []
            for words, log in re.findall(r"\[([\d.]+)\]\(([^)]+\.csv)\)", line):
                rows = list(csv.DictReader((page.parent / log).open(newline="")))
                loss = [float(row["val_loss"]) for row in rows if row["val_loss"]][-1]
                seeds += [loss] if "." not in words else []
                assert "." not in words or words == f"{loss:.2f}", line
                checked += 1
            spread = f" ({min(seeds):.2f} to {max(seeds):.2f})" if len(seeds) > 1 else ""
            assert not seeds or f"| {np.median(seeds):.2f}{spread} |" in line, line
    assert checked > 200


def test_scores_are_those_of_the_outputs_beside_them():
    """A link's text is the median of the output it leads to, and the range where it has one."""
    checked = 0
    for page, text in PAGES.items():
        for words, log in re.findall(r"\[(\d+\.\d[^\]]*)\]\(([^)]*glue[^)]*\.log)\)", text):
            score, _, ends = words.rstrip(")").partition(" (")
            output = (page.parent / log).read_text()
            if ", range " in output:  # older ones are written otherwise
                assert f"median {score}, range {ends}" in output, (words, log)
                checked += 1
    # In README's table the column says which task it is.
    header, *rows = re.findall(r"^\|.*SST-2.*(?:\n\|.*)+", README, re.MULTILINE)[0].splitlines()
    for row in rows:
        for task, cell in zip(header.split("|"), row.split("|"), strict=True):
            link = re.search(r"\[([\d.]+)\]\((.*\.log)\)", cell)
            if link:
                output = (HERE / link[2]).read_text()
                assert re.search(rf"^{task.strip()} \w+: median {link[1]},", output, re.MULTILINE)
                checked += 1
    assert checked > 30


def test_readme_is_short_and_finished():
    before, first, *_ = re.split(r"```(?:sh\n)?", README)
    assert len(README.split()) <= 2500 and len((before + first).split()) <= 150
    assert "python cram.py\n" in first and "python cram.py fill" in first
    tables = re.findall(r"^(\|.*)\n\| ---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert len(tables) <= 3
    assert all(re.search(r"\d", row) for _, rows in tables for row in rows.splitlines())
    assert "@@" not in "".join(PAGES.values())
    troubles = README.split("## If something goes wrong")[1].split("##")[0]
    scripts = "cram.py", "prepare_data.py", "finetune_glue.py"
    sources = "".join((HERE / name).read_text() for name in scripts)
    for words in re.findall(r"`([^`]+)`", troubles):  # messages, and flags with a value or without
        flag = re.match(r"--(\w+)", words)
        assert (f"{flag[1]}: " if flag else words) in sources, words
