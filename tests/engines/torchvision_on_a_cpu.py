"""Lies in an engine's environment as `sitecustomize.py`: PyPI's torchvision is built for CUDA and does not load its
operators beside torch for CPUs, and since torch 2.13 it cannot be imported then. Its operators are for images; this
declares the two without which the import fails."""

import sys
from importlib.abc import MetaPathFinder


class _DeclareOperators(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            from torch.library import Library

            self.library = Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_found = _DeclareOperators()
sys.meta_path.insert(0, _found)
