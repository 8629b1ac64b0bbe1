"""The base of all models: configurations, modules, layers, storage and checks."""
