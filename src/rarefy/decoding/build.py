"""From a loaded Transformers model to its program, or to a sentence that says why there is none.

Nothing is taken on trust: the model's class must be one whose ``forward`` is known here, every module must have exactly
the children that forward uses, and whatever families do differently in a module (norms, activations, rotary tables) is
found by running that module on numbers and comparing. So a model that is a little different is refused, not misread.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rarefy.core.errors import UnsupportedError
from rarefy.decoding.interpreter import ACTIVATIONS, normalize, rotate
from rarefy.decoding.program import Activation, Add, Attend, Cap, Embed, Gate, Norm, Operation, Program, Project, Rotate
from rarefy.formats.terms import Term
from rarefy.layers.linear import CompressedLinear


@dataclass(frozen=True)
class Family:
    """What the ``forward`` of a model class does that its modules do not show.

    ``window``: where the sliding window stands, in each attention layer or in the configuration; None: it is not read.
    ``scaled``: embeddings are multiplied by the root of their width. ``capped``: what passes a soft cap when the
    configuration has one.
    """

    window: Literal["layer", "config"] | None = None
    scaled: bool = False
    capped: tuple[Literal["attention", "logits"], ...] = ()


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(window="config"),
    "Qwen2ForCausalLM": Family(window="layer"),
    "Qwen3ForCausalLM": Family(window="layer"),
    "GemmaForCausalLM": Family(scaled=True),
    "Gemma2ForCausalLM": Family(window="layer", scaled=True, capped=("attention", "logits")),
    "Gemma3ForCausalLM": Family(window="layer", scaled=True, capped=("logits",)),
}
# Attention functions that compute what ``Attend`` says; a plan of another name computes something else.
EXACT_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
# Rotary tables that are the same at every length.
FIXED_ROTARY = ("default", "linear", "llama3", "yarn")

_LOOKING = "transformers.utils.output_capturing"
_PLAIN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_SANDWICH = _PLAIN | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}


def _on_cpu(module: Any) -> Any:
    """``module``, or a copy of it where its tensors are elsewhere, to compare with what is computed on the CPU."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(tensor.device.type == "cpu" for tensor in tensors) else copy.deepcopy(module).cpu()


@torch.inference_mode()
def build(model: Any) -> Program:
    """The program of ``model``, in evaluation mode and on one device.

    Raises UnsupportedError saying what is not known.
    """
    return _Builder(model).program()


