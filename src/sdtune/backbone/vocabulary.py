"""CLIP's tokenizer for checkpoints without one; its vocabulary ships with sdtune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import pre_tokenizers

_MERGES = Path(__file__).parent / "configs" / "vocabulary" / "merges.txt"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, pad: str = END) -> None:
    """``folder`` with CLIP's 49,408 tokens in the files that every release of transformers reads.

    Args:
        folder: is made.
        pad: what fills a prompt up: the end token, but ``!`` in SD 2.x and for SDXL's second encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_MERGES, folder / "merges.txt")
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def vocabulary() -> dict[str, int]:
    """Token -> id: bytes, bytes that end a word, what merging makes of them, start and end (CLIP's own order)."""
    # The order of OpenAI's table: printable bytes first, then the stand-ins of the others.
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (ord(letter) > 255, letter))
    merges = [line for line in _MERGES.read_text().splitlines()[1:] if line]
    tokens = [*bytes_in_order, *(f"{byte}</w>" for byte in bytes_in_order)]
    tokens += ["".join(merge.split()) for merge in merges]
    return {token: number for number, token in enumerate([*tokens, BEGIN, END])}
