"""Does PEFT answer with the exported folder as base + adapter does?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter
from ..base.device import where_there_is_room
from ..base.model import BaseModel
from ..evaluation.logits import TOLERANCE, Inputs, logits_of, require_close, rows_of
from ..layers.exact import exact_products
from ..layers.head import head_kept
from ..layers.inject import remove

if TYPE_CHECKING:
    import torch


@exact_products()
def verify_peft(folder: Path, adapter: Adapter, base: BaseModel) -> dict[str, Any]:
    """Compare PEFT's logits with the adapter's, on one base loaded in fp32, on the rows that a merge is compared on.

    Returns:
        as `compare_logits` of a merge, but for `streamed`.

    Raises:
        ArtifactError: the relative difference exceeds the tolerance.
    """
    batch, rows = rows_of(base, adapter)
    expected, found = where_there_is_room(
        lambda device: _logits(device, folder, adapter, base, batch), "compare logits"
    )
    fix = "Nothing was written; use `lorasb merge`"
    return {**require_close(expected, found, TOLERANCE["F32"], "PEFT's logits", folder, fix), "rows": rows}


def _logits(
    device: torch.device, folder: Path, adapter: Adapter, base: BaseModel, batch: Inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapter's, and PEFT's."""
    from peft import PeftModel

    network = base.load(adapter.task_type, dtype="float32", num_labels=adapter.num_labels, device=device)
    inputs = {name: tensor.to(network.device) for name, tensor in batch.items()}
    with head_kept(network, adapter.head):  # PEFT has to bring the trained one
        adapter.inject(network)
        expected = logits_of(network, inputs)
        remove(network)
    with_peft: Any = PeftModel.from_pretrained(network, str(folder), torch_device=str(device)).eval()
    return expected, logits_of(with_peft, inputs)
