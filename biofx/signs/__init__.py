"""Signs: weights and scales that keep a sign, and initial values that suit them."""
