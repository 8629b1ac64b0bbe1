"""autocast, audit and trace_nonfinite on planted faults and on models of others."""
