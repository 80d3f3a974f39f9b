"""A trained model in the files that HuggingFace's transformers opens, exactly and with no code.

    python cram.py export out/cram out/cram-hf

The new folder holds config.json, model.safetensors, tokenizer.json, tokenizer_config.json and a
README.md with the numbers of the run. A model of recipe modern becomes a ModernBertForMaskedLM, one
of recipe bert a BertForMaskedLM. Nothing here needs transformers: the formats are plain.
"""

import base64
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cram import SPECIALS, fail, load_model, say, write_whole

MODERN, BERT = "ModernBertForMaskedLM", "BertForMaskedLM"
STOCK = {  # the shapes that a class of transformers has
    MODERN: {
        "norm": "pre", "gated": True, "positions": "rotary", "head": False,
        "linear_bias": False, "norm_bias": False,
    },
    BERT: {
        "norm": "post", "gated": False, "positions": "learned", "head": True,
        "linear_bias": True, "norm_bias": True,
    },
}  # fmt: skip
DROPOUT = 0.1  # what fine-tuning wants, as in finetune_glue.py


# ---- Weights -------------------------------------------------------------------------------------
def architecture(cfg):
    """The class of transformers that computes what a model of this Config does."""
    for name, shape in STOCK.items():
        if all(getattr(cfg, field) == value for field, value in shape.items()):
            return name
    own = STOCK[BERT if cfg.recipe == "bert" else MODERN]
    others = [f"{name} {getattr(cfg, name)}" for name in own if getattr(cfg, name) != own[name]]
    about = f"recipe {cfg.recipe} with {', '.join(others)}"
    fail(f"transformers has no class for {about}: expected the shape of modern or bert")


