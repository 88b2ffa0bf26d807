"""What `lorasb export` wrote, and what the comparison with torch found, as lines for people."""

from __future__ import annotations

from typing import Any

from .words import human_bytes


def export_lines(done: str, result: dict[str, Any]) -> list[str]:
    return [f"{done} ({human_bytes(result['bytes'])})", *_comparisons(result.get("verify", {}))]


def _comparisons(verify: dict[str, Any]) -> list[str]:
    """What the comparison with torch found, a line for each adapter."""
    if "relative_difference" in verify:
        on = f"{verify['rows']} rows of its task" if verify["rows"] else "built-in text"
        return [
            f"PEFT's logits differ from the adapter's by {verify['relative_difference']:.1g} of the largest, on {on}"
        ]
    results = {"": verify} if "prompts" in verify else verify
    lines = []
    for name, found in results.items():
        line = f"{name + ': ' if name else ''}"
        if "equal_prompts" in found:
            line += f"{found['equal_prompts']} of {found['prompts']} answers equal torch's"
        else:
            line += f"numbers differ from torch's by {found['gap']:.1g} at most"
        if "metric" in found:
            line += (
                f"; {found['metric']} on {found['rows']} held-out rows {found['onnx']:.1%}, torch {found['torch']:.1%}"
            )
        if found.get("rows_left_out"):
            reason = "they have no answer, or do not fit into the model's context"
            line += f"; {found['rows_left_out']} held-out rows left out: {reason}"
        lines.append(line)
    return lines
