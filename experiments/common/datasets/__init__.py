"""Where the experiments' data and checkpoints come from."""