def modern_tensors(weights, cfg):
    """The tensors of a ModernBertForMaskedLM; takes out of `weights` what it uses."""
    tensors = {
        "model.embeddings.tok_embeddings.weight": weights.pop("embedding.weight"),
        "model.embeddings.norm.weight": torch.ones(cfg.width),  # ours has no weight
    }
    for i in range(cfg.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        qkv = weights.pop(f"{ours}.qkv.weight")
        scale = weights.pop(f"{ours}.attn_norm.weight")
        if i == 0:
            # Theirs has no norm here. Behind the embedding's, which has no weight, ours only
            # multiplies by its weight, and so does a matrix with scaled columns.
            qkv = qkv * scale
        else:
            tensors[f"{theirs}.attn_norm.weight"] = scale
        tensors[f"{theirs}.attn.Wqkv.weight"] = qkv
        qk_bias = weights.pop(f"{ours}.qk_bias", None)  # (2, heads, 1, head width), if there is one
        if qk_bias is not None:
            zeros = torch.zeros(cfg.width)  # theirs has a bias everywhere or nowhere
            tensors[f"{theirs}.attn.Wqkv.bias"] = torch.cat((qk_bias.flatten(), zeros))
            tensors[f"{theirs}.attn.Wo.bias"] = zeros.clone()
        tensors[f"{theirs}.attn.Wo.weight"] = weights.pop(f"{ours}.attn_out.weight")
        tensors[f"{theirs}.mlp_norm.weight"] = weights.pop(f"{ours}.ffn_norm.weight")
        value, gate = weights.pop(f"{ours}.ffn_in.weight").chunk(2)
        tensors[f"{theirs}.mlp.Wi.weight"] = torch.cat((gate, value))  # theirs has the gate first
        tensors[f"{theirs}.mlp.Wo.weight"] = weights.pop(f"{ours}.ffn_out.weight")

    # Between its last norm and the decoder, theirs has a matrix and another norm. The matrix undoes
    # the weight of the last norm, so that the other one sees its input and gives the same again.
    scale = weights.pop("final_norm.weight")
    nonzero = torch.where(scale.abs() < 1e-6, 1e-6, scale)  # 1 / 0 cannot be undone
    tensors["model.final_norm.weight"] = nonzero
    tensors["head.dense.weight"] = torch.diag(1 / nonzero)
    tensors["head.norm.weight"] = scale
    if "decoder_bias" in weights:
        tensors["decoder.bias"] = weights.pop("decoder_bias")
    return tensors


def bert_tensors(weights, cfg):
    """The tensors of a BertForMaskedLM; takes out of `weights` what it uses."""
    names = {
        "embedding_norm": "bert.embeddings.LayerNorm",
        "head.0": "cls.predictions.transform.dense",
        "head.2": "cls.predictions.transform.LayerNorm",
    }
    tensors = {
        "bert.embeddings.word_embeddings.weight": weights.pop("embedding.weight"),
        "bert.embeddings.position_embeddings.weight": weights.pop("positions"),
        "bert.embeddings.token_type_embeddings.weight": torch.zeros(2, cfg.width),  # ours has none
        "cls.predictions.bias": weights.pop("decoder_bias"),
    }
    for i in range(cfg.layers):
        ours, theirs = f"blocks.{i}", f"bert.encoder.layer.{i}"
        names[f"{ours}.attn_out"] = f"{theirs}.attention.output.dense"
        names[f"{ours}.attn_norm"] = f"{theirs}.attention.output.LayerNorm"
        names[f"{ours}.ffn_in"] = f"{theirs}.intermediate.dense"
        names[f"{ours}.ffn_out"] = f"{theirs}.output.dense"
        names[f"{ours}.ffn_norm"] = f"{theirs}.output.LayerNorm"
        for kind in ("weight", "bias"):
            parts = weights.pop(f"{ours}.qkv.{kind}").chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                tensors[f"{theirs}.attention.self.{name}.{kind}"] = part
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            tensors[f"{theirs}.{kind}"] = weights.pop(f"{ours}.{kind}")
    return tensors


def write_safetensors(tensors, file):
    """The format safetensors: the header's length in 8 bytes, a JSON header, then the numbers."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.numpy().astype("<f4").tobytes())  # little-endian, row by row


# ---- Configuration -------------------------------------------------------------------------------
def make_config(name, cfg, tensors, model):
    """The content of config.json; what it leaves out, as the exact GELU, the class does anyway."""
    pad, cls, sep, _ = range(model.vocab_size - len(SPECIALS), model.vocab_size)
    config = {
        "architectures": [name],
        "vocab_size": model.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": model.seq_len,
        "pad_token_id": pad,
    }
    if name == BERT:
        dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        config |= {"model_type": "bert", "intermediate_size": cfg.ffn_width}
        config |= {"layer_norm_eps": 1e-12, "type_vocab_size": 2}
    else:
        dropouts = [f"{part}_dropout" for part in ("embedding", "attention", "mlp", "classifier")]
        config |= {"model_type": "modernbert", "intermediate_size": cfg.ffn_width // 2}
        config |= {"norm_eps": 1e-12, "classifier_activation": "linear"}  # that of the head
        config |= {"global_rope_theta": 10000.0, "local_rope_theta": 10000.0}
        config["global_attn_every_n_layers"] = 1  # each layer looks at all positions
        config["attention_bias"] = "model.layers.0.attn.Wqkv.bias" in tensors
        config["decoder_bias"] = "decoder.bias" in tensors
        # Its own numbers of these tokens are beyond a small vocabulary.
        config |= {"cls_token_id": cls, "sep_token_id": sep}
        config |= {"bos_token_id": cls, "eos_token_id": sep}
    return config | dict.fromkeys(dropouts, DROPOUT)


# ---- Tokenizer -----------------------------------------------------------------------------------
def byte_letters():
    """{byte: letter}: GPT-2's way to write bytes as text, in which no letter is a space."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # of Latin-1: these stay
    letters = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in visible:
            letters[byte] = chr(256 + len(letters) - len(visible))
    return letters


def find_merges(ranks):
    """[(left, right)]: the two tokens that each longer token is made of, in order of rank. A token
    is encoded with the merges that come before its own: what is left are its two parts."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            best = min(pairs)
            if best >= rank:  # no merges lead to it
                break
            i = pairs.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:  # a single byte has one part
            merges.append(tuple(parts))
    return merges


def make_normalizer():
    """What cram.normalise does, as the steps of a normaliser."""
    spaces = "".join(chr(c) for c in range(0x10000) if chr(c).isspace())  # as str.split has them
    steps = [{"type": "NFD"}]  # cuts an accent off its letter
    # Spaces first: some are control characters, which go next, with all that is not ASCII.
    for pattern, content in ((f"[{spaces}]", " "), ("[^ -~]", ""), (" +", " ")):
        steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": content})
    steps.append({"type": "Lowercase"})  # of ASCII alone: no letter becomes two
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    return {"type": "Sequence", "normalizers": steps}


def make_template(special):
    """`[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]` as lists of pieces, all of one type."""
    cls, sep = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    a, b = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    tokens = {name: {"id": name, "ids": [special[name]], "tokens": [name]} for name in special}
    pieces = {"single": [cls, a, sep], "pair": [cls, a, sep, b, sep]}
    return {"type": "TemplateProcessing", "special_tokens": tokens} | pieces


def make_tokenizer(text, pattern):
    """The content of tokenizer.json: the same tokens as load_tokenizer behind normalise."""
    letters = byte_letters()
    lines = [line.split() for line in text.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    merges = [f"{spelled[left]} {spelled[right]}" for left, right in find_merges(ranks)]

    # A [MASK] is found in the normalised text and takes the space before it, as a word does; the
    # others are found before that, so that what stands between them is normalised by itself.
    added = []
    for name, number in special.items():
        flags = dict.fromkeys(("lstrip", "normalized"), name == "[MASK]")
        flags |= {"single_word": False, "rstrip": False, "special": True}
        added.append({"id": number, "content": name, **flags})

    # The pattern cuts the text, and each piece is spelled in bytes.
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    words["invert"] = False
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    as_bytes["use_regex"] = False  # it has a pattern of its own
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": make_normalizer(),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, as_bytes]},
        # As in tiktoken, a piece that is a token itself needs no merges.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
        "post_processor": make_template(special),
        "decoder": as_bytes,
    }


# ---- The folder ----------------------------------------------------------------------------------
README = """---
library_name: transformers
pipeline_tag: fill-mask
---
A {name}, {cfg.layers} layers of {cfg.width}, trained from scratch with recipe {cfg.recipe}.

| | |
| --- | --- |
| trained on | {source} |
| tokens | {tokens} |
| FLOPs | {run[flops]:.3g} |
| validation loss | {run[val_loss]:.3f} nats |
| longest text | {seq_len} tokens |

Text is read in lower case and ASCII. In training a text stood between two [SEP]; fine-tuning
gives [CLS] its meaning.
"""


def make_files(model, state):
    """({name: text} of the small files, {name: tensor})."""
    cfg, run, seq_len = model.cfg, state["run"], model.seq_len
    name = architecture(cfg)
    weights = dict(model.state_dict())
    convert = bert_tensors if name == BERT else modern_tensors
    tensors = convert(weights, cfg)
    if weights:  # else the export would be another model, without a word
        fail(f"{name} has no place for {', '.join(weights)}: this model cannot be exported")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    about["model_input_names"] = ["input_ids", "attention_mask"]
    for token, role in zip(SPECIALS, ("pad", "cls", "sep", "mask"), strict=True):
        about[f"{role}_token"] = token
    files = {
        "config.json": make_config(name, cfg, tensors, model),
        "tokenizer.json": make_tokenizer(state["tokenizer"], state["meta"]["pattern"]),
        "tokenizer_config.json": about,
    }
    texts = {path: json.dumps(content, indent=1) for path, content in files.items()}
    numbers = {"name": name, "cfg": cfg, "run": run, "seq_len": seq_len}
    numbers["tokens"] = run["reads"] * seq_len
    numbers["source"] = " ".join(state["meta"]["options"]["source"])  # what --source was
    return texts | {"README.md": README.format(**numbers)}, tensors


def export(out, folder):
    """Writes the model of `out` into a new `folder`, which appears once it is whole."""
    target = Path(os.path.realpath(folder))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        fail(f"{folder} exists already: choose another folder")
    model, _, state = load_model(out)
    texts, tensors = make_files(model, state)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")  # on the same disk
    part.mkdir(parents=True)
    try:
        for name, text in texts.items():
            data = text.encode(errors="replace")  # a source's name may be no text
            write_whole(part / name, lambda file, data=data: file.write(data))
        write_whole(part / "model.safetensors", lambda file: write_safetensors(tensors, file))
        if target.exists():
            target.rmdir()  # an empty folder is as good as none
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # what a full disk, or Ctrl-C, has left
    size = sum(path.stat().st_size for path in target.iterdir()) / 1e6
    say(f"wrote    {folder}: a {architecture(model.cfg)}, {size:.1f} MB")


def main(argv):
    if len(argv) != 2 or argv[0] in ("-h", "--help"):
        fail("expected two folders: python cram.py export out/cram out/cram-hf")
    try:
        export(*argv)
    except OSError as error:  # a full disk, a folder that may not be written
        fail(f"{error}: nothing was written to {argv[1]}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
