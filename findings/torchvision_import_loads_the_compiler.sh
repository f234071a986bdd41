#!/usr/bin/env bash
# `import torchvision` loads PyTorch's compiler, which nothing has asked for.
#
# Versions:  torchvision 0.29.1, torch 2.14.1, Python 3.9 or newer.
# Expected:  after `import torchvision` torch._dynamo is loaded as little as after `import torch`:
#            torchvision.ops.roi_align wraps its one compiled function in lazy_compile, whose
#            docstring says that it avoids importing dynamo eagerly.
# Seen:      the same file imports from torch._dynamo.utils at its top, and torchvision's __init__
#            leads there by models and ops. About 1,000 modules and 150 MB
#            more, in about as long again as `import torch` took; for a ResNet18 too.
# Matters:   every start of a program that only wants a network, a file's weights or a transform:
#            it was 1.2 s of the 5 s that a script's --help took, as was 1.3 s for torch itself.
# Source:    torchvision/ops/roi_align.py, line 7 against lazy_compile below it; the wrapper came
#            with pull request 8436 of pytorch/vision.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy

"$folder/venv/bin/python" - <<'PYTHON'
import sys
import time


def state(start):
    """Return seconds since start, how many modules are loaded, and whether dynamo is one."""
    return round(time.perf_counter() - start, 2), len(sys.modules), "torch._dynamo" in sys.modules


start = time.perf_counter()
import torch

alone, start = state(start), time.perf_counter()
import torchvision

both = state(start)
print("torch", torch.__version__, "torchvision", torchvision.__version__)
for name, (seconds, modules, compiler) in {"torch": alone, "then torchvision": both}.items():
    print(f"import {name:<17} {seconds:5.2f} s  {modules:5} modules  torch._dynamo: {compiler}")
from torchvision.ops import roi_align  # the function

wrapper = sys.modules["torchvision.ops.roi_align"].lazy_compile
print("lazy_compile:", " ".join(wrapper.__doc__.split()))
assert {"avoids", "dynamo."} <= {*wrapper.__doc__.split()}, "its promise has changed"
assert not alone[2] and both[2], "it has changed: torchvision loads no compiler any more"
assert both[1] - alone[1] > 500, "it has changed: few modules more"
print("As described: the compiler is loaded by torchvision, eagerly.")
PYTHON
