"""Recognises decoder layers of Llama's family and gives them a forward pass of their own.

A layer is taken only if its class is one of `KNOWN`, everything in it but adapters is frozen and in
float32, and nothing asks for what `decoder_pass` does not do: dropout on attention, activations
computed again, a layer that is compiled, hooked or patched. What it computes is then compared with
the model's own result (`passes.PackedRunner`), because transformers may change a class under its
name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.model.client_rows import ClientRows, spans_of
from fedlora.model.decoder_pass import DecoderPass, LayerCall, RotaryGroup, Shapes
from fedlora.model.layers import is_conv1d, is_plain
from fedlora.model.lora_layer import AdapterLayer
from fedlora.model.lora_product import LinearCall
from fedlora.model.packed_attention import running_samples, runs_as_products, sample_mask_of
from fedlora.model.sample_groups import Samples, score_bar

KNOWN = {
    "transformers.models.llama.modeling_llama": ("LlamaModel", "LlamaDecoderLayer"),
    "transformers.models.mistral.modeling_mistral": ("MistralModel", "MistralDecoderLayer"),
    "transformers.models.qwen2.modeling_qwen2": ("Qwen2Model", "Qwen2DecoderLayer"),
}
"""Module -> its trunk, which ends with the layers and a norm of every row, and their class."""
_INPUTS = ("q_proj", "k_proj", "v_proj")
_ANCHOR = torch.zeros(0, requires_grad=True)


def decoder_layers(trunk: Any) -> list[Any]:
    """The layers of a trunk that can be run by `DecoderPass`, in order; all of them or none."""
    trunk_name, layer_name = KNOWN.get(type(trunk).__module__, ("", ""))
    if type(trunk).__name__ != trunk_name:
        return []
    layers = list(trunk.layers[: trunk.config.num_hidden_layers])
    known = all(type(layer).__name__ == layer_name and _is_plain(layer) for layer in layers)
    return layers if known else []


def _is_plain(layer: Any) -> bool:
    """Whether nothing of a layer is beyond what `DecoderPass` computes."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    linears = [getattr(attention, name) for name in (*_INPUTS, "o_proj")]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    parameters = [norm.weight for norm in norms]
    for linear in linears:
        base = linear.base if isinstance(linear, AdapterLayer) else linear
        if not is_plain(base) or is_conv1d(base):
            return False
        parameters += list(base.parameters())
    return (
        all(p.dtype == torch.float32 and not p.requires_grad for p in parameters)
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and not attention.attention_dropout
        and all(_is_untouched(module) for module in layer.modules())
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is the same for all clients."""
    return _is_untouched(module) and not any(p.requires_grad for p in module.parameters())


def _is_untouched(module: nn.Module) -> bool:
    """Whether a module is neither compiled, nor hooked, nor patched."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    compiled = vars(module).get("_compiled_call_impl") is not None
    return not any(hooks) and not compiled and "forward" not in vars(module)


@dataclass
class LayerPasses:
    """Gives each layer of a trunk the forward pass of `DecoderPass`, for one packed pass.

    Args:
        layers: of `decoder_layers`.
        client_rows: of the model.
        wanted: `(n,)`, the rows that are wanted of the last layer's output; None: all.
        counts: how many of these each client has.
    """

    layers: Sequence[Any]
    client_rows: ClientRows
    wanted: Tensor | None = None
    counts: Sequence[int] = ()
    _known: list[tuple[Tensor, Tensor | None, Sequence[RotaryGroup]]] = field(default_factory=list)

    def forward_of(self, layer: Any) -> Callable[..., Tensor]:
        """What stands in for a layer's `forward`."""
        own, last = layer.forward, layer is self.layers[-1]

        def forward(hidden_states: Tensor, **named: Any) -> Tensor:
            samples = running_samples()
            short = runs_as_products(hidden_states, samples)
            if not short or hidden_states.dtype != torch.float32 or _recomputes(layer):
                y: Tensor = own(hidden_states, **named)
                return y if not last or self.wanted is None else y[:, self.wanted]
            wanted = self.wanted if last else None
            return self._run(layer, hidden_states, samples, named, wanted)

        return forward

    def _run(
        self,
        layer: Any,
        x: Tensor,
        samples: Samples,
        named: Mapping[str, Any],
        wanted: Tensor | None,
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        shapes = _shapes_of(attention)
        window = getattr(attention.config, "sliding_window", None)
        window = getattr(attention, "sliding_window", window)
        groups = self._rotary_groups(
            samples, named["position_embeddings"], named.get("attention_mask"), window
        )
        inputs = [_call_of(getattr(attention, name), x) for name in _INPUTS]
        after = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        late = False
        if wanted is None:
            others = [_call_of(module, x) for module in after]
        elif any(_drops(module) for module in after):
            # Dropout draws for all rows of a client, so all of them are computed.
            others, late = [_call_of(module, x) for module in after], True
        else:
            with self.client_rows.divided(tokens=spans_of(self.counts)):
                others = [_call_of(module, x[:, : len(wanted)]) for module in after]
        norms = layer.input_layernorm, layer.post_attention_layernorm
        call = LayerCall(
            shapes,
            (norms[0].weight, norms[1].weight),
            (norms[0].variance_epsilon, norms[1].variance_epsilon),
            (inputs[0], inputs[1], inputs[2]),
            (others[0], others[1], others[2], others[3]),
            groups,
            None if late else wanted,
        )
        anchor = _ANCHOR if call.trains else None
        y: Tensor = DecoderPass.apply(x[0], anchor, call)  # type: ignore[no-untyped-call]
        return (y[wanted] if late and wanted is not None else y)[None]

    def _rotary_groups(
        self,
        samples: Samples,
        factors: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        window: int | None,
    ) -> Sequence[RotaryGroup]:
        """What attention takes from the pass alone, gathered once for all layers with one mask."""
        for known_factors, known_mask, groups in self._known:
            if known_factors is factors[0] and known_mask is attention_mask:
                return groups
        mask = sample_mask_of(attention_mask, window, samples.groups[0].length)
        cos, sin = (x.reshape(-1, x.shape[-1]) for x in factors)
        groups = [
            RotaryGroup(
                group,
                cos.index_select(0, group.gather).view(group.size, group.length, -1),
                sin.index_select(0, group.gather).view(group.size, group.length, -1),
                score_bar(group, cos, True, mask),
            )
            for group in samples.groups
        ]
        self._known.append((factors[0], attention_mask, groups))
        return groups


def _shapes_of(attention: Any) -> Shapes:
    d = attention.head_dim
    queries = attention.q_proj.out_features // d
    return Shapes(queries, attention.k_proj.out_features // d, d, attention.scaling)


def _recomputes(layer: Any) -> bool:
    return bool(layer.gradient_checkpointing and layer.training)


def _call_of(module: Any, x: Tensor) -> LinearCall:
    """A layer on the rows that run now; `x (1, rows, any width)` gives their number."""
    if not isinstance(module, AdapterLayer):
        return LinearCall(module.weight, module.bias, None, ())
    return module.call_of(x)


def _drops(module: Any) -> bool:
    """Whether some client's adapter in a layer drops entries of its input."""
    if not isinstance(module, AdapterLayer) or not module.training:
        return False
    return any(client.dropout for client in module.clients)
