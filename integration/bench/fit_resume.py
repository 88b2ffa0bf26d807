"""Does a training that was killed come to the same adapter?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from lorasb_export.quickstart.model import small_model
from lorasb_export.quickstart.tasks import write_tasks

KILLED = """
import os, signal, sys
from lorasb_export import fit
from lorasb_export.settings import CalibrationSettings, FitSettings
from lorasb_export.training.trainer import RTrainer
model, data, out, kill = sys.argv[1:]
step = RTrainer.training_step
def killing(self, *arguments):
    if kill == "kill" and self.state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *arguments)
RTrainer.training_step = killing
own = CalibrationSettings(rank=16, samples=4, targets="q_proj,v_proj")
settings = FitSettings(max_steps=5, checkpoint_every=2, batch_size=2, dtype="bfloat16", init="zero")
print(fit(model, own, data, out, settings, resume=kill == "resume").sha256)
"""


def resume_bit_equal() -> bool:
    """Killed by SIGKILL in step 4, resumed in another process: the same adapter as undisturbed?"""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = write_tasks(folder / "data")["dates"]

        def run(out: str, kill: str) -> str:
            command = [sys.executable, "-c", KILLED, small_model(), str(data), str(folder / out), kill]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()

        killed, resumed, undisturbed = run("a", "kill"), run("a", "resume"), run("b", "none")
        return not killed and bool(resumed) and resumed == undisturbed
