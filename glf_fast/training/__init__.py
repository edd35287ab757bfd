"""Training: everything that a run is made of. No model is known here by its name."""
