"""config.json of BERT, to and from an EncoderConfig."""

from __future__ import annotations

from typing import Any

from mpjax.models.encoder_config import EncoderConfig
from mpjax.models.hf.decoder_fields import GELU, GELU_BACK
from mpjax.models.hf.fields import Fields

# Class of transformers -> the head that it has here.
_HEADS = {
    "BertModel": "none",
    "BertForMaskedLM": "masked",
    "BertForPreTraining": "pretrain",
    "BertForSequenceClassification": "class",
    "BertForTokenClassification": "token",
}


def read_bert(fields: Fields) -> dict[str, Any]:
    """Returns the fields of an EncoderConfig for BERT; no class named means no head."""
    f = fields
    f.only("position_embedding_type", "absolute")
    f.only("is_decoder", False)
    f.only("add_cross_attention", False)
    f.only("is_encoder_decoder", False)
    f.only("pruned_heads", {})
    title = (f.take("architectures", list, []) or ["BertModel"])[0]
    if title not in _HEADS:
        f.refuse(f"architectures names {title!r}; known: {' '.join(_HEADS)}")
    classes = len(f.take("id2label", dict, {})) or 2
    return dict(
        norm="layer",
        norm_first=False,
        norm_embed=True,
        position="learned",
        bias=True,
        vocabulary=f.take("vocab_size", int),
        context=f.take("max_position_embeddings", int),
        types=f.take("type_vocab_size", int, 2),
        width=f.take("hidden_size", int),
        layers=f.take("num_hidden_layers", int),
        heads=f.take("num_attention_heads", int),
        mlp_width=f.take("intermediate_size", int),
        activation=f.one_of("hidden_act", GELU, "gelu"),
        epsilon=f.take("layer_norm_eps", float, 1e-12),
        dropout=f.take("hidden_dropout_prob", float, 0.1),
        tied=f.take("tie_word_embeddings", bool, True),
        head=_HEADS[title],
        classes=f.take("num_labels", int, classes),
    )


def write_bert(c: EncoderConfig) -> dict[str, Any]:
    """Returns the fields of a config.json."""
    labels = {str(i): f"LABEL_{i}" for i in range(c.classes)}
    return dict(
        vocab_size=c.vocabulary,
        max_position_embeddings=c.context,
        type_vocab_size=c.types,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.hidden,
        hidden_act=GELU_BACK[c.activation],
        layer_norm_eps=c.epsilon,
        hidden_dropout_prob=c.dropout,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=c.tied,
        id2label=labels,
        label2id={label: int(i) for i, label in labels.items()},
    )


def bert_class(c: EncoderConfig) -> str:
    """Returns the class of transformers that has the head of a config."""
    return next(title for title, head in _HEADS.items() if head == c.head)


def is_bert(c: EncoderConfig) -> bool:
    """Returns whether a config has the shape of BERT."""
    odd = (c.qk_norm, c.window, c.head_width, c.scale_embed, c.norm_first, c.pool != "first")
    shape = (c.norm, c.position, c.bias, c.norm_embed, c.groups == c.heads, c.types > 0)
    return not any(odd) and shape == ("layer", "learned", True, True, True, True) and (
        c.activation in GELU_BACK
    )  # fmt: skip
