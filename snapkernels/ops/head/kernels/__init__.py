"""The kernels of patchify and unpatchify, a file a backend."""
