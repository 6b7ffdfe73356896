"""Recipes: pipelines that have a name."""

# The paper's: units grouped by two, uniform diversity with ν = 0.09, threshold turnover with dre = 14 at every step.
HOFMANN2025 = "group-units{size=2},fuzzy-learning-rates{nu=0.09},rejuvenate{dre=14.0,rule=threshold}"

# All rules that preserve the function, with options that were chosen on digits, so that every rule acts and the
# network still learns as well as a plain one (examples/plasticity.py, tests/passes/test_recipes.py).
CORTEX = (
    "split-synapses{synapses=4},fuzzy-learning-rates{distribution=lognormal},"
    "volume-dependent-learning-rates{base_lr=1.0,stability=1.0},crystallize{threshold=1e-3,dampening=0.995,floor=0.1},"
    "rejuvenate{dre=100.0,every=10},synaptic-scaling,l1-regularization{strength=1e-5}"
)
