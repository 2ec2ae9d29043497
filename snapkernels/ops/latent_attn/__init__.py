"""Self-attention over all latent tokens."""
