"""The backends of group_read and group_write; of Triton a file a step."""
