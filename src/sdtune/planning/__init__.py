"""Memory and FLOP estimates of a training, counted on the meta device without loading weights."""
