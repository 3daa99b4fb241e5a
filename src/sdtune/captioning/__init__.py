"""Captions, tags and masks for the images of a folder, made by models that the user chooses."""
