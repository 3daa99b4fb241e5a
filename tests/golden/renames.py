"""What has been renamed since the base commit of the golden runs: old name -> today's."""

RENAMED_KEYS: dict[str, str] = {
    "data.class_pictures": "data.class_images",
    "data.pictures": "data.images",
    "data.validation_pictures": "data.validation_images",
    "evaluation.pictures": "evaluation.images",
    "evaluation.class_pictures": "evaluation.class_images",
    "hydra.launcher.max_adapters": "hydra.launcher.max_concurrent_runs",
}
"""Settings, as a command line names them."""

RENAMED_TARGETS: dict[str, str] = {}
"""``_target_``s of configs."""

RENAMED_FILES: dict[str, str] = {}
"""Parts of the paths of what a command leaves."""
