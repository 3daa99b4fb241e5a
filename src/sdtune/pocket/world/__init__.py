"""The image world that pocket was trained on."""
