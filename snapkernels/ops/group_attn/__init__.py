"""Grouped cross-attention between latent tokens and patch (or conditioning) tokens."""
