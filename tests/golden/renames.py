"""Names that changed since the base commit of the golden runs: old name -> current name."""

RENAMED_KEYS: dict[str, str] = {}
"""Config keys on the command line."""

RENAMED_TARGETS: dict[str, str] = {}
"""Values of ``_target_`` in configs."""

RENAMED_WORDS: dict[str, str] = {}
"""Words in the lists of configs."""

RENAMED_BLOCKS: dict[str, str] = {}
"""Beginnings of module paths in ``method.blocks``."""

RENAMED_COLUMNS: dict[str, str] = {}
"""Columns of ``metrics.csv``."""

RENAMED_FILES: dict[str, str] = {}
"""Parts of the paths of output files."""
