"""Output: plain models and files made from a transformed model."""
