"""config.json of BERT, to and from an EncoderConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mpjax.errors import brief
from mpjax.json_text import parse_json
from mpjax.models.hf.decoder_fields import GELU, GELU_BACK
from mpjax.models.hf.fields import Fields
from mpjax.models.transformer.encoder_config import EncoderConfig
from mpjax.typing import Settings

# Field of EncoderConfig -> field of config.json, and its default in transformers.
_SIZES = {
    "vocabulary": ("vocab_size", 30522),
    "context": ("max_position_embeddings", 512),
    "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
}
# Class of transformers -> head of EncoderConfig.
_HEADS = {
    "BertModel": "none",
    "BertForMaskedLM": "masked",
    "BertForPreTraining": "pretrain",
    "BertForSequenceClassification": "class",
    "BertForTokenClassification": "token",
}


def read_bert(fields: Fields) -> Settings:
    """Returns the fields of an EncoderConfig for BERT; no class named means no head."""
    f = fields
    f.only("position_embedding_type", "absolute")
    f.only("is_decoder", False)
    f.only("add_cross_attention", False)
    f.only("is_encoder_decoder", False)
    f.only("pruned_heads", {})
    title = (f.take("architectures", list, []) or ["BertModel"])[0]
    if not isinstance(title, str) or title not in _HEADS:
        f.refuse(f"architectures names {brief(title)}; known: {' '.join(_HEADS)}")
    head, classes = _HEADS[title], f.take("num_labels", int, 2)
    names = f.take("id2label", dict, {})
    labels: tuple[str, ...] = ()
    if names and head in ("class", "token"):
        labels = _labels(f, names)
        classes = len(labels)  # as in transformers, whatever num_labels says
    return dict(
        norm="layer",
        norm_first=False,
        norm_embed=True,
        position="learned",
        bias=True,
        **{our: f.take(name, int, absent=size) for our, (name, size) in _SIZES.items()},
        types=f.take("type_vocab_size", int, 2),
        mlp_width=f.take("intermediate_size", int, absent=3072),
        activation=f.one_of("hidden_act", GELU, "gelu"),
        epsilon=f.take("layer_norm_eps", float, 1e-12),
        dropout=f.take("hidden_dropout_prob", float, 0.1),
        tied=f.take("tie_word_embeddings", bool, True),
        head=head,
        classes=classes,
        labels=labels,
    )


def _labels(f: Fields, names: Settings) -> tuple[str, ...]:
    """Names of the classes in the order of the logits, whatever their order in the file."""
    places = [str(i) for i in range(len(names))]
    if sorted(names) != sorted(places) or not all(isinstance(x, str) for x in names.values()):
        f.refuse(f"id2label={brief(names)}; expected a name for each of 0 to {len(names) - 1}")
    return tuple(names[place] for place in places)


def write_bert(c: EncoderConfig) -> Settings:
    """Returns the fields of a config.json."""
    names = c.labels or tuple(f"LABEL_{i}" for i in range(c.classes))
    labels = {str(i): name for i, name in enumerate(names)}
    return dict(
        **{name: getattr(c, our) for our, (name, _) in _SIZES.items()},
        type_vocab_size=c.types,
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
    mean = c.pool != "first" and c.head != "none"  # without a head `pooling_files` stores it
    odd = (c.qk_norm, c.window, c.head_width, c.scale_embed, c.norm_first, mean, c.task_heads)
    needed = (c.bias, c.norm_embed, c.groups == c.heads, c.types > 0, c.activation in GELU_BACK)
    return not any(odd) and all(needed) and (c.norm, c.position) == ("layer", "learned")


# Mean pooling as sentence-transformers stores it: BERT's config.json has no field for it.
_MODULES, _POOLING = "modules.json", "1_Pooling/config.json"
_MEAN = "pooling_mode_mean_tokens"


def pools_mean(files: Mapping[str, bytes | str]) -> bool:
    """Returns whether the files of a checkpoint pool the mean of its tokens, and nothing else.

    Raises:
      ConfigError: the file that says what is pooled is no JSON.
    """
    if _MODULES not in files or _POOLING not in files:
        return False
    settings = parse_json(files[_POOLING], _POOLING)
    if not isinstance(settings, dict):
        return False
    modes = {name for name, on in settings.items() if name.startswith("pooling_mode_") and on}
    return modes == {_MEAN} or settings.get("pooling_mode") == "mean"


def pooling_files(config: object, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns what an export of an encoder needs beside its files so that the mean is pooled."""
    if not isinstance(config, EncoderConfig) or config.head != "none" or config.pool != "mean":
        return {}
    if pools_mean(files):
        return {}
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    pooling = {"word_embedding_dimension": config.width, _MEAN: True}
    pooling["pooling_mode_cls_token"] = False
    return {
        name: json.dumps(value, indent=2).encode()
        for name, value in ((_MODULES, modules), (_POOLING, pooling))
    }
