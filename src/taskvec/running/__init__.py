"""A model in torch: loading, batches, likelihoods, answers."""
