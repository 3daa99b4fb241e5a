"""Training of pocket's tokenizer: CLIP's byte-level BPE (Radford et al. 2021, section 2.4), learned from captions."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from sdtune.files import write_text
from sdtune.pocket.world.arrays import caption
from sdtune.pocket.world.objects import HELD_OUT, THINGS

MAX_LENGTH = 32
"""Maximum number of tokens, with start and end token; the longest caption of pocket's world has 22."""

_MERGES = 700
_CAPTIONS = 20_000
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIALS = ["<|startoftext|>", "<|endoftext|>"]


def trained_tokenizer(folder: Path, seed: int) -> CLIPTokenizer:
    """Learn the merges and save the tokenizer as tokenizer.json, and as vocab.json and merges.txt for older clients."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Include the names of held-out objects, so that they are tokenized like all other words.
    names = [thing.name for thing in (*THINGS, *HELD_OUT)]
    corpus = [caption(seed, index) for index in range(_CAPTIONS)] + names * 50
    size = 2 * len(alphabet) + _MERGES
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", min_frequency=20, show_progress=False
        ),
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens. The end token must have the highest id,
    # because older text encoders pool at the position of the highest id.
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    tokens += [left + right for left, right in merges if left + right not in set(tokens)] + _SPECIALS
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[tuple(m) for m in merges], model_max_length=MAX_LENGTH)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer
