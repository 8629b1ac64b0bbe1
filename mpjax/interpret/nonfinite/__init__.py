"""trace_nonfinite: the first operation of any function that made an infinity or a NaN."""
