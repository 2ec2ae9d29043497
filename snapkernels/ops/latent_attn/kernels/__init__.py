"""Kernels of the latent attention family."""
