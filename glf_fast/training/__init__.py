"""Training runs: configuration, trainer, checkpoints, pictures, scores and report. No module here names a model."""
