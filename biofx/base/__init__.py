"""What every room uses: errors, options, random numbers, comparisons, copies, and runs without side effects."""
