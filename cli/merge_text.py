"""What `lorasb merge` wrote, or would write, as lines for people."""

from __future__ import annotations

from typing import Any

from lorasb_export.choices import NF4

from .words import human_bytes

_ROUNDED = ", onto the base in four bits"


def combined_text(result: dict[str, Any]) -> str:
    """Of --as-adapter."""
    summed = " + ".join(f"{one['weight']:g}·{one['name']}" for one in result["adapters"])
    return f"Wrote {result['out']}: {summed}, {human_bytes(result['bytes'])}"


def _what(result: dict[str, Any]) -> str:
    return f"{result['modules']} modules, {human_bytes(result['bytes'])} in {result['shards']} file(s)"


def plan_text(result: dict[str, Any]) -> str:
    kept = result["expected_retained"]
    return "\n".join(
        [
            f"Would merge {_what(result)} into {result['out']}",
            f"  tensors      {result['modules']} of {result['tensors']} change",
            f"  dtype        {', '.join(result['stored'])}{_ROUNDED * (result['base_dtype'] == NF4)}",
            f"  peak memory  about {human_bytes(result['peak_memory_bytes'])}",
            f"  free disk    {human_bytes(result['free_bytes'])}",
            f"  kept of it   about {kept['cosine']:.3f} (cosine), relative error {kept['relative_error']:.3f}",
        ]
    )


def merged_text(result: dict[str, Any]) -> str:
    kept = result["retained"]
    text = f"Merged {_what(result)} into {result['out']} in {result['seconds']:.1f} s"
    if result["shards_reused"]:
        text += f" ({result['shards_reused']} file(s) were finished before)"
    text += f"\nOf the update {kept['cosine']:.4f} is kept (cosine), relative error {kept['relative_error']:.4f}"
    if "verify" in result:
        found = result["verify"]
        on = f"{found['rows']} rows of the task" if found["rows"] else "built-in text"
        text += (
            f"\nVerified on {on}: the logits differ by at most {found['relative_difference']:.2g} of the largest one, "
        )
        text += f"and rounding to {' and '.join(result['stored'])} explains up to {found['tolerance']:.2g}"
    return text
