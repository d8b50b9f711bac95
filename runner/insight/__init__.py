"""Looking inside of what is trained: activations, gradients, norms, non-finite values, and every picture of it."""
