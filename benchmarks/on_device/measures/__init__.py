"""The functions that the cells call, by module."""
