"""What XLA's GPU compiler makes of our steps, read without a GPU."""
