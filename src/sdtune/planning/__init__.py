"""What a training will cost, counted on the meta device before anything is loaded."""
