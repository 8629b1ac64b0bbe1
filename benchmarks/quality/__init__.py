"""What low precision costs trained models, in losses and accuracies."""
