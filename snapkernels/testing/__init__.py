"""Tools that judge and time kernels, shipped so that users can check their own machine."""
