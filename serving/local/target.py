"""The target: a Llama or Qwen causal LM from transformers' files, laid out for steps of a few rows.

Against transformers' own modules: gains of the RMS norms folded into the weights behind them, one product for
q, k, v and one for gate and up, weights laid out for it (see ``linear``), rotary embedding as one complex product,
preallocated caches.  Same function up to float32 rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from livedraft.contracts.errors import BadRequest
from livedraft.serving.local.attention import Layout, Rotary, attend, layout, normalised
from livedraft.serving.local.kv import KVCache
from livedraft.serving.local.linear import Linear, frozen
from safetensors import safe_open
from torch import Tensor

_FAMILIES = {"llama", "qwen2", "qwen3"}


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """The numbers of a target that the engine and a drafter need."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eps: float
    tied: bool
    qk_norm: bool
    eos: tuple[int, ...]

    @property
    def feature_layers(self) -> tuple[int, int, int]:
        """0-based blocks whose outputs an EAGLE-3 drafter reads (SGLang's and vLLM's default)."""
        return (1, self.layers // 2 - 1, self.layers - 4)


@dataclass(frozen=True, slots=True)
class _Block:
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    q_gain: Tensor | None
    k_gain: Tensor | None


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, float32."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise BadRequest(f"{folder} holds no .safetensors file", field="target")
    return tensors


class Target:
    """A frozen causal LM.  Not thread-safe: the engine's thread owns it."""

    def __init__(self, folder: Path, *, slots: int, context_length: int = 0, device: str = "cpu") -> None:
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        raw = AutoConfig.from_pretrained(folder)
        if raw.model_type not in _FAMILIES:
            raise BadRequest(
                f"model_type {raw.model_type!r}; the local engine serves {', '.join(sorted(_FAMILIES))}", field="target"
            )
        head_dim = getattr(raw, "head_dim", None) or raw.hidden_size // raw.num_attention_heads
        eos = (
            json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
            if (folder / "generation_config.json").exists()
            else raw.eos_token_id
        )
        self.config = TargetConfig(
            hidden_size=raw.hidden_size,
            layers=raw.num_hidden_layers,
            heads=raw.num_attention_heads,
            kv_heads=raw.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=raw.vocab_size,
            context_length=min(context_length or raw.max_position_embeddings, raw.max_position_embeddings),
            eps=raw.rms_norm_eps,
            tied=bool(raw.tie_word_embeddings),
            qk_norm=raw.model_type == "qwen3",
            eos=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
        )
        c = self.config
        kind = raw.rope_parameters["rope_type"]
        if kind == "default":
            theta = raw.rope_parameters["rope_theta"]
            inverse, scaling = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim), 1.0
        else:
            inverse, scaling = ROPE_INIT_FUNCTIONS[kind](raw, torch.device("cpu"))
        self.device = torch.device(device)
        # Rows past the last committed token are scratch: room for one more proposal than the context holds.
        room = c.context_length + 64
        self.rotary = Rotary(inverse, room, scaling)
        self.rotary.table = self.rotary.table.to(self.device)
        self.cache = KVCache(c.layers, slots, c.kv_heads, room, head_dim, torch.float32, self.device)

        tensors = {name: t.to(self.device) for name, t in load_tensors(folder).items()}
        self.embedding = tensors["model.embed_tokens.weight"]
        head = self.embedding if c.tied else tensors["lm_head.weight"]
        self._blocks = [self._block(tensors, f"model.layers.{i}.") for i in range(c.layers)]
        self._head = frozen(head * tensors["model.norm.weight"])

    def _block(self, tensors: dict[str, Tensor], prefix: str) -> _Block:
        c = self.config
        scale = c.head_dim**-0.5
        attention_gain = tensors[prefix + "input_layernorm.weight"]
        mlp_gain = tensors[prefix + "post_attention_layernorm.weight"]
        parts, biases = [], []
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = tensors[f"{prefix}self_attn.{name}.weight"]
            bias = tensors.get(f"{prefix}self_attn.{name}.bias", torch.zeros(weight.shape[0], device=self.device))
            if name != "v_proj":
                weight, bias = Rotary.paired(weight, c.head_dim), Rotary.paired(bias, c.head_dim)
            if name == "q_proj" and not c.qk_norm:
                weight, bias = weight * scale, bias * scale
            parts.append(weight)
            biases.append(bias)
        bias = torch.cat(biases)
        gains: tuple[Tensor | None, Tensor | None] = (None, None)
        if c.qk_norm:
            q_gain = Rotary.paired(tensors[prefix + "self_attn.q_norm.weight"], c.head_dim) * scale
            gains = (q_gain, Rotary.paired(tensors[prefix + "self_attn.k_norm.weight"], c.head_dim))
        gate_up = torch.cat([tensors[prefix + "mlp.gate_proj.weight"], tensors[prefix + "mlp.up_proj.weight"]])
        return _Block(
            qkv=frozen(torch.cat(parts) * attention_gain, bias if bias.any() else None),
            out=frozen(tensors[prefix + "self_attn.o_proj.weight"], tensors.get(prefix + "self_attn.o_proj.bias")),
            gate_up=frozen(gate_up * mlp_gain),
            down=frozen(tensors[prefix + "mlp.down_proj.weight"]),
            q_gain=gains[0],
            k_gain=gains[1],
        )

    def layout(
        self,
        starts: list[int],
        rows: int,
        *,
        slot: int = 0,
        depths: Tensor | None = None,
        ancestors: Tensor | None = None,
    ) -> Layout:
        """Where ``rows`` new tokens of each sequence stand; see ``attention.layout``."""
        c = self.config
        return layout(
            self.cache,
            self.rotary,
            slot=slot,
            starts=starts,
            rows=rows,
            groups=c.heads // c.kv_heads,
            depths=depths,
            ancestors=ancestors,
        )

    def forward(self, tokens: Tensor, where: Layout, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass: tokens [B*R] int64 -> (logits [B*R, V], features [B*R, 3d]), float32; caches are written.

        ``rows`` (int64) limits the logits to those rows: a prefill needs only its last.
        """
        c = self.config
        x = self.embedding[tokens]
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self._blocks):
            qkv = block.qkv(normalised(x, c.eps))
            if block.q_gain is not None and block.k_gain is not None:
                qkv = self._normalise_heads(qkv, block.q_gain, block.k_gain)
            x = block.out(attend(qkv, c.heads, c.head_dim, self.cache, i, where)).add_(x)
            gate, up = block.gate_up(normalised(x, c.eps)).view(len(x), 2, -1).unbind(1)
            x.add_(block.down(F.silu(gate).mul_(up)))
            if i in c.feature_layers:
                outputs[i] = x
        states = torch.cat([outputs[i] for i in c.feature_layers], -1)
        if rows is not None:
            x = x[rows]
        return self._head(normalised(x, c.eps)), states

    def _normalise_heads(self, qkv: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        # Qwen3 normalises every query and key head before rotating it.
        c = self.config
        q, k, v = torch.split(qkv, [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim], -1)
        q = normalised(q.reshape(-1, c.head_dim), c.eps).mul_(q_gain).view_as(q)
        k = normalised(k.reshape(-1, c.head_dim), c.eps).mul_(k_gain).view_as(k)
        return torch.cat([q, k, v], -1)
