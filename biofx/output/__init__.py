"""What comes out of a transformed model: plain models, files, tables, graphs."""
