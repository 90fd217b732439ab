"""Weight disentanglement: its error, task addition and negation, where linearity sits."""
