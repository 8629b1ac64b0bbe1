"""What `benchmarks/device.py` measures on an accelerator, and the page that it writes."""
