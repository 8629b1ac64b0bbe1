"""A student that learns what a teacher answers."""
