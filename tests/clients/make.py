"""Write each kind of artifact in each format for small models of each family, and the images that sdtune generates.

``python make.py FOLDER`` writes the files and ``cases.json``; ``client.py`` loads each with plain diffusers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from families import FAMILIES, SD3, SD3_FAMILIES, Family, build_family, build_sd3
from running import fit, folder_data
from sdtune.backbone import Pretrained
from sdtune.backbone.new_tokens import NewToken
from sdtune.data.control.edges import Canny
from sdtune.exporting import Export, find_artifact
from sdtune.loaders.artifact import artifacts_applied
from sdtune.loaders.controlnet import load_applicable_controlnet
from sdtune.loaders.lora import AdapterFile, load_adapters
from sdtune.methods import ControlNet, Full, LoRA, TextualInversion
from sdtune.sampling.loop import Request, Sampling, generate

PROMPT, SEED, STRENGTH = "a photo of a <cat> cat", 7, 0.7
SETTINGS = Sampling(steps=2, guidance=4.0)


def targets(family: Family | SD3) -> list[Any]:
    """All kinds of layers that a LoRA of diffusers can have, but for convolutions."""
    attention = {"sd35_medium": ["joint_attention", "self_attention"]}.get(family, ["joint_attention"])
    attention = attention if family in SD3_FAMILIES else ["cross_attention", "self_attention"]
    return [*attention, "feed_forward", "text_encoder"]


def images(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def trained(model: Any, data: Any, folder: Path, name: str) -> Path:
    """Artifact of ``model`` after one step and random changes that are large enough to be visible."""
    fit(model, data, 1)
    rng = torch.Generator().manual_seed(5)
    for _, parameter in model.trainable():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    model.artifact(folder, name)
    return folder


def generated(source: Pretrained, files: list[Path], strength: float, net: Path | None, maps: Any) -> np.ndarray:
    backbone = source.load()
    loaded = load_adapters(backbone, [AdapterFile(str(file), strength) for file in files], source)
    nets = [load_applicable_controlnet(backbone, source, str(net))] if net else []
    request = Request(PROMPT, SEED, {"control": maps} if net else {})
    with artifacts_applied(backbone, [*nets, *loaded]):
        return next(generate(backbone, [request], SETTINGS))


def cases(family: Family | SD3, folder: Path) -> Iterator[dict[str, Any]]:
    """Write the files of ``family``; yield for each its kind, format and expected image."""
    is_sd3 = family in SD3_FAMILIES
    raw = build_sd3(folder / "raw", family) if family in SD3_FAMILIES else build_family(folder / "raw", family)
    # Export the base model: current transformers saves text encoders built from a config with unusual tensor names.
    [base] = Export("pipeline", dtype="fp32").write(
        find_artifact(raw, "artifact"), Pretrained(str(raw)), folder / "base"
    )
    source = Pretrained(str(base))
    image_folder, side = images(folder / "images"), source.facts.side
    maps = np.random.default_rng(1).integers(0, 2, (side, side, 1), dtype=np.uint8).repeat(3, 2) * 255
    Image.fromarray(maps).save(folder / "map.png")
    data = folder_data(image_folder, prompt="a cat", resolution=64)

    def case(kind: str, format_name: str, path: Path, image: np.ndarray) -> dict[str, Any]:
        name = f"{family}-{kind}-{format_name}".replace(" ", "_")
        np.save(folder / f"{name}.npy", image)
        return {
            "name": name,
            "family": family,
            "kind": kind,
            "form": format_name,
            "base": str(base),
            "place": str(path),
            "image": str(folder / f"{name}.npy"),
            "map": str(folder / "map.png"),
            "prompt": PROMPT,
            "seed": SEED,
            "steps": SETTINGS.steps,
            "guidance": SETTINGS.guidance,
            "strength": STRENGTH,
        }

    def written(path: Path, format_name: Any, **more: Any) -> Path:
        export = Export(format_name, dtype="fp32", **more)
        return export.write(
            find_artifact(path, "artifact"), source, folder / f"{path.parent.name}-{path.name}-{format_name}"
        )[0]

    yield case("base", "folder", base, generated(source, [], 1.0, None, maps))
    single = written(base, "single_file")
    yield case("base", "single file", single, generated(source, [], 1.0, None, maps))

    lora = trained(
        LoRA(backbone=source, rank=4, alpha_policy="constant", alpha=6.0, targets=targets(family)),
        data,
        folder / "lora",
        "it",
    )
    file = lora / "pytorch_lora_weights.safetensors"
    expected = generated(source, [file], STRENGTH, None, maps)
    yield case("LoRA", "diffusers", file, expected)
    if not is_sd3:  # for SD 3, diffusers reads only its own form
        yield case("LoRA", "kohya", lora / "it.safetensors", expected)
        yield case("LoRA", "kohya, folded", written(lora, "kohya", alpha="folded"), expected)
    yield case("LoRA, merged", "folder", written(lora, "pipeline", strength=STRENGTH), expected)
    yield case("LoRA, merged", "single file", written(lora, "single_file", strength=STRENGTH), expected)

    if not is_sd3:  # diffusers loads no embeddings of SD 3
        tokens = [NewToken("<cat>", "cat", 2)]
        embeddings_folder = trained(
            TextualInversion(backbone=source, new_tokens=tokens),
            folder_data(image_folder, prompt="a <cat>", resolution=64),
            folder / "words",
            "it",
        )
        expected = generated(source, [embeddings_folder], 1.0, None, maps)
        yield case("word", "diffusers", embeddings_folder / "learned_embeds.safetensors", expected)
        yield case("word", "A1111", embeddings_folder / "embeddings" / "cat.safetensors", expected)

    data_with_maps = folder_data(image_folder, prompt="a cat", resolution=64, control=Canny())
    net = trained(ControlNet(backbone=source), data_with_maps, folder / "net", "it") / "it"
    expected = generated(source, [], 1.0, net, maps)
    yield case("ControlNet", "folder", net, expected)
    if not is_sd3:  # diffusers reads single files only of Stability AI's ControlNets of SD 3
        yield case("ControlNet", "single file", written(net, "single_file"), expected)

    full = trained(Full(backbone=source, parts=["denoiser", "text_encoder", "vae"]), data, folder / "full", "it") / "it"
    expected = generated(Pretrained(str(full)), [], 1.0, None, maps)
    yield case("model", "folder", full, expected)
    yield case("model", "single file", written(full, "single_file"), expected)


def main() -> None:
    torch.manual_seed(0)
    target = Path(sys.argv[1]).absolute()
    all_cases = []
    for family in (*FAMILIES, *SD3_FAMILIES):
        (target / family).mkdir(parents=True)
        all_cases += list(cases(family, target / family))
    (target / "cases.json").write_text(json.dumps(all_cases, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
