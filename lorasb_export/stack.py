"""Several adapters of one basis on one model at once: a stack of R, and for every row of a batch the one it uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .adapter import Adapter
from .belonging import check_same_basis
from .errors import ArtifactError, SettingsError, some
from .layers.inject import inject, remove
from .layers.layer import Route


class _RowOf(Mapping[str, torch.Tensor]):
    """One adapter's R: module name → (r, r), a view of what is on the model now, also after `model.to`."""

    def __init__(self, live: Mapping[str, torch.nn.Parameter], k: int) -> None:
        self.live, self._k = live, k

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.live[name].detach()[self._k]

    def __iter__(self) -> Iterator[str]:
        return iter(self.live)

    def __len__(self) -> int:
        return len(self.live)


class Stack:
    """The adapters attached to a model, and the switch between them.

    Attributes:
        names: in the order of the stack.
        values: (k, modules, r, r), the R of every adapter; the layers' parameters are views of it.
    """

    def __init__(self, model: torch.nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Attach `adapters`, all of one basis and one scaling; any adapter on `model` is taken off first.

        While attached, each adapter's `R` are views of the layers': training those trains them, `save` works as ever,
        after a move of the model too. For another set of adapters make another Stack. Call `detach` first; otherwise
        adapters missing from the new Stack keep the model in memory.

        Raises:
            ArtifactError: no adapter, different bases or scalings, a trained head, or a model they do not fit.
            BaseModelError: as for `Adapter.attach`.
            SettingsError: the layers lie on several devices.
        """
        first = next(iter(adapters.values()), None)
        if first is None:
            raise ArtifactError("no adapter to attach", fix="Give at least one")
        basis = first.load_basis()
        for name, adapter in adapters.items():
            check_same_basis(adapter, basis)
            if adapter.scaling != first.scaling:
                what = f"adapter {name} has scaling {adapter.scaling}, another {first.scaling}"
                raise ArtifactError(what, fix="Attach those of one scaling")
            if adapter.head:
                raise ArtifactError(
                    f"adapter {name} has a classification head of its own", fix="Attach classifiers one at a time"
                )
        self.names = list(adapters)
        self._model = model
        self._route = Route()
        # On the CPU, where that of a loaded adapter is: one that was attached lies where its model did.
        start = {name: torch.stack([a.R[name].cpu() for a in adapters.values()]) for name in basis.modules}
        self._live = inject(model, basis.modules, start, first.scaling, self._route)
        if len({layer.device for layer in self.layers}) > 1:  # which adapter a row takes is told on one of them only
            remove(model)
            fix = "Load it onto one, or attach one adapter"
            raise SettingsError("the layers of the adapters lie on several devices", fix=fix)
        self._adapters = list(adapters.values())
        for k, adapter in enumerate(self._adapters):
            adapter.R = _RowOf(self._live, k)
        self.values = self._stacked()
        self._alias()
        self.use(self.names[0])

    @property
    def layers(self) -> list[torch.nn.Parameter]:
        """The (k, r, r) of every module that are on the model now."""
        return list(self._live.values())

    def gradients(self) -> torch.Tensor:
        """Of each adapter's R, in the order of `values`: (k, modules, r, r); zero of a layer that the loss missed."""
        found = (torch.zeros_like(layer) if layer.grad is None else layer.grad for layer in self.layers)
        return torch.stack(list(found), dim=1)

    def _attached(self) -> bool:
        """Whether these layers still lie on the model, where another adapter may have been put in their place."""
        name = next(iter(self._live))
        return self._model.get_submodule(name) is self._live.module(name)

    def _stacked(self) -> torch.Tensor:
        return torch.stack([layer.detach() for layer in self.layers], dim=1)  # one adapter's R lie together

    def bind(self) -> None:
        """Make the layers' parameters views of `values`: again, where `model.to` copied them.

        `values` become what the layers have, on the device of a model that has moved; an optimizer is to be made after
        that.
        """
        first = self.layers[0]
        if first.device != self.values.device:
            self.values = self._stacked()
        elif first.data_ptr() != self.values[:, 0].data_ptr():
            self.values.copy_(self._stacked())
        self._alias()

    def _alias(self) -> None:
        for place, parameter in enumerate(self.layers):
            parameter.data = self.values[:, place]

    def use(self, choice: str | Sequence[str | None] | None) -> None:
        """Choose for the next forward passes: one adapter for every row, or one for each row; None is the base.

        With gradient checkpointing, call `backward` before the next `use`: passes are recomputed with the current
        choice. Non-reentrant checkpointing raises an error; reentrant silently uses the wrong adapter.

        Raises:
            SettingsError: no adapter of that name is attached, none is named, or another was put on the model since.
        """
        if not self._attached():
            raise SettingsError("these adapters are no longer on the model", fix="Make another Stack of them")
        chosen = [choice] if choice is None or isinstance(choice, str) else choice
        if not chosen:
            raise SettingsError("no adapter was chosen", fix="Name one for every row, or one for each row")
        for name in chosen:
            if name is not None and name not in self.names:
                raise SettingsError(f"no adapter {name!r} is attached", fix=f"Choose from {some(self.names)}")
        indices = [-1 if name is None else self.names.index(name) for name in chosen]
        self.use_rows(torch.tensor(indices, device=self.layers[0].device))

    def use_rows(self, rows: torch.Tensor) -> None:
        """As `use`, by index into `names`: (n,) long, or (1,) for every row; -1 is the base."""
        self._route.rows = rows

    def detach(self) -> None:
        """Take the adapters off; the base is left as it was, bit for bit, and frozen. They keep what they learnt.

        Others that were put on the model since stay there.
        """
        if self._attached():
            remove(self._model)
        for adapter in self._adapters:
            if isinstance(adapter.R, _RowOf) and adapter.R.live is self._live:
                adapter.R = dict(adapter.R)
