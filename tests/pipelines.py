"""Pipelines that several test files use."""

from biofx import passes

NEUTRAL = [passes.FuzzyLearningRates(distribution="baseline")]

DIVERSE = [passes.SplitSynapses(3), passes.FuzzyLearningRates()]

EVERYTHING = [
    passes.SplitSynapses(2),
    passes.DalesPrinciple(excitatory=0.5, balance=False),
    passes.FuzzyLearningRates(distribution="activity"),
    passes.VolumeDependentLearningRates(),
    passes.Crystallize(),
    passes.Rejuvenate(),
    passes.SynapticScaling(on="weight"),
    passes.L1Regularization(1e-3),
]
