"""What a run prints when it ends: its files, and the commands that come next."""

from __future__ import annotations

from pathlib import Path

from sdtune.backbone import Pretrained
from sdtune.backbone.families import FAMILIES, GUIDANCE, POCKET_GUIDANCE
from sdtune.data import ImageDataModule
from sdtune.data.control.base import Computed
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.embeddings import FOLDER as WORDS
from sdtune.formats.embeddings import intermediate
from sdtune.quoting import in_quotes, override, shell_word


def after(folder: Path, name: str, source: Pretrained, data: ImageDataModule) -> list[str]:
    """What was made, and the command that samples with it."""
    lines = [f"metrics: {folder / 'metrics.json'}"]
    before_after = folder / "samples" / "before_after.png"
    if before_after.exists():
        lines.append(f"before and after: {before_after}")
    prompt = shell_word(f"prompt={in_quotes(data.captions()[0])}")
    base = backbone_overrides(source)
    lora, whole = folder / "artifact" / f"{name}.safetensors", folder / "artifact" / name
    words = sorted((folder / "artifact" / WORDS).glob("*.safetensors"))
    words = [file for file in words if not intermediate(file.stem)]
    lines += [f"word for ComfyUI and A1111: {file}" for file in words]
    if lora.exists():
        lines.append(f"LoRA for ComfyUI, A1111 and kohya's tools: {lora}")
        lines.append(f"LoRA for diffusers: {lora.with_name(FILE_NAME)}")
    if lora.exists() or (words and not whole.is_dir()):
        place = lora.parent if words else lora
        strength = ", strength: 0.8" if lora.exists() else ""  # a word acts by standing in the prompt
        adapter = shell_word(f"adapters=[{{path: {in_quotes(place)}{strength}}}]")
        lines.append(f"sample with it: sdtune sample{base} {prompt} {adapter}")
    elif (whole / "config.json").is_file():
        lines.append(f"ControlNet for diffusers: {whole}")
        computed = f", preprocess: {data.control.name}" if isinstance(data.control, Computed) else ""
        control = shell_word(f"control=[{{path: {in_quotes(whole)}, image: FILE{computed}}}]")
        lines.append(f"sample with it: sdtune sample{base} {prompt} {control}")
    elif whole.is_dir():
        lines.append(f"pipeline folder for diffusers: {whole}")
        # Its own scheduler says what it predicts.
        trained = Pretrained(
            str(whole),
            guidance=source.guidance,
            clip_skip=source.clip_skip,
            max_tokens=source.max_tokens,
            family=source.family,
        )
        lines.append(f"sample with it: sdtune sample{backbone_overrides(trained, source.path == 'pocket')} {prompt}")
    return lines


def backbone_overrides(source: Pretrained, pocket: bool | None = None) -> str:
    """The overrides that name ``source``, with a space before each; none for pocket as it is.

    ``pocket``: whether pocket's settings are behind it, by its path if None.
    """
    pocket = source.path == "pocket" if pocket is None else pocket
    family = source.family or "sd1"
    usual = POCKET_GUIDANCE if pocket else GUIDANCE[family]
    own = {
        **({} if source.path == "pocket" else {"path": source.path, "revision": source.commit}),
        "variant": source.variant,
        "config": source.config_folder,
        "vae": source.vae,
        "allow_pickle": source.allow_pickle or None,
        "clip_skip": source.clip_skip or None,
        "max_tokens": source.max_tokens,
        "prediction_type": source.prediction_type,
        "zero_terminal_snr": source.zero_terminal_snr or None,
        "guidance": source.guidance if source.guidance != usual else None,
    }
    said = [override(f"backbone.{key}", value) for key, value in own.items() if value is not None]
    group = [] if pocket else [FAMILIES[family][1]]
    return "".join(f" {shell_word(each)}" for each in [*group, *said])
