"""What every model is made of: modules that know their path, layers, storage, parameters."""
