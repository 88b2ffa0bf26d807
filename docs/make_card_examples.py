"""Write docs/examples/: the cards of a basis, an adapter and a merged model, as `lorasb push` publishes them.

    make examples      # some minutes: it calibrates, fits, evaluates, merges and pushes

The Hub is the loopback server of the tests; the base is the small model of the quickstart under its own name there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from integration.hub_client import Hub, serve
from lorasb_export.base.model import BaseModel
from lorasb_export.quickstart.model import HUB_ID, small_model
from lorasb_export.quickstart.tasks import write_tasks

OUT = Path(__file__).parent / "examples"
CARD = b"---\nlicense: apache-2.0\n---\nSmolLM2.\n"
PUSHED = {"basis": "me/basis-lorasb", "adapter": "me/dates-lorasb", "merged": "me/dates-merged"}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for hub in serve(Path(scratch), BaseModel.resolve(small_model()).folder):
            publish_base(hub)
            hub.lorasb(
                "init", "--model", HUB_ID, *(f"--task={name}=data/{name}" for name in write_tasks(hub.root / "data"))
            )
            hub.lorasb("calibrate", "--samples", 16)
            fitting = "--epochs 1 --batch-size 4 --evaluate-every 10".split()
            hub.lorasb("fit", "dates", *fitting)
            hub.lorasb("evaluate", "dates")
            hub.lorasb("push", "--repo", "me/{name}-lorasb", "--public")
            hub.lorasb("merge", "dates", "--out", "model", "--dtype", "bfloat16")
            hub.lorasb("push", "model", "--repo", PUSHED["merged"], "--public")
            for kind, repo in PUSHED.items():
                (OUT / f"{kind}.md").write_bytes(hub.content(repo, "README.md"))
            (OUT / "training.png").write_bytes(hub.content(PUSHED["adapter"], "training.png"))


def publish_base(hub: Hub) -> None:
    hub.put(HUB_ID, hub.base)
    hub.repos[HUB_ID].commit("main", {**hub.files(HUB_ID), "README.md": hub.store.regular(CARD)}, "its card")


if __name__ == "__main__":
    main()
