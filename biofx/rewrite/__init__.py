"""Rewriting: the base class of passes, their editors, the pipeline that runs them, and verification."""
