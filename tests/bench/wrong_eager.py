"""A pytest plugin: in one case a bias of the flow in plain PyTorch is not what it should be."""

from functools import partial

import torch

from bench import flows
from bench.race import Provider


def _wrong(case, device):
    made = flows.MAKERS["eager"](case, device)
    if case.name == "grid-4-32-16":
        with torch.no_grad():
            made.module.mlp_biases[0][0, 0] += 0.5
    return made


flows.PROVIDERS["eager"] = Provider("eager", partial(flows.flow_job, "eager", _wrong))
