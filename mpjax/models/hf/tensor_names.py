"""Maps leaves of the parameter tree to tensors of a checkpoint: one table for each architecture.

A leaf below `layers` is stacked: `{}` in a name is the layer. Kernels are (inputs, outputs) here
and (outputs, inputs) in a torch Linear, so those are transposed; GPT-2's Conv1D is not.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Weight:
    """The tensor, or stack of tensors, of one leaf.

    Args:
      name: of the tensor, `{}` for the layer.
      transposed: whether its axes are in reverse order.
      part: (i, n): the leaf is the i-th of n equal parts along the tensor's last axis.
    """

    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a layer axis, and a tensor for each layer."""
        return "{}" in self.name

    def names(self, layers: int) -> list[str]:
        """Returns the tensors of all layers, or the one of a leaf that is not stacked."""
        return [self.name.format(i) for i in range(layers)] if self.stacked else [self.name]


Table = dict[str, Weight]


def _linear(ours: str, theirs: str, transposed: bool = True) -> Table:
    return {
        f"{ours}/kernel": Weight(f"{theirs}.weight", transposed),
        f"{ours}/bias": Weight(f"{theirs}.bias"),
    }


def _fused(ours: str, names: tuple[str, ...], theirs: str) -> Table:
    n = len(names)
    return {
        f"{ours}/{name}/{leaf}": Weight(f"{theirs}.{end}", part=(i, n))
        for i, name in enumerate(names)
        for leaf, end in (("kernel", "weight"), ("bias", "bias"))
    }


def _norm(ours: str, theirs: str) -> Table:
    return {
        f"{ours}/scale": Weight(f"{theirs}.weight"),
        f"{ours}/bias": Weight(f"{theirs}.bias"),
    }


_GPT2_LAYER = "transformer.h.{}"
GPT2: Table = {
    "decoder/embed/table": Weight("transformer.wte.weight"),
    "decoder/position/table": Weight("transformer.wpe.weight"),
    "decoder/head/kernel": Weight("lm_head.weight", transposed=True),
    **_norm("decoder/norm", "transformer.ln_f"),
    **_norm("decoder/layers/norm_attention", f"{_GPT2_LAYER}.ln_1"),
    **_norm("decoder/layers/norm_mlp", f"{_GPT2_LAYER}.ln_2"),
    **_fused(
        "decoder/layers/attention", ("query", "key", "value"), f"{_GPT2_LAYER}.attn.c_attn"
    ),
    **_linear("decoder/layers/attention/out", f"{_GPT2_LAYER}.attn.c_proj", transposed=False),
    **_linear("decoder/layers/mlp/up", f"{_GPT2_LAYER}.mlp.c_fc", transposed=False),
    **_linear("decoder/layers/mlp/down", f"{_GPT2_LAYER}.mlp.c_proj", transposed=False),
}  # fmt: skip

_LLAMA_LAYER = "model.layers.{}"
LLAMA: Table = {
    "decoder/embed/table": Weight("model.embed_tokens.weight"),
    "decoder/head/kernel": Weight("lm_head.weight", transposed=True),
    **_norm("decoder/norm", "model.norm"),
    **_norm("decoder/layers/norm_attention", f"{_LLAMA_LAYER}.input_layernorm"),
    **_norm("decoder/layers/norm_mlp", f"{_LLAMA_LAYER}.post_attention_layernorm"),
    **_linear("decoder/layers/attention/query", f"{_LLAMA_LAYER}.self_attn.q_proj"),
    **_linear("decoder/layers/attention/key", f"{_LLAMA_LAYER}.self_attn.k_proj"),
    **_linear("decoder/layers/attention/value", f"{_LLAMA_LAYER}.self_attn.v_proj"),
    **_linear("decoder/layers/attention/out", f"{_LLAMA_LAYER}.self_attn.o_proj"),
    **_norm("decoder/layers/attention/norm_query", f"{_LLAMA_LAYER}.self_attn.q_norm"),
    **_norm("decoder/layers/attention/norm_key", f"{_LLAMA_LAYER}.self_attn.k_norm"),
    **_linear("decoder/layers/mlp/gate", f"{_LLAMA_LAYER}.mlp.gate_proj"),
    **_linear("decoder/layers/mlp/up", f"{_LLAMA_LAYER}.mlp.up_proj"),
    **_linear("decoder/layers/mlp/down", f"{_LLAMA_LAYER}.mlp.down_proj"),
}

_BERT_LAYER = "bert.encoder.layer.{}"
BERT: Table = {
    "encoder/embed/table": Weight("bert.embeddings.word_embeddings.weight"),
    "encoder/position/table": Weight("bert.embeddings.position_embeddings.weight"),
    "encoder/token_type/table": Weight("bert.embeddings.token_type_embeddings.weight"),
    **_norm("encoder/norm_embed", "bert.embeddings.LayerNorm"),
    **_linear("encoder/layers/attention/query", f"{_BERT_LAYER}.attention.self.query"),
    **_linear("encoder/layers/attention/key", f"{_BERT_LAYER}.attention.self.key"),
    **_linear("encoder/layers/attention/value", f"{_BERT_LAYER}.attention.self.value"),
    **_linear("encoder/layers/attention/out", f"{_BERT_LAYER}.attention.output.dense"),
    **_norm("encoder/layers/norm_attention", f"{_BERT_LAYER}.attention.output.LayerNorm"),
    **_linear("encoder/layers/mlp/up", f"{_BERT_LAYER}.intermediate.dense"),
    **_linear("encoder/layers/mlp/down", f"{_BERT_LAYER}.output.dense"),
    **_norm("encoder/layers/norm_mlp", f"{_BERT_LAYER}.output.LayerNorm"),
    **_linear("encoder/pooler/dense", "bert.pooler.dense"),
    **_linear("encoder/masked/dense", "cls.predictions.transform.dense"),
    **_norm("encoder/masked/norm", "cls.predictions.transform.LayerNorm"),
    "encoder/masked/head/bias": Weight("cls.predictions.bias"),
    "encoder/masked/head/kernel": Weight("cls.predictions.decoder.weight", transposed=True),
    **_linear("encoder/next/head", "cls.seq_relationship"),
    **_linear("encoder/class/head", "classifier"),
    **_linear("encoder/token/head", "classifier"),
}


def _seq2seq(half: str) -> Table:
    """One half of the Transformer of bentrevett's pytorch-seq2seq, which annalog is."""
    ours, theirs = f"{half}/layers", f"{half}.layers.{{}}"
    table = {
        f"{half}/embed/table": Weight(f"{half}.tok_embedding.weight"),
        f"{half}/position/table": Weight(f"{half}.pos_embedding.weight"),
        **_norm(f"{ours}/norm_attention", f"{theirs}.self_attn_layer_norm"),
        **_norm(f"{ours}/norm_cross_attention", f"{theirs}.enc_attn_layer_norm"),
        **_norm(f"{ours}/norm_mlp", f"{theirs}.ff_layer_norm"),
        **_linear(f"{ours}/mlp/up", f"{theirs}.positionwise_feedforward.fc_1"),
        **_linear(f"{ours}/mlp/down", f"{theirs}.positionwise_feedforward.fc_2"),
    }
    for own, other in (("attention", "self_attention"), ("cross_attention", "encoder_attention")):
        for name, end in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
            table |= _linear(f"{ours}/{own}/{name}", f"{theirs}.{other}.fc_{end}")
    return table


SEQ2SEQ: Table = {
    **_seq2seq("encoder"),
    **_seq2seq("decoder"),
    **_linear("decoder/head", "decoder.fc_out"),
}
