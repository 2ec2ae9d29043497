"""The kernels of group_read and group_write, a file a step."""
