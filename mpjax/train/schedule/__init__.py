"""A Precision that changes while a run goes on."""
