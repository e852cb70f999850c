"""Holds the frozen base model, loaded once and wrapped so that adapters can come and go.

Every target module is wrapped in an `AdapterLayer` once. What lies frozen beside the adapters and
the adapters of one client, or of several that train in one pass, are loaded into the layers; the
base weights are never written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedlora.lowrank import Adapter, Deltas, LowRank
from fedlora.model.client_rows import ClientRows
from fedlora.model.device import device_of
from fedlora.model.fingerprint import weights_fingerprint
from fedlora.model.full_modules import FullModule, make_float32
from fedlora.model.layers import replace_module
from fedlora.model.lora_layer import AdapterLayer, ClientAdapter, ClientTerm
from fedlora.model.quantised_linear import QuantisedLinear
from fedlora.model.shared_memory import unmap_pages
from fedlora.model.targets import Targets


@dataclass(frozen=True)
class BaseModel:
    """A frozen base with adapter layers in place.

    Args:
        model: the transformers model; only adapter factors require gradients.
        tokenizer: its tokenizer, with a padding token.
        targets: where the adapters go.
        layers: target module name -> its layer.
        fingerprint: of the base's original weights, to recognise another base on resume.
        full_params: parameters trained whole (a classifier's head), by full name, in float32.
        heads: the modules that hold them, by full name.
        tied: one of these parameters is also used in other modules, so clients cannot have copies.
    """

    model: Any
    tokenizer: Any
    targets: Targets
    layers: Mapping[str, AdapterLayer]
    fingerprint: str
    full_params: Mapping[str, nn.Parameter] = field(default_factory=dict)
    heads: Mapping[str, FullModule] = field(default_factory=dict)
    tied: bool = False

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return device_of(self.model)

    @property
    def num_parameters(self) -> int:
        """Numbers in the model, those of quantised layers and of adapters among them."""
        quantised = [m for m in self.model.modules() if isinstance(m, QuantisedLinear)]
        packed = sum(layer.out_features * layer.in_features for layer in quantised)
        return packed + sum(int(p.numel()) for p in self.model.parameters())

    def load(
        self,
        frozen: Sequence[Deltas],
        adapter: Adapter | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        full_params: Mapping[str, Tensor] | None = None,
        trains: str = "AB",
    ) -> None:
        """Set all layers: `W_0 + sum frozen`, and what one client trains on top.

        Args:
            frozen: what lies beside the base and is not trained.
            adapter: what is trained; a module it does not name has nothing to train.
            scale: of the adapter.
            dropout: before the adapter.
            full_params: values of the parameters trained whole; None leaves them as they are.
            trains: the factors that are trained, "AB", "A" or "B"; the others keep their values.
        """
        if adapter is None:
            self.load_clients(frozen, [])
            self._set_full_params(full_params or {})
        else:
            own = ClientAdapter(adapter, {}, scale, dropout, trains, full_params or {})
            self.load_clients(frozen, [own])

    def load_clients(
        self, frozen: Sequence[Deltas], client_adapters: Sequence[ClientAdapter]
    ) -> None:
        """Set all layers for clients that train in one pass.

        Args:
            frozen: what lies beside the base for all of them.
            client_adapters: what each of them brings; a single one trains the model's own
                parameters where modules are trained whole, several train copies.
        """
        for name, layer in self.layers.items():
            layer.freeze([deltas[name] for deltas in frozen if name in deltas])
            layer.load_clients(name, client_adapters)
        for name, head in self.heads.items():
            head.load_copies(
                name, [x.full_params for x in client_adapters] if len(client_adapters) > 1 else ()
            )
        if len(client_adapters) == 1:
            self._set_full_params(client_adapters[0].full_params)

    def share_merged(self) -> None:
        """Let processes forked from now on use weights that this one merges for all of them."""
        for layer in self.layers.values():
            layer.share()

    def merge_for_others(self, frozen: Sequence[Deltas]) -> None:
        """Merge what lies frozen beside the base, for other processes to `adopt_merged`.

        What is loaded here is taken out, so that no second copy of the weights is kept.
        """
        self.load_clients([], [])
        for name, layer in self.layers.items():
            layer.merge_for_others([deltas[name] for deltas in frozen if name in deltas])
        self._unmap_merged()

    @property
    def merged_elsewhere(self) -> frozenset[str]:
        """The modules whose merged weight comes from another process, without its parts."""
        return frozenset(name for name, x in self.layers.items() if x.place is not None)

    def adopt_merged(self, frozen: Sequence[Deltas]) -> None:
        """Set what lies frozen beside the base, which another process has merged.

        Args:
            frozen: as it was given to `merge_for_others`; loading these very objects with clients
                then merges nothing anew.
        """
        for name, layer in self.layers.items():
            layer.adopt([deltas[name] for deltas in frozen if name in deltas])
        self._unmap_merged()

    def _unmap_merged(self) -> None:
        """Give back the pages of weights that are used with something merged into them."""
        unmap_pages(layer.weight for layer in self.layers.values() if layer.place is not None)

    def _set_full_params(self, values: Mapping[str, Tensor]) -> None:
        """Set the model's own parameters of modules trained whole."""
        with torch.no_grad():
            for name, value in values.items():
                self.full_params[name].copy_(value)

    def terms_of(self, client: int) -> list[ClientTerm]:
        """The terms of the client in this slot of the pass, layer by layer."""
        return [cast(ClientTerm, layer.clients[client]) for layer in self.layers.values()]

    def parameters_of(self, client: int) -> list[tuple[str, nn.Parameter]]:
        """What the client in this slot trains, by name."""
        out = []
        for name, term in zip(self.layers, self.terms_of(client), strict=True):
            for factor in ("A", "B"):
                value = getattr(term, factor)
                if value is not None and value.requires_grad:
                    out.append((f"{name}.{factor}", value))
        return [*out, *self._full_params_of(client).items()]

    def _full_params_of(self, client: int) -> dict[str, nn.Parameter]:
        """The parameters trained whole of the client in this slot, by full name."""
        copies = {
            f"{name}.{end}": value
            for name, head in self.heads.items()
            if head.copies
            for end, value in head.copies[client].items()
        }
        return {**self.full_params, **copies}

    def read_adapter(self, client: int = 0) -> dict[str, LowRank]:
        """The adapter in a slot as it now is, scale folded, in float32, on the CPU.

        `B` is computed as its start plus the scaled change, so that an untrained adapter comes back
        bit for bit. Dividing by the scale and multiplying again would round, as if it had learnt.

        Raises:
            ValueError: no adapter is loaded.
        """
        out = {}
        for name, layer in self.layers.items():
            if len(layer.clients) and (x := cast(ClientTerm, layer.clients[client]).read()):
                out[name] = x
        if not out:
            raise ValueError("the model holds no adapter")
        return out

    def read_full_params(self, client: int = 0) -> dict[str, Tensor]:
        """The parameters trained whole in a slot as they now are. Copies, on the CPU."""
        return {
            n: value.detach().cpu().clone() for n, value in self._full_params_of(client).items()
        }


def attach(
    model: Any, tokenizer: Any, targets: Targets, fingerprint: str | None = None
) -> BaseModel:
    """Freeze a model, wrap its target modules, and make what is trained whole float32.

    The model is changed in place.

    Args:
        model: of transformers.
        tokenizer: its tokenizer.
        targets: where the adapters go, and what is trained whole.
        fingerprint: of the original weights; None: of those that the model has.
    """
    model.requires_grad_(False)
    full_params, heads, client_rows = {}, {}, ClientRows()
    for name in targets.modules_to_save:
        module = model.get_submodule(name)
        make_float32(module, keep_output="." not in name)
        for end, parameter in module.named_parameters(name):
            full_params[end] = parameter.requires_grad_(True)
        heads[name] = FullModule(module, client_rows)
    fingerprint = fingerprint or weights_fingerprint(model, skip=full_params)
    layers = {}
    for site, name in enumerate(targets.shapes):
        layers[name] = AdapterLayer(model.get_submodule(name), client_rows, site)
        replace_module(model, name, layers[name])
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied = any(uses.count(id(p)) > 1 for p in full_params.values())
    return BaseModel(model, tokenizer, targets, layers, fingerprint, full_params, heads, tied)
