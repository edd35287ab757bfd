"""Cases of the elementwise coupling on a GPU: 40 instead of the 400 of all combinations."""

import itertools

import torch

from glf_fast.reference import LOG_SCALES

__all__ = ["COUPLINGS", "LAYOUTS", "PRECISIONS"]

# Vectors, odd images, and images of which a thread loads several numbers at once.
LAYOUTS = (
    ((300, 10), torch.contiguous_format),
    ((3, 6, 5, 7), torch.contiguous_format),
    ((3, 6, 5, 7), torch.channels_last),
    ((16, 12, 16, 16), torch.contiguous_format),
    ((16, 12, 16, 16), torch.channels_last),
)
PRECISIONS = (torch.float32, torch.bfloat16)  # of u and t

# Log-scale, add_first, inverse, layout, precision. The first three are the kernels' branches, and all of their combinations are
# here; layout and precision take turns, so that every pair of two values of these five occurs but for seven of a log-scale and
# a layout, which meet in no line of the kernels: one decides how numbers are loaded, the other what becomes of them.
COUPLINGS = [
    (*branch, LAYOUTS[i % 5], PRECISIONS[i // 3 % 2])
    for i, branch in enumerate(itertools.product(LOG_SCALES, (False, True), (False, True)))
]
