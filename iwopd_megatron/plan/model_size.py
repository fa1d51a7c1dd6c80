"""Parameters of a model and of one rank's share of it, from config.json alone.

Counts are parameters, as Megatron builds them here: vocabulary never padded, SwiGLU, and of biases
and of norms on queries and keys what the family has. Per rank: attention, dense MLP and vocabulary
over tp, experts over ep x etp but a shared one over tp, layers over stages; norms, routers and
gates whole on every tp rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from iwopd_megatron.config.models import Layout
from iwopd_megatron.config.stages import stage_layers
from iwopd_megatron.hf.config import HfConfig


@dataclass(frozen=True)
class Share:
    """Parameters of one rank; experts' gradients are summed over another group than the rest's."""

    dense: float
    expert: float

    @property
    def total(self) -> float:
        """Parameters, dense and expert."""
        return self.dense + self.expert


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a model, dense or with experts (`experts` 0: dense)."""

    hidden: int
    ffn: int  # of a dense MLP, or of one expert
    layers: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    heads: int
    head: int
    kv_heads: int
    vocab: int
    tied: bool
    experts: int
    topk: int  # experts a token visits; 1 MLP if dense
    qk_norm: bool = True  # a norm on queries and keys
    qkv_bias: bool = False
    shared: int = 0  # width of the expert that every token meets
    gates: int = 0  # numbers a token that scale its output
    dense_layers: int = 0  # of a model with experts: so many at the beginning have none,
    dense_ffn: int = 0  # but an MLP of this width
    sigmoid: bool = False  # routers' scores, and not the softmax of all
    groups: int = 0  # of experts, of which a token's are in the best; 0: they are not grouped
    q_rank: int = 0  # size of the latent that queries are made of; 0: none
    kv_rank: int = 0  # of the one that keys and values are made of; 0: no latent attention
    turned: int = 0  # size of the rotary key beside it
    value: int = 0  # size of a value head with latents

    @classmethod
    def of(cls, hf: HfConfig) -> ModelSize:
        """Return the dimensions that a config.json gives."""
        experts = hf.num_experts
        return cls(
            hidden=hf.hidden_size,
            ffn=hf.ffn_size,
            layers=hf.num_hidden_layers,
            queries=hf.queries,
            keys=hf.keys,
            heads=hf.num_attention_heads,
            head=hf.head_dim,
            kv_heads=hf.num_key_value_heads,
            vocab=hf.vocab_size,
            tied=hf.tie_word_embeddings,
            experts=experts,
            topk=hf.num_experts_per_tok if experts else 1,
            qk_norm=hf.qk_norm,
            qkv_bias=hf.qkv_bias,
            shared=hf.shared_expert_intermediate_size,
            gates=hf.shared_expert_gates,
            dense_layers=hf.first_k_dense_replace,
            dense_ffn=hf.intermediate_size if hf.first_k_dense_replace else 0,
            sigmoid=hf.sigmoid_router,
            groups=hf.n_group if hf.n_group > 1 else 0,
            q_rank=hf.q_lora_rank,
            kv_rank=hf.kv_lora_rank,
            turned=hf.qk_rope_head_dim,
            value=hf.v_head_dim,
        )

    @property
    def attention(self) -> int:
        """Weights of one layer's projections = h (2q + 2k): queries and output, keys and values."""
        if self.kv_rank:
            up = self.q_rank * self.queries + self.kv_rank * self.kv_up
            plain = 0 if self.q_rank else self.hidden * self.queries
            return self.down + plain + up + self.hidden * self.values
        return self.hidden * (2 * self.queries + 2 * self.keys)

    @property
    def down(self) -> int:
        """Of these, what every tp rank has whole = h (latents + rotary key): down projections."""
        return self.hidden * (self.q_rank + self.kv_rank + self.turned)

    @property
    def kv_up(self) -> int:
        """All heads' keys without their turned part, and values, which a latent is projected to."""
        return self.heads * (self.head - self.turned + self.value)

    @property
    def values(self) -> int:
        """Query heads x size of a value head: what attention gives."""
        return self.heads * (self.value or self.head)

    @property
    def keys_values(self) -> int:
        """All heads' keys and values of a token, as context ranks gather them."""
        return self.keys + self.kv_heads * (self.value or self.head)

    def cached(self, tp: int) -> float:
        """Elements that an engine's tp rank caches of a token in one layer.

        Keys and values of its heads, one at least; with latents these and the rotary key, whole.
        """
        if self.kv_rank:
            return self.kv_rank + self.turned
        return 2 * self.head * max(1, self.kv_heads / tp)

    @property
    def biases(self) -> int:
        """Biases of one layer = q + 2k where queries, keys and values have them."""
        return self.qkv_bias * (self.queries + 2 * self.keys)

    @property
    def norms(self) -> int:
        """Weights of one layer's norms = 2h before attention and MLP + 2 head sizes (q, k).

        And of the latents.
        """
        return 2 * self.hidden + self.qk_norm * 2 * self.head + self.q_rank + self.kv_rank

    @property
    def router(self) -> int:
        """Weights of one layer's router and of the shared expert's gate = h (experts + gates)."""
        return self.hidden * (self.experts + self.gates)

    @property
    def mlp(self) -> int:
        """Weights of one dense MLP or one expert = 3 h f: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def shared_mlp(self) -> int:
        """Weights of one layer's shared expert = 3 h x its width; 0 without one."""
        return 3 * self.hidden * self.shared

    @cached_property
    def dense(self) -> ModelSize:
        """The same with layers all as those at the beginning that have no experts."""
        return replace(
            self, experts=0, topk=1, shared=0, gates=0, groups=0, dense_layers=0, ffn=self.dense_ffn
        )

    def dense_of(self, layers: Iterable[int]) -> int:
        """Return how many of these layers, counted from 0, are without experts in a model with."""
        return sum(layer < self.dense_layers for layer in layers)

    @property
    def vocabulary(self) -> int:
        """Weights of an embedding, or of an LM head = vocabulary x h."""
        return self.vocab * self.hidden

    @cached_property
    def parameters(self) -> int:
        """All parameters = layers x (attention + biases + norms + router + MLPs + shared expert) +
        final norm + vocabulary.

        The vocabulary counts twice (embedding and head) unless they are tied.
        """
        layer = self.router + max(1, self.experts) * self.mlp + self.shared_mlp
        layers = self.layers * (self.attention + self.biases + self.norms)
        layers += self._mlps(layer, self.dense.mlp)
        return layers + self.hidden + self.vocabulary * (1 if self.tied else 2)

    def _mlps(self, layer: int, dense: int) -> int:
        """Return the sum over all layers of what a layer has, and one without experts."""
        return (self.layers - self.dense_layers) * layer + self.dense_layers * dense

    @cached_property
    def active(self) -> int:
        """Parameters in a token's matrix products, the head's included and the embedding's not.

        = layers x (attention + router + topk x MLP + shared expert) + vocabulary; twice that is a
        token's FLOP without attention scores.
        """
        layer = self.router + self.topk * self.mlp + self.shared_mlp
        return self.layers * self.attention + self._mlps(layer, self.dense.mlp) + self.vocabulary

    def share(self, layout: Layout, stage: int) -> Share:
        """Return one rank's parameters on pipeline stage `stage` (0 first, pp - 1 last).

        Down projections to latents are whole, beside the norms.
        Dense = layers x ((attention + biases + dense MLP or shared expert) / tp + norms + router),
        and vocabulary / tp for the embedding on the first stage, vocabulary / tp + h for head and
        final norm on the last; layers: of this stage (`config.stages`).
        Expert = layers x experts x MLP / (ep etp). A tied head is a copy of the embedding where
        pp > 1, and no parameters where pp = 1.
        """
        tp, own = layout.tp, stage_layers(layout, self.layers)[stage]
        layers, plain = sum(map(len, own)), sum(map(self.dense_of, own))
        cut = self.attention - self.down + self.biases
        dense = layers * (cut / tp + self.down + self.norms)
        dense += plain * self.dense.mlp / tp
        expert = 0.0
        if self.experts:
            dense += (layers - plain) * (self.shared_mlp / tp + self.router)
            expert = (layers - plain) * self.experts * self.mlp / (layout.ep * layout.etp)
        else:
            dense += layers * self.mlp / tp
        is_last = stage == layout.pp - 1
        tables = (stage == 0) + (is_last and not (self.tied and layout.pp == 1))
        return Share(dense + tables * self.vocabulary / tp + is_last * self.hidden, expert)
