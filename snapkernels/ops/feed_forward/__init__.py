"""The feed-forward sublayer of patch and latent tokens."""
