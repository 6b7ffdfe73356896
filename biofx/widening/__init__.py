"""Widening: a network in which some units are doubled, so that it computes what it did before.

Whether the rest of the network goes along is tried, not derived (`doubling.py`). If some units cannot be doubled, the
trial starts again without them (`search.py`).
"""
