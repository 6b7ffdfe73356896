"""Output: plain models, files, tables and graphs made from a transformed model."""
