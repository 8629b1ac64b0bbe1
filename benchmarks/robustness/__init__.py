"""Runs that are killed, started twice, damaged; and mistakes that the tests must notice."""
