"""Measurements with ground truth: what a picture of pocket's world shows is read, not guessed."""
