"""Layers on images (C, H, W): convolutional conditioners stay what they are, all else becomes one product and one kernel."""
