"""What the export of a network of real size costs, all checks on, and the audit of its checkpoint.

Question: can an engineer export a ResNet-50 on a laptop, and audit its checkpoint while somebody waits?
Quantity: seconds and the most resident memory of `evalmode export` as a whole process, on 16 images of 224 x 224;
seconds of the audit of its state_dict, after imports.
Limit: one forward pass of the same images in PyTorch on one thread, timed in turn: the checks cannot be cheaper than
the passes that they need. The bars are 90 s and 4 GB, and 3 s, on two cores.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import resnet50
from benchmarks.environment import environment

IMAGES = 16


def main() -> None:
    room = Path(tempfile.mkdtemp(prefix="export-large-"))
    try:
        report = measured(room)
    finally:
        shutil.rmtree(room)
    print(f"export {report['export_s']} s (bar 90), {report['export_mb']} MB (bar 4000)")
    print(f"audit of the checkpoint {report['audit_s']} s (bar 3); one pass of PyTorch {report['pass_s']} s")
    print(json.dumps({**report, **environment()}))


def measured(room: Path) -> dict[str, object]:
    network, images = resnet50.trained(), resnet50.images(IMAGES)
    torch.save(network.state_dict(), room / "resnet50.pt")
    np.savez(room / "images.npz", x=images.numpy())
    torch.set_num_threads(1)
    with torch.no_grad():
        started = time.perf_counter()
        network(images)
        pass_s = time.perf_counter() - started
    audit_s = float(subprocess.run([sys.executable, "-c", _AUDIT, str(room / "resnet50.pt")], check=True, text=True,
                                   capture_output=True).stdout)  # fmt: skip
    command = [
        str(Path(sys.executable).with_name("evalmode")), "export", "benchmarks.resnet50:build",
        "--weights", str(room / "resnet50.pt"), "--sample", str(room / "images.npz"),
        "--name", "resnet50", "--models", str(room / "models"),
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, check=True)
    export_s = time.perf_counter() - started
    return {
        "export_s": round(export_s, 1),
        "export_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000),
        "audit_s": round(audit_s, 2),
        "pass_s": round(pass_s, 2),
    }


_AUDIT = """
import sys, time
from pathlib import Path
from export.audit import audit_state
from export.loading import read_state
started = time.perf_counter()
audit_state(read_state(Path(sys.argv[1])).tensors)
print(time.perf_counter() - started)
"""

if __name__ == "__main__":
    main()
