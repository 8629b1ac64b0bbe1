"""What is done with a trained model: generation, quantised weights, perplexity."""
