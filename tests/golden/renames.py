"""Names that changed since the base commit of the golden runs: old name -> current name."""

RENAMED_KEYS: dict[str, str] = {
    "data.class_pictures": "data.class_images",
    "data.pictures": "data.images",
    "data.validation_pictures": "data.validation_images",
    "evaluation.pictures": "evaluation.images",
    "evaluation.class_pictures": "evaluation.class_images",
    "hydra.launcher.max_adapters": "hydra.launcher.max_concurrent_runs",
    "hydra.sweeper.at_once": "hydra.sweeper.n_jobs",
}
"""Config keys on the command line."""

RENAMED_TARGETS: dict[str, str] = {
    "sdtune.data.control.Paired": "sdtune.data.control.paired.Paired",
    "sdtune.data.edges.Canny": "sdtune.data.control.edges.Canny",
    "sdtune.data.edges.Scribble": "sdtune.data.control.edges.Scribble",
    "sdtune.evaluation.ClipFigures": "sdtune.evaluation.ClipMetrics",
    "sdtune.estimated.Estimated": "sdtune.data.control.estimated.Estimated",
    "sdtune.pocket.control.PocketControl": "sdtune.pocket.world.control.PocketControl",
    "sdtune.pocket.control_evaluation.ControlFigures": "sdtune.pocket.evaluation.control.ControlMetrics",
    "sdtune.pocket.data.Subject": "sdtune.pocket.world.data.Subject",
    "sdtune.pocket.data.World": "sdtune.pocket.world.data.World",
    "sdtune.pocket.evaluation.SubjectFigures": "sdtune.pocket.evaluation.subject.SubjectMetrics",
    "sdtune.pocket.style.Style": "sdtune.pocket.world.style.Style",
    "sdtune.pocket.style.StyleFigures": "sdtune.pocket.evaluation.style.StyleMetrics",
}
"""Values of ``_target_`` in configs."""

RENAMED_FILES: dict[str, str] = {"base_pictures.png": "base_images.png", "trained_pictures.png": "trained_images.png"}
"""Parts of the paths of output files."""
