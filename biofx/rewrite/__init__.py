"""Passes: what one is, what it edits a graph with, how several run after each other, and what is verified."""
