"""Checks an export against transformers itself: pip install transformers sentence-transformers

    python assets/check_export.py out/cram                     # weights, tokens, pipelines
    python assets/check_export.py out/cram corpus/*.jsonl.gz   # and the tokens of these documents
    python assets/check_export.py out/cram --glue data/glue    # and fine-tuning by their Trainer
    python assets/check_export.py out/cram --quick             # of the texts a small part

Prints what it compared, and ends with exit code 1 if anything differs. Where transformers is not
installed it says so and ends well.
"""

import gzip
import importlib.util
import json
import random
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cram
import finetune_glue
from assets import export, fill

TOLERANCE = 1e-4  # of a logit or a hidden state, in fp32
DOCUMENTS = 10_000
SEEDS = 3
FILL = ["returns a new [MASK] with the same shape.", "the [MASK] of the [MASK], \u00e9t\u00e9"]
NASTY = [
    "", " ", "\n\t \u3000", "\0", "a\0b", "\x1c", "a\x1cb\x1d c\x1e\x1fd",
    "a\x7fb\x80c\x85d\xa0e", "\u0130stanbul I\u0307 \u0131", "stra\u00dfe STRASSE \u1e9e",
    "\u212a \u212b \u2126 K", "\ufb01ne", "e\u0301\u0302\u0303 \u00e9\u0302", "\u0301 leading",
    "a \u0301 b", "a\u200bb\u200dc\ufeffd", "\u1680a\u2000b\u2028c\u2029d\u202fe\u205ff\u3000g",
    "x\u180ey", "\u1fef\u037e", "\uac00 \u1100\u1161", "don't DON'T we'll they've I'm '' 'sx 'LL",
    "don\u2019t", "a" * 1000, "a " * 500, " " * 1000 + "b", "=" * 333, "12345678901234567890",
    "1,234.56e-7", "a\u4e00 \u4e00 b", "\u4e00" * 50, "\U0001f600 ok", "[mas] [PAD [CLS ]SEP]",
    "tab\tnew\nline\r\nend", "\u03a3\u03a3 \u03c3", "a\u0345", "\u1fb3\u0345a",
    "\\n\\t %s {} <|endoftext|>", "a.b.c...d--e", "\u2026\u2014\u201c\u201d", "A\u030aA",
    "\U0010ffff\ue000",
]  # fmt: skip
differences = []


def compare(title, value, limit):
    """Prints what was measured and whether it is within its limit; notes it if not."""
    good = value <= limit
    cram.say(f"{'ok' if good else 'WRONG':5} {title}: {value:.2g}, at most {limit:g}")
    if not good:
        differences.append(title)


# ---- Weights -------------------------------------------------------------------------------------
@torch.no_grad()
def check_weights(folder, model):
    """Logits and hidden states of both on random tokens, alone and with padding."""
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    theirs, about = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    theirs.eval()
    keys = [about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")]
    compare("missing, unexpected and mismatched keys", sum(map(len, keys)), 0)
    tokens = torch.randint(model.vocab_size, (8, min(128, model.seq_len)))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    for row, length in enumerate((128, 100, 64, 33, 17, 5, 2, 1)):
        mask[row, length:] = False
    where = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    ours = model(tokens, where)
    out = theirs(input_ids=tokens)
    compare(f"logits, up to {ours.abs().max():.1f}", (ours - out.logits).abs().max(), TOLERANCE)

    # Behind the embedding and each block; what stands at padding means nothing.
    for title, seen in (("", None), (" with padding", mask)):
        theirs_states = theirs(tokens, attention_mask=seen, output_hidden_states=True).hidden_states
        worst, largest = 0.0, 0.0
        for depth in range(model.cfg.layers + 1):
            ours = hidden_states(model, tokens, seen, depth)
            gap = (ours - theirs_states[depth]).abs()[mask]
            worst = max(worst, gap.max().item())
            largest = max(largest, ours.abs().max().item())
        limit = max(TOLERANCE, 1e-5 * largest)  # of large numbers fp32 keeps fewer decimals
        compare(f"hidden states{title}, up to {largest:.1f}", worst, limit)
    padded = theirs(input_ids=tokens, attention_mask=mask).logits
    x = model.head(model.encode(tokens, mask))
    ours = torch.nn.functional.linear(x, model.embedding.weight, model.decoder_bias)
    compare("logits with padding", (ours - padded)[mask].abs().max(), TOLERANCE)

    _, about = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, output_loading_info=True
    )
    new = sorted(about["missing_keys"])
    cram.say(f"      as a classifier, only these are new: {', '.join(new)}")


