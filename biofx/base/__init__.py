"""Base: errors, options, random numbers, comparisons, copies, tables, and runs without side effects."""
