"""Triton kernels and their launchers: the whole coupling flow in one launch, and the elementwise affine coupling.

Functions on contiguous tensors, without autograd, modules or argument checks: those are `glf_fast.ops`. Importing this
package imports triton, so `glf_fast.ops` does it when the first kernel runs. README.md explains the design.
"""
