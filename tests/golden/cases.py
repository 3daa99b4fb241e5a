"""The golden cases: command lines of ``sdtune`` with the current names, and their output folders.

Placeholders in arguments: ``{work}`` is the folder of the case; ``{sd1}``, ``{sd2}`` and ``{sdxl}`` are small pipelines
with the structure of these models; ``{images}`` is a folder of five captioned images with masks; ``{map}`` is an image.
"""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 12

PLACES = {
    "work": ".",
    "images": "../inputs/images",
    "map": "../inputs/map.png",
    **{family: f"../inputs/{family}" for family in ("sd1", "sd2", "sdxl")},
}


@dataclass(frozen=True)
class Command:
    """``sdtune <name> <arguments>``; ``folder`` is the output folder, None for a command that only prints."""

    name: str
    folder: str | None
    arguments: tuple[str, ...]

    def line(self) -> list[str]:
        """The arguments with all placeholders replaced, and the override of Hydra's output folder.

        All paths are relative to the folder of the case, because outputs contain some of them.
        """
        filled = []
        for argument in self.arguments:
            for key, place in PLACES.items():
                argument = argument.replace(f"{{{key}}}", place)
            filled.append(argument)
        if self.folder is None or any(a.startswith("resume=") for a in filled):
            return [self.name, *filled]
        kind = "sweep" if "-m" in filled else "run"
        return [self.name, *filled, f"hydra.{kind}.dir={self.folder}"]


_RUN = (
    "hardware=cpu",
    "hardware.precision=32-true",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=3",
    "checkpoint.every_steps=6",
    "callbacks.samples.every_steps=6",
    "callbacks.samples.sampling.steps=2",
    "callbacks.samples.seeds=[0]",
)
_MEASURED = ("evaluation.sampling.steps=2",)
_FOLDER = ("data=folder", "data.path={images}", "evaluation=none")
_SD1 = ("backbone=sd15", "backbone.path={sd1}", "data.batch_size=2", *_FOLDER)


def _train(*arguments: str, folder: str = "run") -> Command:
    return Command("train", folder, (*arguments, *_RUN))


def _sample(*arguments: str) -> Command:
    return Command("sample", "sample", (*arguments, "sampling.steps=3", "seeds=[0,1]", "hardware=cpu"))


def _sampled(prompt: str, artifact: str, *backbone: str) -> Command:
    return _sample(
        f'prompt="{prompt}"', f"adapters=[{{path: {{work}}/run/artifact{artifact}, strength: 0.8}}]", *backbone
    )


def _exported(*formats: str, more: tuple[str, ...] = ()) -> list[Command]:
    return [Command("export", f"export-{f}", ("run={work}/run", f"format={f}", "dtype=fp32", *more)) for f in formats]


