"""Kernels of the feed-forward family."""
