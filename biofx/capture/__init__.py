"""Capture: from a module to a checked and guarded graph in which every weight is a node of its own.

The front ends `"symbolic"` and `"module"` are in `symbolic.py`, `"export"` is in `exported/`. Each makes a
`CapturedModule`. `equivalence.py` compares its graph with the model's Python once, `guards.py` checks at each call
what the graph does not know.
"""
