"""Makes torchvision importable beside a CPU build of torch; import it before what imports torchvision.

PyPI's torchvision is built for CUDA: its operators do not load, and importing it fails for want of two of them. fluke wants its
datasets and ResNets, which need none.
"""

import sys

import torch

_operators = torch.library.Library("torchvision", "FRAGMENT")
try:
    __import__("torchvision")
except RuntimeError:
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
