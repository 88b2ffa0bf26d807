"""Does PEFT answer with the exported folder as base + adapter does?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..base import BaseModel
from ..errors import ArtifactError
from ..exact import exact_products
from ..inject import remove
from ..merging.verify import TOLERANCE, logits_of, relative_difference, rows_of


@exact_products()
def verify_peft(folder: Path, adapter: Adapter, base: BaseModel) -> dict[str, Any]:
    """Compare PEFT's logits with the adapter's, on one base loaded in fp32, on the rows that a merge is compared on.

    Returns:
        `relative_difference` (to the largest logit), the `tolerance` it was held to, and the `rows` of the task it was
        measured on (0: built-in text).

    Raises:
        ArtifactError: the relative difference exceeds the tolerance.
    """
    from peft import PeftModel

    network = base.load(adapter.task_type, dtype="float32", num_labels=adapter.num_labels)
    batch, rows = rows_of(base, adapter)
    inputs = {name: tensor.to(network.device) for name, tensor in batch.items()}
    adapter.inject(network)
    expected = logits_of(network, inputs)
    remove(network)
    with_peft: Any = PeftModel.from_pretrained(network, str(folder)).eval()
    difference, tolerance = relative_difference(expected, logits_of(with_peft, inputs)), TOLERANCE["F32"]
    if not difference <= tolerance:  # nor NaN
        what = f"PEFT's logits differ by {difference:.1e} of the largest, more than {tolerance:.0e}"
        raise ArtifactError(what, where=folder, fix="Nothing was written; use `lorasb merge`")
    return {"relative_difference": difference, "tolerance": tolerance, "rows": rows}
