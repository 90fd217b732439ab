"""Fine-tuning for task arithmetic: which parameters train, linearised models, the loop."""
