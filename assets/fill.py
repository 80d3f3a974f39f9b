"""What a trained model would put in the place of each [MASK] of a text.

python cram.py fill out/cram "raises an [MASK] if it fails."
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cram import SPECIALS, fail, load_model, normalise, say


@torch.no_grad()
def fill(folder, text, top=5):
    """For each [MASK] in `text` its `top` likeliest tokens, as [(token, probability), ...]."""
    model, tokenizer, _ = load_model(folder)
    sep = tokenizer.encode_single_token("[SEP]")
    mask = tokenizer.encode_single_token("[MASK]")

    # A word's token includes the space before it, and so does the [MASK] that stands for it.
    first, *others = re.split(r" ?\[mask\]", normalise(text))
    tokens = [sep, *tokenizer.encode_ordinary(first)]
    for part in others:
        tokens += [mask, *tokenizer.encode_ordinary(part)]
    tokens.append(sep)  # in training a document stands between two [SEP]
    if not others:
        fail(f"there is no [MASK] in {text!r}: put one where a word is to be found")
    if len(tokens) > model.seq_len:
        fail(f"the text has {len(tokens)} tokens: expected at most {model.seq_len}, shorten it")

    where = [i for i, token in enumerate(tokens) if token == mask]
    logits = model(torch.tensor([tokens]), torch.tensor([where]))[0]  # (K, vocabulary)
    best = logits[:, : -len(SPECIALS)].softmax(-1).topk(top)
    answers = []
    for chances, ids in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        words = [readable(tokenizer.decode_single_token_bytes(token)) for token in ids]
        answers.append(list(zip(words, chances, strict=True)))
    return answers


def readable(token):
    """The bytes of a token as text: pieces of characters and control characters are escaped."""
    text = token.decode("latin-1").strip(" ")
    if text == "":
        return "(space)"
    return ascii(text)[1:-1]


def main(argv):
    if argv in (["-h"], ["--help"]):
        say(__doc__)
        return
    if len(argv) != 2:
        fail('expected a folder and a text: python cram.py fill out/cram "a [MASK] of words."')
    try:
        filled = fill(*argv)
    except OSError as error:  # a folder that may not be read; the two words in the wrong order
        fail(f"{error}: expected a folder and a text")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    for number, answers in enumerate(filled, 1):
        words = "  ".join(f"{word} {chance:.1%}" for word, chance in answers)
        say(f"[MASK] {number}  {words}")


if __name__ == "__main__":
    main(sys.argv[1:])
