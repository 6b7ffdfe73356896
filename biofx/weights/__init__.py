"""Weights: which parameters are synapses, how operators read them, and which axes run over which units."""
