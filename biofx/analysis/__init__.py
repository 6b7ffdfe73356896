"""Analysis: what is understood of a model from one recorded run."""
