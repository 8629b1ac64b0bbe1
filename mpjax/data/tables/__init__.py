"""Tables of users: cells, rows and their types."""
