"""monitor: the same function, with statistics of its tensors beside its outputs."""