def hidden_states(model, tokens, mask, depth):
    """Ours behind `depth` blocks, and, as theirs are, behind the last norm if these are all."""
    norm = model.final_norm
    if depth < model.cfg.layers:
        model.final_norm = torch.nn.Identity()
    x = model.encode(tokens, mask, depth)
    model.final_norm = norm
    return x


# ---- Tokens --------------------------------------------------------------------------------------
def documents(paths):
    """Up to DOCUMENTS texts, as many of each JSON lines file, plain or in gzip."""
    for path in paths:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number >= DOCUMENTS / len(paths):
                    break
                yield json.loads(line)["text"]


def unicode_texts(alone):
    """Each character: in runs of 64 with and without spaces, and, if `alone`, between letters."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 64):
        run = characters[start : start + 64]
        yield "".join(run)
        yield " ".join(run)
        yield "a".join(run) + "E\u0301"
    if not alone:
        return
    for c in characters:
        if unicodedata.category(c) not in ("Cn", "Co"):  # not assigned, private
            yield f"x{c}Y {c}z"


def random_texts(count):
    """Words of few letters, where merges overlap, and strings of the stranger characters."""
    rng = random.Random(0)
    odd = "aAe '\u0301\u0307\u0130\xa0\x1c\t\n.=-_0\u3000\x00\u00e9\u212a"
    for _ in range(count):
        letters = rng.choice(
            ("ab", "es ", "aeilnrst", "-=*.", "01", "abcdefghijklmnopqrstuvwxyz ", odd)
        )
        yield "".join(rng.choices(letters, k=rng.randint(1, 70)))


def check_tokens(folder, tokenizer, paths, quick):
    """Not one id may differ, on any text."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    groups = {
        "nasty texts": NASTY,
        "texts of all of Unicode": unicode_texts(alone=not quick),
        "random texts": random_texts(5_000 if quick else 200_000),
        "documents": documents(paths),
    }
    for title, texts in groups.items():
        wrong, count, tokens = 0, 0, 0
        for text in texts:
            ours = tokenizer.encode_ordinary(cram.normalise(text))
            ids = theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids
            count += 1
            tokens += len(ours)
            if ours != ids:
                wrong += 1
                if wrong <= 3:
                    cram.say(f"      {text[:80]!r}: ours {ours[:20]}, theirs {ids[:20]}")
        compare(f"of {count} {title}, {tokens} tokens, differ", wrong, 0)
    ids = theirs("a cat", "The \u00c9T\u00c9")["input_ids"]
    cls, sep = (tokenizer.encode_single_token(name) for name in ("[CLS]", "[SEP]"))
    a, b = (tokenizer.encode_ordinary(text) for text in ("a cat", "the ete"))
    compare("the template of a pair differs", int(ids != [cls, *a, sep, *b, sep]), 0)
    back = theirs.decode(ids, skip_special_tokens=False)
    compare("and decoded", int(back != "[CLS]a cat[SEP]the ete[SEP]"), 0)
    roles = (theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id, theirs.mask_token_id)
    first = tokenizer.encode_single_token("[PAD]")
    compare("special tokens differ", int(roles != tuple(range(first, first + 4))), 0)


# ---- Use -----------------------------------------------------------------------------------------
def check_use(out, folder):
    """fill-mask answers as fill does; sentence-transformers encodes."""
    from transformers import pipeline

    predict = pipeline("fill-mask", model=str(folder), device="cpu", top_k=5 + len(cram.SPECIALS))
    frames = {"between two [SEP], as in fill": ("[SEP]", False), "with [CLS] in front": ("", True)}
    for text in FILL:
        expected = [[word for word, _ in answers] for answers in fill.fill(out, text)]
        for title, (frame, add) in frames.items():
            found = predict(f"{frame}{text}{frame}", tokenizer_kwargs={"add_special_tokens": add})
            found = found if isinstance(found[0], list) else [found]  # a list for each [MASK]
            words = [best_words(answers, predict.tokenizer) for answers in found]
            wrong = 0
            for ours, theirs in zip(expected, words, strict=True):
                wrong += sum(a != b for a, b in zip(ours, theirs, strict=True))
            cram.say(f"      {title}: {words}")
            if add:  # [CLS] is what training never showed: no more than a note
                cram.say(f"      of {5 * len(words)} words {wrong} are not fill's")
            else:
                compare(f"of {5 * len(words)} best words {title}, differ", wrong, 0)
    if importlib.util.find_spec("sentence_transformers") is None:
        cram.say("      skipped: sentence-transformers is not installed")
    else:  # it takes the mean over the tokens
        from sentence_transformers import SentenceTransformer

        model, tokenizer, _ = cram.load_model(out)
        texts = ["a cat sat", "returns a list of all"]  # of two lengths: one is padded
        vectors = SentenceTransformer(str(folder), device="cpu").encode(texts)
        cls, sep = (tokenizer.encode_single_token(name) for name in ("[CLS]", "[SEP]"))
        with torch.no_grad():
            x = model.encode(torch.tensor([[cls, *tokenizer.encode_ordinary("a cat sat"), sep]]))
        gap = np.abs(vectors[0] - x[0].mean(0).numpy()).max()
        compare("sentence-transformers: a vector", float(gap), TOLERANCE)


