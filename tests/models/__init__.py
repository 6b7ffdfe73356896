"""Architectures on which the tests run: small, and each the smallest that shows something."""