class _Builder:
    def __init__(self, model: Any):
        self.model, self.config = model, model.config
        self.name = type(model).__name__
        known = FAMILIES.get(self.name)
        if known is None or not type(model).__module__.startswith("transformers.models."):
            raise UnsupportedError(f"The decode runner does not know the model class {self.name}.")
        self.family = known
        if model.training:
            raise UnsupportedError("The decode runner needs a model in evaluation mode; call model.eval().")
        self.step: list[Operation] = []
        self.buffers: dict[str, int] = {}

    def program(self) -> Program:
        self.check_tree()
        body, head, config = self.model.model, self.model.lm_head, self.config
        blocks = list(body.layers[: config.num_hidden_layers])
        first = blocks[0].self_attn
        self.head_dim = int(first.head_dim)
        self.heads = first.q_proj.out_features // self.head_dim
        self.kv_heads = first.k_proj.out_features // self.head_dim
        scale = float(config.hidden_size**0.5) if self.family.scaled else 1.0
        self.step = [Embed("hidden", body.embed_tokens, scale)]
        self.buffers = {"hidden": config.hidden_size, "normed": config.hidden_size, "branch": config.hidden_size}
        for index, block in enumerate(blocks):
            self.block(index, block)
        self.check_width("lm_head", head, config.hidden_size, config.vocab_size)
        ending: list[Operation] = [
            self.norm("hidden", "normed", body.norm, "model.norm"),
            Project("normed", "logits", head, "lm_head"),
        ]
        cap = getattr(config, "final_logit_softcapping", None) if "logits" in self.family.capped else None
        if cap is not None:
            ending.append(Cap("logits", float(cap)))
        self.buffers["logits"] = config.vocab_size
        return Program(
            step=tuple(self.step), head=tuple(ending), buffers=self.buffers, layers=len(blocks), heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.head_dim, vocabulary=config.vocab_size,
            positions=config.max_position_embeddings,
        )  # fmt: skip

    def block(self, index: int, block: nn.Module) -> None:
        name = f"model.layers.{index}"
        sandwich = self.children(block, name, _PLAIN, _SANDWICH) == _SANDWICH
        self.step.append(self.norm("hidden", "normed", block.input_layernorm, f"{name}.input_layernorm"))
        self.attention(index, block.self_attn, f"{name}.self_attn")
        if sandwich:
            self.step.append(
                self.norm("branch", "branch", block.post_attention_layernorm, f"{name}.post_attention_layernorm")
            )
        self.step.append(Add("hidden", "branch"))
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        self.step.append(self.norm("hidden", "normed", getattr(block, before), f"{name}.{before}"))
        self.feed_forward(block.mlp, f"{name}.mlp")
        if sandwich:
            self.step.append(
                self.norm("branch", "branch", block.post_feedforward_layernorm, f"{name}.post_feedforward_layernorm")
            )
        self.step.append(Add("hidden", "branch"))

    def attention(self, index: int, layer: Any, name: str) -> None:
        normed = self.children(layer, name, _PROJECTIONS, _PROJECTIONS | _HEAD_NORMS) != _PROJECTIONS
        if not layer.is_causal:
            raise UnsupportedError(f"'{name}' attends to later tokens, which the decode runner does not do.")
        width = self.config.hidden_size
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inv_freq, scaling = self.rotary(layer, name)
        for part, out in (("q", wide), ("k", narrow), ("v", narrow)):  # together, for executors that fuse them
            self.project("normed", part, layer, f"{part}_proj", name, width, out)
        for part, heads in (("q", self.heads), ("k", self.kv_heads)):
            if normed:
                norm = getattr(layer, f"{part}_norm")
                self.step.append(self.norm(part, part, norm, f"{name}.{part}_norm", heads))
            self.step.append(Rotate(part, heads, inv_freq, scaling))
        softcap = getattr(layer, "attn_logit_softcapping", None)
        if softcap is not None and "attention" not in self.family.capped:
            raise UnsupportedError(f"'{name}' has a soft cap that a {self.name} does not apply; remove it.")
        if softcap is not None and self.config._attn_implementation == "sdpa":
            raise UnsupportedError(f"'{name}' has a soft cap, which 'sdpa' leaves out; load the model with 'eager'.")
        window = {
            None: None,
            "layer": getattr(layer, "sliding_window", None),
            "config": getattr(self.config, "sliding_window", None),
        }[self.family.window]
        self.buffers["mixed"] = wide
        self.step.append(Attend("q", "k", "v", "mixed", index, float(layer.scaling), window, softcap))
        self.project("mixed", "branch", layer, "o_proj", name, wide, width)

    def feed_forward(self, layer: Any, name: str) -> None:
        self.children(layer, name, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        width, inner = self.config.hidden_size, layer.gate_proj.out_features
        self.project("normed", "gate", layer, "gate_proj", name, width, inner)
        self.project("normed", "up", layer, "up_proj", name, width, inner)
        self.step.append(Gate("gate", "up", "gate", self.activation(layer.act_fn, name)))
        self.project("gate", "branch", layer, "down_proj", name, inner, width)

    def project(self, x: str, out: str, parent: Any, label: str, name: str, columns: int, rows: int) -> None:
        linear = getattr(parent, label)
        self.check_width(f"{name}.{label}", linear, columns, rows)
        self.buffers[out] = max(self.buffers.get(out, 0), rows)
        self.step.append(Project(x, out, linear, f"{name}.{label}"))

    def check_width(self, name: str, linear: Any, columns: int, rows: int) -> None:
        if type(linear) not in (nn.Linear, CompressedLinear):
            raise UnsupportedError(
                f"'{name}' is a {type(linear).__name__}, not a linear layer; merge adapters before decoding."
            )
        if (linear.in_features, linear.out_features) != (columns, rows):
            shape = [linear.out_features, linear.in_features]
            raise UnsupportedError(f"'{name}' is {shape}, not [{rows}, {columns}] as in a {self.name}.")

    def norm(self, x: str, out: str, module: Any, name: str, heads: int = 1) -> Norm:
        """The RMS norm that ``module`` is: its formula is found by comparing what it makes of random numbers."""
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float):
            here = _on_cpu(module)
            probe = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
            for centred in (False, True):
                found = Norm(x, out, weight, eps, centred)
                if torch.equal(normalize(replace(found, weight=here.weight), probe), here(probe)):
                    if heads * len(weight) != self.buffers[x]:
                        break
                    return Norm(x, out, weight, eps, centred, heads)
        raise UnsupportedError(f"'{name}' is a {type(module).__name__} whose norm the runner does not know.")

    def activation(self, module: Any, name: str) -> Activation:
        probe = torch.linspace(-8, 8, 257)
        made = module(probe)
        for known, function in ACTIVATIONS.items():
            if torch.allclose(made, function(probe), rtol=0, atol=1e-6):
                return known
        raise UnsupportedError(f"'{name}' uses the activation {type(module).__name__}, which the runner does not know.")

    def rotary(self, layer: Any, name: str) -> tuple[Tensor, float]:
        """Inverse frequencies and factor of the rotary embedding that reaches ``layer``, checked at some positions."""
        module = self.model.model.rotary_emb
        kind = None if hasattr(module, "inv_freq") else getattr(layer, "layer_type", None)
        prefix = "" if kind is None else f"{kind}_"
        rope = module.rope_type if kind is None else module.rope_type.get(kind)
        if rope not in FIXED_ROTARY:
            raise UnsupportedError(f"'{name}' uses rotary embeddings of type '{rope}', which the runner does not know.")
        inv_freq, scaling = getattr(module, f"{prefix}inv_freq"), float(getattr(module, f"{prefix}attention_scaling"))
        if inv_freq.shape != (self.head_dim // 2,):
            raise UnsupportedError(
                f"'{name}' rotates {2 * len(inv_freq)} of {self.head_dim} channels; the runner rotates all or nothing."
            )
        module = _on_cpu(module)
        turn = Rotate("", self.head_dim // 2, inv_freq.cpu(), scaling)
        for start in (0, 1, self.config.max_position_embeddings - 1):
            probe = torch.eye(self.head_dim)[: self.head_dim // 2]
            extra = () if kind is None else (kind,)
            cos, sin = module(probe[None, :1], torch.tensor([[start]]), *extra)
            turned = rotate(turn, probe.reshape(1, -1), start)
            expected = torch.cat([torch.diag(cos[0, 0, : len(probe)]), torch.diag(sin[0, 0, : len(probe)])], -1)
            if not torch.allclose(turned.reshape(expected.shape), expected, rtol=0, atol=1e-5):
                raise UnsupportedError(f"'{name}' uses rotary embeddings that the runner computes otherwise.")
        return inv_freq, scaling

    def children(self, module: nn.Module, name: str, *allowed: set[str]) -> set[str]:
        found = {label for label, _ in module.named_children()}
        if found not in allowed:
            odd = min(found ^ allowed[0])
            raise UnsupportedError(f"'{name}.{odd}' is not as in the {self.name} that the decode runner knows.")
        return found

    def check_tree(self) -> None:
        """Whatever changes a model from outside: hooks, replaced forwards, several devices, other attention."""
        self.children(self.model, self.name, {"model", "lm_head"})
        device = self.model.lm_head.weight.device
        if device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"The model is on '{device}'; the decode runner works on the CPU and on CUDA.")
        self.children(self.model.model, "model", {"embed_tokens", "layers", "norm", "rotary_emb"})
        if not isinstance(self.model.model.embed_tokens, nn.Embedding):
            kind = type(self.model.model.embed_tokens).__name__
            raise UnsupportedError(f"'model.embed_tokens' is a {kind}, which the decode runner does not know.")
        if self.config._attn_implementation not in EXACT_ATTENTION:
            raise UnsupportedError(
                f"The attention '{self.config._attn_implementation}' is not exact attention; the runner has no other."
            )
        for name, module in self.model.named_modules():
            hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
            # Transformers keeps hooks that only look, once hidden states were asked for.
            changing = [hook for hook in hooks if getattr(hook, "__module__", "") != _LOOKING]
            # Older ones put the class's own forward back as an attribute.
            own = getattr(vars(module).get("forward", module.forward), "__func__", None)
            if changing or own is not type(module).forward:
                raise UnsupportedError(f"'{name}' has a hook or another forward, which the decode runner would skip.")
            # A term that is laid out for native kernels answers through its layer.
            own = {} if isinstance(module, Term) else {**module._parameters, **module._buffers}
            places = {tensor.device for tensor in own.values() if tensor is not None}
            if isinstance(module, CompressedLinear):
                places.add(module.device)
            for place in places - {device}:
                raise UnsupportedError(
                    f"'{name}' is on '{place}', the head on '{device}'; the runner takes one device."
                )
