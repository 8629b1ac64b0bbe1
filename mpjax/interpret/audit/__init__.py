"""audit: what a function really runs in which dtype, and where float32 leaks in."""
