"""The backends of group_read and group_write, one a file."""
