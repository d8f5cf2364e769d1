"""Configurations: a file each, with one `get_config()`."""
