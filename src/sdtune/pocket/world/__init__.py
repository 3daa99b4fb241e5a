"""Synthetic images, captions, control maps and datasets that pocket was trained on."""
