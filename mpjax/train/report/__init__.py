"""What a run tells: metrics, progress, tensors, its manifest, and when it is to stop."""
