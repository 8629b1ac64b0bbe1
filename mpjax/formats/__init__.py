"""What a number is: the table of number formats."""

from mpjax.formats.table import Format

__all__ = ["Format"]
