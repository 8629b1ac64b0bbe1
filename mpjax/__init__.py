"""Mixed- and low-precision training of Transformers on JAX."""
