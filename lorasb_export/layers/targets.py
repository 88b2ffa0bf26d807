"""Which modules of a network a basis is made for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..base.products import is_linear, shape_of
from ..base.structure import body_of
from ..errors import BaseModelError, SettingsError
from ..settings import ALL_LINEAR, MLP_OUTPUT
from .inject import refuse_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHERE_TARGETS = "set targets in [basis] of lorasb.toml, or --targets of calibrate"
_OF_A_REGEX = frozenset(r"\^$*+?()[]{}|")  # none of them is in a module name; the dot, which is, decides nothing


def linear_layers(network: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Linear and Conv1D inside the body, by full name; never a head. Raises BaseModelError where there is none."""
    body = f"{body_of(network)}."
    found = {name: module for name, module in network.named_modules() if name.startswith(body) and is_linear(module)}
    if not found:
        what = f"there is no linear layer in {type(network).__name__}.{body[:-1]}"
        raise BaseModelError(what, fix="Give the whole model, not its body alone")
    return found


def find_targets(network: PreTrainedModel, targets: str) -> dict[str, torch.nn.Module]:
    r"""The modules `targets` selects, of `linear_layers`, by full name.

    Args:
        targets: `all-linear`; `mlp-output`; comma-separated endings of module names (`q_proj,v_proj`); or, told by any
            of ``\^$*+?()[]{}|`` in it, one regular expression that must match a whole name, as PEFT takes it.

    Raises:
        SettingsError: an ending or the expression matches nothing, or the expression is not valid.
        BaseModelError: a selected module shares its weight with another module, or the network carries PEFT layers.
    """
    refuse_peft(network)
    linear = linear_layers(network)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    known = f"Take {ALL_LINEAR}, or endings of module names: {leaves}"
    if _OF_A_REGEX & set(targets):
        try:
            expression = re.compile(targets)
        except re.error as error:
            what = f"targets {targets!r} is not a regular expression: {error}"
            raise SettingsError(what, fix=known) from None
        chosen = {name: module for name, module in linear.items() if expression.fullmatch(name)}
    elif targets.strip(" ,") == ALL_LINEAR:
        chosen = linear
    elif targets.strip(" ,") == MLP_OUTPUT:
        chosen = _mlp_outputs(linear, network.config.get_text_config().hidden_size)
    else:
        endings = [f".{ending.strip()}" for ending in targets.split(",") if ending.strip()]
        for ending in endings:
            if not any(f".{name}".endswith(ending) for name in linear):
                raise SettingsError(f"target {ending[1:]!r} matches no module", fix=known)
        chosen = {name: m for name, m in linear.items() if f".{name}".endswith(tuple(endings))}
    if not chosen:
        raise SettingsError(f"targets {targets!r} matches no module", fix=known)
    _refuse_shared(network, chosen)
    return chosen


def _mlp_outputs(linear: Mapping[str, torch.nn.Module], width: int) -> dict[str, torch.nn.Module]:
    """Those that bring the wide middle of an MLP back to the width of the network.

    They are told by their shape, since every family has a name of its own for them; attention's output may have that
    shape too, where the heads together are wider than the network, and is told by its module's name.
    """
    found = {}
    for name, module in linear.items():
        rows, columns = shape_of(module)
        if rows == width < columns and "att" not in name:
            found[name] = module
    return found


def _refuse_shared(network: PreTrainedModel, targets: Mapping[str, torch.nn.Module]) -> None:
    """A shared weight's gradient is the sum over all its uses, while an adapter would change only one of them."""
    users: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for module in targets.values():
        sharing = users[id(module.weight)]
        if len(sharing) > 1:
            raise BaseModelError(
                f"{sharing[0]} and {sharing[1]} share one weight: there is no gradient of one alone",
                fix=f"Leave both out: {WHERE_TARGETS}",
            )
