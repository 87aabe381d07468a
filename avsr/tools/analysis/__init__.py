"""What a run's decoder does with its tokens: sinks, massive activations, alignment with BOS."""
