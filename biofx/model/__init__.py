"""The model: what a synaptic weight is."""
