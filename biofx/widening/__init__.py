"""Widening: doubles the units of a network without a change of its output.

Every unit of a population is replaced by two adjacent copies, its twins, which have its incoming weights and its bias.
All parameters and sizes that run over these units become twice as long, and each weight that reads them gets one
presynaptic position for each twin. Which nodes of the graph allow this is tested on random numbers, node by node; a
population that reaches a node that does not keeps its size, and the search starts again without it.
"""
