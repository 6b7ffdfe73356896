"""Looking: tables and pictures of a transformed model."""
