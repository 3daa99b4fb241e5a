"""Pretraining of pocket's VAE, tokenizer, CLIP and classifier, and assembly of its pipeline."""