CASES: dict[str, list[Command]] = {
    "lora": [
        _train(
            "experiment=lora_subject",
            "data.validation_images=2",
            "trainer.val_check_interval=6",
            "save_every=6",
            "evaluation.images=6",
            "evaluation.class_images=4",
            *_MEASURED,
        ),
        _sampled("a photo of a big sks bird on a green background", "/parrot.safetensors"),
        *_exported("diffusers", "kohya"),
        *_exported("pipeline", "single_file", more=("strength=0.8",)),
        Command("export", "export-reduced", ("run={work}/run", "format=kohya", "rank=4", "alpha=folded")),
        Command("evaluate", "evaluation", ("run={work}/run", "hardware=cpu")),
    ],
    "textual_inversion": [
        _train("experiment=textual_inversion_subject", "evaluation.images=4", "evaluation.class_images=0", *_MEASURED),
        _sampled("a photo of <parrot> on a green background", ""),
        *_exported("diffusers", "kohya"),
    ],
    "dreambooth": [
        _train(
            "experiment=dreambooth_subject",
            "data.class_images=8",
            "evaluation.images=4",
            "evaluation.class_images=4",
            *_MEASURED,
        ),
        _sample(
            "prompt=a photo of a big sks bird on a green background",
            "backbone.path={work}/run/artifact/parrot",
            "sampling.guidance=3",
        ),
        *_exported("pipeline", "single_file"),
        # energy=..., because rank alone uses a randomized SVD.
        *_exported("kohya", more=("energy=0.5",)),
    ],
    "full": [
        _train(
            "experiment=full_style",
            "data.images=24",
            "evaluation.objects=3",
            "evaluation.seeds=1",
            "data.batch_size=4",
            *_MEASURED,
        ),
        *_exported("diffusers"),
    ],
    "controlnet": [
        _train("experiment=controlnet_canny", "data.images=16", "data.batch_size=4", "evaluation.images=4", *_MEASURED),
        _sample(
            "prompt=a photo of a fox on a green background",
            "control=[{path: {work}/run/artifact/world, image: {map}, strength: 0.8, preprocess: canny}]",
        ),
        *_exported("diffusers", "single_file"),
    ],
    "controlnet_opened": [
        _train(
            "experiment=controlnet_segmentation",
            "method.denoiser=decoder",
            "method.denoiser_lr=1e-5",
            "data.images=16",
            "data.batch_size=4",
            "evaluation.images=4",
            *_MEASURED,
        ),
        *_exported("single_file"),
    ],
    "sdxl": [
        _train(
            "backbone=sdxl",
            "backbone.path={sdxl}",
            "method=lora",
            "method.targets=[cross_attention,feed_forward,convolutions,text_encoder]",
            "method.blocks={denoiser.mid_block: {rank: 2}}",
            "method.text_encoder_lr=1e-4",
            "data.batch_size=2",
            "data.resolution=64",
            *_FOLDER,
        ),
        _sampled("a photo of sks otter", "/images.safetensors", "backbone=sdxl", "backbone.path={sdxl}"),
        *_exported("kohya", "single_file"),
    ],
    "sd2": [
        _train("backbone=sd21", "backbone.path={sd2}", "method=lora", "method.rank=4", "data.batch_size=2", *_FOLDER),
        *_exported("kohya"),
    ],
    "full_sd1": [_train("method=full", "method.parts=[denoiser,text_encoder]", "data.hold_out=5", *_SD1)],
    "words_beside_lora": [
        _train(
            "method=lora",
            "method.rank=4",
            'new_tokens=[{token: "<otter>", init: otter, vectors: 2}]',
            "tokens_lr=1e-2",
            "data.templates=object",
            *_SD1,
        )
    ],
    "prior_pairs": [
        _train("method=lora", 'data.class_prompt="a photo of an otter"', "data.class_images=4", "data.flip=true", *_SD1)
    ],
    "masks": [
        _train(
            "method=lora",
            "method.dropout=0.1",
            "data.mask=file",
            "data.flip=true",
            "data.random_crop=true",
            "data.cache_latents=false",
            "data.caption_dropout=0.5",
            "data.trigger=sks",
            *_SD1,
        )
    ],
    "average_and_accumulation": [
        _train(
            "method=lora",
            "callbacks=ema",
            "callbacks.ema.decay=0.5",
            "trainer.accumulate_grad_batches=2",
            "data.hold_out=5",
            "trainer.val_check_interval=6",
            *_SD1,
            "data.batch_size=4",
        )
    ],
    "objective_and_optimizer": [
        _train(
            "method=lora",
            "method.alpha_policy=rslora",
            "method.alpha=4",
            "objective=min_snr",
            "objective.offset_noise=0.1",
            "lr_schedule=cosine",
            "optimizer=adafactor",
            *_SD1,
        )
    ],
    "measured_by_clip": [
        _train(
            "method=lora",
            "data=folder",
            "data.path={images}",
            'data.class_prompt="a photo of an otter"',
            "data.class_images=4",
            "evaluation.images=4",
            *_MEASURED,
        )
    ],
    "resumed": [
        Command(
            "train", "run", ("method=lora", *_SD1, *(a for a in _RUN if "max_steps" not in a), "trainer.max_steps=6")
        ),
        Command("train", "run", ("resume={work}/run", f"trainer.max_steps={STEPS}")),
    ],
    "shared_backbone": [
        Command(
            "train",
            "sweep",
            (
                "-m",
                "hydra/launcher=shared_backbone",
                "hydra.launcher.processes=1",
                "hydra.launcher.max_concurrent_runs=3",
                "method=lora",
                "method.rank=2,4,6",
                "data.hold_out=5",
                *_SD1,
                *_RUN,
            ),
        )
    ],
    "lora_bf16": [
        _train(
            "experiment=lora_subject",
            "hardware.precision=bf16-mixed",
            "evaluation=none",
        )
    ],
    "controlnet_bf16": [
        _train(
            "experiment=controlnet_scribble",
            "hardware.precision=bf16-mixed",
            "evaluation=none",
            "data.images=16",
            "data.batch_size=4",
        )
    ],
}
# Remove the common precision from cases that set their own.
for _name in ("lora_bf16", "controlnet_bf16"):
    _only = CASES[_name][0]
    CASES[_name] = [
        Command(_only.name, _only.folder, tuple(a for a in _only.arguments if a != "hardware.precision=32-true"))
    ]

PLANS: dict[str, tuple[str, ...]] = {
    "sd15": ("methods=all", "backbone=sd15", "fits=12"),
    "sd15_lora": ("method=lora", "backbone=sd15", "callbacks=ema", "trainer.accumulate_grad_batches=2"),
    "sdxl": ("methods=all", "backbone=sdxl", "fits=24", "data.batch_size=4"),
    "sdxl_textual_inversion": ("method=textual_inversion", "backbone=sdxl", "hardware=ddp_bf16"),
}
