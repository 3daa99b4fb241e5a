"""Load trained LoRAs, embeddings and ControlNets onto a backbone for sampling, and unload them."""
