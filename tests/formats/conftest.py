"""LoRA weights for the file formats, on a tiny Stable Diffusion, with alpha != rank and nonzero B."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sdtune.backbone.families import SD1
from sdtune.formats import LoRAWeights, ModelSpec, canonical

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SAMPLERS = ("downsamplers.0.conv", "upsamplers.0.conv", "conv_shortcut")


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """A tiny Stable Diffusion with random weights; without a tokenizer, because the tests use token ids."""
    text = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                cross_attention_dim=16,
                attention_head_dim=2,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ),
            text_encoder=CLIPTextModel(text),
            vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
            scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def load(pipeline_folder):
    """``load()``: a new pipeline on each call."""

    def load():
        return StableDiffusionPipeline.from_pretrained(
            pipeline_folder, tokenizer=None, safety_checker=None, feature_extractor=None, local_files_only=True
        )

    return load


@pytest.fixture
def pipeline(load):
    return load()


@pytest.fixture(scope="session")
def targets():
    """``targets(component, model, ends)``: modules by canonical path, if the path ends in one of ``ends``."""

    def targets(component, model, ends):
        named_modules = model.named_modules()
        return {canonical(f"{component}.{path}"): module for path, module in named_modules if path.endswith(ends)}

    return targets


@pytest.fixture(scope="session")
def pair():
    """``pair(module, rank, generator)``: A and B for a linear layer or a convolution; on meta without generator."""

    def pair(module, rank, generator=None):
        out, inside, *kernel = module.weight.shape
        shapes = (rank, inside, *kernel), (out, rank, *[1] * len(kernel))
        if generator is None:
            return torch.empty(shapes[0], device="meta"), torch.empty(shapes[1], device="meta")
        return torch.randn(shapes[0], generator=generator) * 0.1, torch.randn(shapes[1], generator=generator) * 0.1

    return pair


@pytest.fixture
def modules(pipeline, targets):
    """All modules of the tiny pipeline to which the tests add LoRA, by canonical path."""
    return targets("unet", pipeline.unet, TARGETS + SAMPLERS) | targets(
        "text_encoder", pipeline.text_encoder, TEXT_TARGETS
    )


@pytest.fixture
def make_weights(modules, pair):
    """``make_weights(ranks=..., alphas=...)``: weights for all modules; ranks and alphas are used in turn."""

    def make(ranks=(4,), alphas=(3.0,)):
        generator = torch.Generator().manual_seed(1)
        pairs = {m: pair(modules[m], ranks[i % len(ranks)], generator) for i, m in enumerate(modules)}
        return LoRAWeights(pairs, {m: alphas[i % len(alphas)] for i, m in enumerate(modules)})

    return make


@pytest.fixture
def spec():
    return ModelSpec(
        title="otter",
        resolution=512,
        prediction_type="epsilon",
        steps=300,
        seed=7,
        model=SD1.lora_names("epsilon"),
        date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        trigger="sks otter",
    )


@pytest.fixture
def delta():
    """``delta(weights, module)``: weight change of a module in float64, from the definition."""

    def weight_change(weights, module):
        down, up = (tensor.double() for tensor in weights.pairs[module])
        change = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
        return change * weights.alphas[module] / down.shape[0]

    return weight_change
