"""One run of a model's own Python, as dispatcher operators."""
