"""The lines that a finished training run prints: its files, and a command that samples with them."""

from __future__ import annotations

from pathlib import Path

from sdtune.backbone import Pretrained
from sdtune.backbone.families import FAMILIES, GUIDANCE, POCKET_GUIDANCE
from sdtune.data import ImageDataModule
from sdtune.data.control.base import Computed
from sdtune.formats.diffusers_lora import FILE_NAME
from sdtune.formats.embeddings import FOLDER as EMBEDDINGS
from sdtune.formats.embeddings import is_snapshot
from sdtune.quoting import in_quotes, override, shell_word


def closing_lines(folder: Path, name: str, source: Pretrained, data: ImageDataModule) -> list[str]:
    """Lines that name the files of the run in ``folder`` and a command that samples with them.

    Args:
        name: name of the artifact.
        source: the backbone that was trained.
        data: the training data; its first caption becomes the prompt.
    """
    lines = [f"metrics: {folder / 'metrics.json'}"]
    before_after = folder / "samples" / "before_after.png"
    if before_after.exists():
        lines.append(f"before and after: {before_after}")
    prompt = shell_word(f"prompt={in_quotes(data.all_prompts()[0])}")
    base = backbone_overrides(source)
    lora, model_folder = folder / "artifact" / f"{name}.safetensors", folder / "artifact" / name
    embeddings = sorted((folder / "artifact" / EMBEDDINGS).glob("*.safetensors"))
    embeddings = [file for file in embeddings if not is_snapshot(file.stem)]
    lines += [f"embedding for ComfyUI and A1111: {file}" for file in embeddings]
    if lora.exists():
        lines.append(f"LoRA for ComfyUI, A1111 and kohya's tools: {lora}")
        lines.append(f"LoRA for diffusers: {lora.with_name(FILE_NAME)}")
    if lora.exists() or (embeddings and not model_folder.is_dir()):
        adapter_path = lora.parent if embeddings else lora
        # An embedding has no strength.
        strength = ", strength: 0.8" if lora.exists() else ""
        adapter = shell_word(f"adapters=[{{path: {in_quotes(adapter_path)}{strength}}}]")
        lines.append(f"sample with it: sdtune sample{base} {prompt} {adapter}")
    elif (model_folder / "config.json").is_file():
        lines.append(f"ControlNet for diffusers: {model_folder}")
        computed = f", preprocess: {data.control.name}" if isinstance(data.control, Computed) else ""
        control = shell_word(f"control=[{{path: {in_quotes(model_folder)}, image: FILE{computed}}}]")
        lines.append(f"sample with it: sdtune sample{base} {prompt} {control}")
    elif model_folder.is_dir():
        lines.append(f"pipeline folder for diffusers: {model_folder}")
        # No prediction_type is needed: the trained pipeline has its own scheduler config.
        trained = Pretrained(
            str(model_folder),
            guidance=source.guidance,
            clip_skip=source.clip_skip,
            max_tokens=source.max_tokens,
            family=source.family,
        )
        lines.append(f"sample with it: sdtune sample{backbone_overrides(trained, source.path == 'pocket')} {prompt}")
    return lines


def backbone_overrides(source: Pretrained, pocket: bool | None = None) -> str:
    """Command-line overrides that select ``source``, each preceded by a space; empty for pocket with its defaults.

    Args:
        pocket: whether ``source`` was trained from pocket and has its settings; None: decided by its path.
    """
    pocket = source.path == "pocket" if pocket is None else pocket
    family = source.family or "sd1"
    default_guidance = POCKET_GUIDANCE if pocket else GUIDANCE[family]
    settings = {
        **({} if source.path == "pocket" else {"path": source.path, "revision": source.commit}),
        "variant": source.variant,
        "config": source.config_folder,
        "vae": source.vae,
        "allow_pickle": source.allow_pickle or None,
        "clip_skip": source.clip_skip or None,
        "max_tokens": source.max_tokens,
        "prediction_type": source.prediction_type,
        "zero_terminal_snr": source.zero_terminal_snr or None,
        "guidance": source.guidance if source.guidance != default_guidance else None,
    }
    overrides = [override(f"backbone.{key}", value) for key, value in settings.items() if value is not None]
    group = [] if pocket else [FAMILIES[family][1]]
    return "".join(f" {shell_word(word)}" for word in [*group, *overrides])
