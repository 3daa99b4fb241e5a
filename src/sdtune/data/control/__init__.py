"""Control maps: read, computed from edges, or estimated by a model."""
