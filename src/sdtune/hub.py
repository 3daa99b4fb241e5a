"""Repository names on the Hugging Face Hub."""


def is_hub_id(name: str) -> bool:
    """Whether ``name`` has the form USER/NAME, and so can be one where no local file or folder has it."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))