# ---- Fine-tuning ---------------------------------------------------------------------------------
def check_glue(out, folder, glue_dir):
    """transformers' own Trainer gives scores within the spread of finetune_glue.py's, in its setting
    but for the space before a text, which their normaliser takes away."""
    for name in ("rte", "stsb"):
        task = finetune_glue.TASKS[name]
        options = finetune_glue.Options(glue_dir=glue_dir, device="cpu", dtype="fp32", head="first")
        model, tokenizer, _ = cram.load_model(out, dropout=0.1)
        options.lr = 4e-5 * (768 / model.cfg.width) ** 2
        data = finetune_glue.load_task(task, options, tokenizer, model.seq_len)
        metric = task.metrics[0]
        true = data["dev"][1].numpy()
        ours, theirs = [], []
        for seed in range(SEEDS):
            predicted = finetune_glue.finetune(task, data, model, options, seed)["dev"]
            ours.append(100 * metric(predicted, true))
            theirs.append(100 * metric(train_theirs(folder, task, options, seed), true))
            cram.say(f"      {task.folder} seed {seed}: {ours[-1]:.1f}, Trainer {theirs[-1]:.1f}")
        spread = max(np.ptp(ours), np.ptp(theirs))
        compare(f"{task.folder}: medians", abs(np.median(ours) - np.median(theirs)), spread)


def train_theirs(folder, task, options, seed):
    """What a model that their Trainer has fine-tuned predicts for the dev set: (N,)."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sets = {}
    for split in ("train", "dev"):
        (_, header), *lines = finetune_glue.read_lines(
            Path(options.glue_dir, task.folder, f"{split}.tsv")
        )
        a, b, label = (header.index(name) for name in (*task.texts, task.label))
        sets[split] = []
        for _, cells in lines:
            example = dict(tokenizer(cells[a], cells[b], truncation=True))
            value = task.labels.index(cells[label]) if task.labels else float(cells[label])
            sets[split].append(example | {"labels": value})
    transformers.set_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=max(1, len(task.labels))
    )
    steps = -(-len(sets["train"]) // options.batch_size) * options.epochs
    with tempfile.TemporaryDirectory() as temporary:
        arguments = transformers.TrainingArguments(
            output_dir=temporary, seed=seed, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no", per_device_eval_batch_size=64,
            num_train_epochs=options.epochs, per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr, lr_scheduler_type="cosine", warmup_steps=steps // 10,
            adam_beta1=0.9, adam_beta2=0.98, adam_epsilon=1e-6, max_grad_norm=0.0,
        )  # fmt: skip
        collator = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(
            model, arguments, collator, sets["train"], processing_class=tokenizer
        )
        trainer.train()
        logits = trainer.predict(sets["dev"]).predictions
    return logits.argmax(1) if task.labels else logits[:, 0]


def best_words(answers, tokenizer):
    """The best five of the pipeline's answers that are no specials, written as fill does."""
    special = tokenizer.all_special_ids
    words = [answer["token_str"] for answer in answers if answer["token"] not in special]
    return [fill.readable(word.encode()) for word in words[:5]]


def main(argv):
    if importlib.util.find_spec("transformers") is None:
        cram.say("skipped: pip install transformers, and the export is checked against it")
        return
    if not argv or argv[0].startswith("-"):
        cram.fail("expected a folder: python assets/check_export.py out/cram [DOCUMENTS.jsonl ...]")
    out, *paths = argv
    glue = ""
    if "--glue" in paths[:-1]:
        glue = paths.pop(paths.index("--glue") + 1)
        paths.remove("--glue")
    quick = "--quick" in paths
    paths = [path for path in paths if path != "--quick"]
    for path in paths:
        if not Path(path).is_file():
            cram.fail(f"{path} is no file: expected documents, --quick, or --glue and a folder")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "exported")
        export.export(out, folder)
        model, tokenizer, _ = cram.load_model(out)
        check_weights(folder, model)
        check_tokens(folder, tokenizer, paths, quick)
        check_use(out, folder)
        if glue:
            check_glue(out, folder, glue)
    if differences:
        cram.fail(f"{len(differences)} differences: {'; '.join(differences)}")
    cram.say("all the same")


if __name__ == "__main__":
    main(sys.argv[1:])
