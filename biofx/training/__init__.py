"""Training: what happens around `optimizer.step()`."""
