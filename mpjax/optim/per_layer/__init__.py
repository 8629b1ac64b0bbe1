"""Optimizers that read shapes see layers, though our trees stack them in one array."""
