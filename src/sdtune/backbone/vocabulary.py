"""CLIP's tokenizer for checkpoints without a tokenizer; its vocabulary is included in sdtune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import pre_tokenizers

_MERGES = Path(__file__).parent / "configs" / "vocabulary" / "merges.txt"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, pad: str = END) -> None:
    """Write CLIP's tokenizer (49,408 tokens) in the file format that all releases of transformers read.

    Args:
        folder: target folder; it is created if missing.
        pad: padding token: the end token, but ``!`` for SD 2.x and SDXL's second text encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_MERGES, folder / "merges.txt")
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def vocabulary() -> dict[str, int]:
    """CLIP's vocabulary, token -> id: bytes, bytes at the end of a word, merged tokens, start and end token."""
    # Order of OpenAI's table: printable bytes first, then the replacement characters of the other bytes.
    bytes_in_order = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (ord(letter) > 255, letter))
    merges = [line for line in _MERGES.read_text(encoding="utf-8").splitlines()[1:] if line]
    tokens = [*bytes_in_order, *(f"{byte}</w>" for byte in bytes_in_order)]
    tokens += ["".join(merge.split()) for merge in merges]
    return {token: index for index, token in enumerate([*tokens, BEGIN, END])}
