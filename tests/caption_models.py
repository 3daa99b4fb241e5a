"""Tiny models with random weights for captions and masks, and a tagger whose probabilities are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTImageProcessorPil,
)

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
WORDS = ("a", "photo", "of", "red", "green", "blue", "fox", "otter", "tree", "house", "sky", "on", "under", "near")
_LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_photos(folder: Path, count: int, width: int = 32, height: int = 24) -> Path:
    """Write ``00.png``, ``01.png``, ... of random colors and noise, without captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        random = np.random.default_rng(i)
        pixels = random.integers(0, 256, (1, 1, 3)) * 0.7 + random.integers(0, 256, (height, width, 3)) * 0.3
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def build_blip(folder: Path) -> Path:
    """BLIP with a vocabulary of :data:`WORDS`."""
    torch.manual_seed(0)
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = BertTokenizer(vocab=vocabulary, extra_special_tokens=["[DEC]"])
    config = BlipConfig(
        text_config={
            **_LAYERS,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": 16,
            "projection_dim": 16,
            "bos_token_id": 5,
            "eos_token_id": 2,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "initializer_range": 1.0,
        },
        vision_config={**_LAYERS, "image_size": 16, "patch_size": 8, "initializer_range": 1.0},
        projection_dim=16,
        initializer_range=1.0,
    )
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def build_llava(folder: Path) -> Path:
    """LLaVA, a decoder-only model with a chat template."""
    torch.manual_seed(0)
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **_LAYERS, image_size=16, patch_size=8, projection_dim=16, initializer_range=1.0
        ),
        text_config=LlamaConfig(
            **_LAYERS, vocab_size=len(tokens), bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=1.0
        ),
        image_token_id=4,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    template = (
        "{% for message in messages %}USER: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def build_clipseg(folder: Path) -> Path:
    """CLIPSeg with masks of 32 x 32 pixels."""
    torch.manual_seed(0)
    tokens = [t + end for t in sorted(pre_tokenizers.ByteLevel.alphabet()) for end in ("", "</w>")]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    layers = {**_LAYERS, "projection_dim": 16}
    config = CLIPSegConfig(
        text_config={
            **layers,
            "vocab_size": len(tokens),
            "bos_token_id": len(tokens) - 2,
            "eos_token_id": len(tokens) - 1,
        },
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        projection_dim=16,
        reduce_dim=8,
        extract_layers=[0, 1],
        decoder_num_attention_heads=2,
    )
    model = CLIPSegForImageSegmentation(config)
    torch.nn.init.normal_(model.decoder.film_mul.weight, std=3.0)  # the default weights hardly depend on the words
    model.save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


TAGS = (("general", 9), ("explicit", 9), ("blue_sky", 0), ("green_hair", 0), ("^_^", 0), ("red_fox_(hero)", 4))
"""Name and category of the tags of :func:`build_tagger`; their probabilities are the mean of channels 0, 1, 2, 0, 1, 2
of its input, divided by 255."""


def build_tagger(folder: Path, tags: Sequence[tuple[str, int]] = TAGS, side: int = 8, batch: int | str = "n") -> Path:
    """Tagger in the format of WD14, see :data:`TAGS`."""
    folder.mkdir(parents=True)
    weights = np.zeros((3, len(TAGS)), np.float32)
    weights[[0, 1, 2, 0, 1, 2], range(6)] = 1 / 255
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["input", "axes"], ["means"], keepdims=0),
            helper.make_node("MatMul", ["means", "weights"], ["output"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, side, side, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, len(TAGS)])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("weights", TensorProto.FLOAT, weights.shape, weights.ravel()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    lines = [f"{100 + i},{name},{category},{1000 - i}" for i, (name, category) in enumerate(tags)]
    (folder / "selected_tags.csv").write_text(
        "\n".join(["tag_id,name,category,count", *lines]) + "\n", encoding="utf-8"
    )
    return folder
