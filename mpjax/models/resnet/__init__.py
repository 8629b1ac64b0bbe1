"""The residual network for images."""
