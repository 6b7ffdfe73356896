"""Widening: a network in which some units are doubled, so that it computes what it did before."""
