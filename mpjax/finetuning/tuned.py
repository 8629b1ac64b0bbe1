"""A run that has been trained: its model, its answers, its export."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mpjax.data import Tokenizer, parse_wordpiece
from mpjax.data.chat import Chat
from mpjax.errors import ConfigError, brief, is_whole
from mpjax.finetuning.language_run import is_language_run, load_language_run
from mpjax.finetuning.run_folder import FILES, RUN, TOKENIZER, RunPage, best_weights
from mpjax.finetuning.tuned_chat import (
    PROMPT,
    SETTINGS,
    own_template,
    prompt_settings,
    run_chat,
)
from mpjax.finetuning.work import lengths_of
from mpjax.json_text import parse_json
from mpjax.models import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    Seq2Seq,
    Seq2SeqConfig,
    generate,
    left_pad,
    load_weights,
    quantize_weights,
)
from mpjax.models.hf import Metadata, save_checkpoint
from mpjax.precision import Precision, get_precision
from mpjax.tasks import (
    Language,
    TextClassification,
    TextRegression,
    TokenClassification,
    Translation,
    softmax,
)
from mpjax.typing import Json, Params, Settings

Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A trained model with all that it needs to answer.

    Args:
      folder: of the run.
      model: in the Precision that answers.
      params: the best weights.
      tokenizer: a WordPiece of encoders, a Tokenizer of decoders.
      task: of `mpjax.tasks`.
      settings: of the run.
      step: of the best weights.
      scores: of the best weights on held-out data.
    """

    folder: Path
    model: Any
    params: Params = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    task: Any
    settings: Settings = dataclasses.field(repr=False)
    step: int
    scores: dict[str, float]

    def predict(
        self, texts: Sequence[Any], seconds: Sequence[str] = (), *, batch: int = 32,
        tokens: int = 64, tools: Sequence[Any] = (),
    ) -> list[Answer]:  # fmt: skip
        """Answers texts.

        Args:
          texts: texts; of a tagger sentences, as words or as text with spaces between them; of
            instructions also conversations, lists of messages that an answer goes on.
          seconds: the second text of each pair.
          batch: texts at a time.
          tokens: at most, of what a language model writes.
          tools: of each conversation the JSON schemas of functions that the model may call.

        Returns:
          Of each text: `label` and the `probability` of every class; `value`; `words` and `tags`;
          or `text`.

        Raises:
          ConfigError: no texts, or something else; a batch or tokens below 1; tools of other texts
            than conversations, or that the chat template does not show.
        """
        for name, value in (("batch", batch), ("tokens", tokens)):
            if not is_whole(value, 1):
                raise ConfigError(f"{name}={brief(value)}: expected a whole number from 1 on")
        texts = list(texts) if not isinstance(texts, str) else [texts]
        words = isinstance(self.task, TokenClassification)
        for number, text in enumerate(texts):
            listed = isinstance(text, list | tuple) and len(text) > 0
            fits = words and listed and all(isinstance(w, str) for w in text)
            fits |= self._talks and listed and all(isinstance(m, Mapping) for m in text)
            if not fits and not isinstance(text, str):
                one = " or a conversation, a list of messages" if self._talks else ""
                raise ConfigError(f"texts[{number}] is {brief(text)}; give a text{one}")
        if not texts:
            raise ConfigError("texts: none; give at least one")
        if tools and not self._talks:
            raise ConfigError("tools: the run answers no conversations; leave tools out")
        if tools and len(tools) != len(texts):
            raise ConfigError(f"tools: {len(tools)} of {len(texts)} texts; give a list for each")
        if isinstance(self.task, Language):
            prompts = [self._prompt(*one) for one in itertools.zip_longest(texts, tools)]
            return self._continued(prompts, batch, tokens)
        if isinstance(self.task, Translation):
            translate = self.task.translator(
                self.model, batch=batch, lengths=(self.settings["longest"],)
            )
            return [{"text": text} for text in translate(self.params, texts)]
        pair = self.settings["task"] == "pair" or bool(self.settings["second"])
        if pair != bool(seconds):
            needs = "pairs; give seconds" if pair else "texts; leave seconds out"
            raise ConfigError(f"seconds: the run answers {needs}")
        longest = self.settings["longest"]
        if words:
            split = [text.split() if isinstance(text, str) else list(text) for text in texts]
            examples, starts = self.tokenizer.encode_words(split, longest=longest)
        else:
            examples = self.tokenizer.encode(texts, tuple(seconds), longest=longest)
        lengths = lengths_of([len(e["ids"]) for e in examples], longest)
        run = self._predictor(min(batch, len(examples)), lengths)
        logits = run(self.params, examples)
        if words:
            return [
                {"words": s, "tags": [self.task.names[i] for i in x[at].argmax(-1)]}
                for s, x, at in zip(split, logits, starts, strict=True)
            ]
        if isinstance(self.task, TextRegression):
            return [{"value": float(x[0])} for x in logits]
        return [
            {
                "label": self.task.classes[int(np.argmax(p))],
                "probability": dict(zip(self.task.classes, map(float, p), strict=True)),
            }
            for p in map(softmax, logits)
        ]

    @cached_property
    def _predictors(self) -> dict[tuple[int, tuple[int, ...]], Any]:
        return {}

    def _predictor(self, batch: int, lengths: tuple[int, ...]) -> Any:
        """The predictor of some sizes, compiled once."""
        key = (batch, lengths)
        if key not in self._predictors:
            self._predictors[key] = self.task.predictor(self.model, batch=batch, lengths=lengths)
        return self._predictors[key]

    @property
    def _talks(self) -> bool:
        """Whether it was taught to answer."""
        return self.settings["task"] == "instruct"

    def _prompt(self, text: Any, tools: Any) -> Any:
        """The ids that are gone on from."""
        if isinstance(text, str) and (tools or self._talks and self._has_own_template):
            text = [{"role": "user", "content": text}]
        if not isinstance(text, str):
            if tools and not self.chat.shows(list(text), tools):
                raise ConfigError("tools: the chat template shows none; leave them out")
            return self.chat.ids(list(text), tools=list(tools) if tools else None)
        around = (self.settings["prompt"] or PROMPT) if self._talks else "{}"
        return self.tokenizer.prompt(around.replace("{}", text))

    def _continued(self, prompts: Sequence[Any], batch: int, tokens: int) -> list[Answer]:
        """What follows each of the ids; those of about one length are answered together."""
        room, end = self.model.config.context, self.ends
        groups: dict[tuple[int, int], list[int]] = {}
        for place, ids in enumerate(prompts):
            new = min(tokens, room - len(ids))
            if new < 1:
                raise ConfigError(
                    f"text of {len(ids)} tokens: the model has {room} positions; shorten it"
                )
            groups.setdefault((new, lengths_of([len(ids)], room - new)[0]), []).append(place)
        found: dict[int, str] = {}
        for (new, length), places in groups.items():
            size = min(batch, len(places))
            for first in range(0, len(places), size):
                part = places[first : first + size]
                rows = [prompts[place] for place in part]
                rows += rows[-1:] * (size - len(part))  # one program for all parts
                ids, lengths = left_pad(rows, length)
                out = generate(
                    self.model, self.params, ids, new=new, temperature=0.0, end=end or None,
                    lengths=lengths,
                )  # fmt: skip
                for place, row in zip(part, np.asarray(out), strict=False):
                    stops = np.flatnonzero(np.isin(row, end))
                    said = row[: stops[0]] if len(stops) else row
                    found[place] = self.tokenizer.continuation(prompts[place], said)
        return [{"text": found[place]} for place in range(len(prompts))]

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end what a language model writes."""
        own = getattr(self.tokenizer, "separator", None)
        found = (*self.model.metadata.ends, *([] if own is None else [own]))
        if self._talks and self._has_own_template:
            found = (*self.chat.ends, *found)
        return tuple(dict.fromkeys(found))

    @property
    def _has_own_template(self) -> bool:
        """Whether the chat template is the model's own, and not of the run's `prompt`."""
        files = self.model.metadata.files
        return not self.settings.get("prompt") and own_template(files) is not None

    @cached_property
    def chat(self) -> Chat:
        """Conversations as the run was tuned by them, for `mpjax.models.stream` to go on with.

        Raises:
          ConfigError: the run is of no conversations, jinja2 is not installed, or as `Chat`.
        """
        if not isinstance(self.model, Decoder) or (not self._talks and not self._has_own_template):
            raise ConfigError(
                f"{self.folder}: a run of task {self.settings['task']!r}, without a chat template;"
                " tune it by instruct"
            )
        return run_chat(self.tokenizer, self.model.metadata, self.settings.get("prompt", ""))

    def export(
        self, folder: str | Path, *, dtype: str | None = None, vectors: bool = False
    ) -> Path:
        """Writes a folder that `transformers` loads: weights, config, labels, tokenizer.

        Args:
          folder: new, or empty.
          dtype: of the tensors, such as `bf16`; None keeps that of each weight.
          vectors: whether an encoder is written without its head, for sentence-transformers: the
            mean of a text's tokens is its vector.

        Raises:
          ConfigError: as `save_checkpoint`, or vectors of another model than an encoder.
        """
        model, params = self._without_head() if vectors else (self.model, self.params)
        metadata = self.model.metadata
        files = {
            name: content
            for name, content in metadata.files.items()
            # How sentence-transformers pools; a head or a language model has no vector of a text.
            if not any(part in name for part in ("modules.json", "Pooling", "sentence_"))
        }
        files.setdefault(TOKENIZER, self.tokenizer.to_text())
        config = dict(metadata.config)
        if SETTINGS not in files:
            files[SETTINGS] = json.dumps(self._tokenizer_config(), indent=2)
        if self._talks and not self._has_own_template:
            around = prompt_settings(self.tokenizer, self.settings["prompt"] or PROMPT)
            files = {name: x for name, x in files.items() if "chat_template" not in name}
            files[SETTINGS] = json.dumps(parse_json(files[SETTINGS], SETTINGS) | around, indent=2)
        if isinstance(self.model, Decoder) and "eos_token_id" not in config:
            config["eos_token_id"] = getattr(self.tokenizer, "separator", None)
        save_checkpoint(folder, model, params, dtype=dtype, metadata=Metadata(config, files))
        return Path(folder)

    def _without_head(self) -> tuple[Encoder, Params]:
        """The encoder alone, whose pooled output is the mean of the tokens."""
        if not isinstance(self.model, Encoder):
            raise ConfigError(
                f"vectors: a model of task {self.settings['task']!r} has none of a text; leave it"
                " out, or give the run of an encoder"
            )
        config = dataclasses.replace(self.model.config, head="none", pool="mean", labels=())
        held = self.params["encoder"].items()
        body = {name: x for name, x in held if name not in ("class", "token", "pooler")}
        return dataclasses.replace(self.model, config=config), {"encoder": body}

    def _tokenizer_config(self) -> Json:
        """What `transformers` reads beside the tokenizer.json of a new tokenizer."""
        found: Settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.model.config.context,
        }
        if isinstance(self.model, Encoder):
            names = ("pad", "cls", "sep", "mask")
            tokens = self.tokenizer.tokens(self.tokenizer.special)
            found |= {f"{n}_token": t for n, t in zip(names, tokens, strict=True)}
            # without it transformers leaves out which of two texts a token is of
            found["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
            found["unk_token"] = self.tokenizer.tokens([self.tokenizer.unknown])[0]
        return found


def load_run(
    folder: str | Path, precision: str | Precision | None = None, *, weights: str = ""
) -> Tuned:
    """Loads a run of `finetune` with its best weights, or one of `train_lm.py` with its newest.

    Args:
      folder: its `out`.
      precision: to answer in; by default the one that judged the run, or fp32.
      weights: storage of the weights, such as `int8` or `int4@32`; as they were trained by default.

    Raises:
      ConfigError: no run there, none that has been judged, or a file that is damaged.

    Example:
      See `finetune`.
    """
    folder = Path(folder).expanduser()
    if not (folder / RUN).is_file() and is_language_run(folder):
        found = load_language_run(folder, precision)
        held = quantize_weights(found.params, weights) if weights else found.params
        settings = {"task": "lm", "text": "", "second": ""} | found.config
        return Tuned(
            folder, found.model, held, found.tokenizer, Language(), settings, found.step, {}
        )
    page = RunPage.read(folder)
    where, step, scores = best_weights(folder)
    made = get_precision(precision or page.settings["eval_precision"])
    kinds: dict[str, tuple[Any, Any]] = {
        "encoder": (Encoder, EncoderConfig), "decoder": (Decoder, DecoderConfig),
        "seq2seq": (Seq2Seq, Seq2SeqConfig),
    }  # fmt: skip
    kind, config = kinds[page.family]
    files: Mapping[str, bytes] = {
        path.relative_to(folder / FILES).as_posix(): path.read_bytes()
        for path in sorted((folder / FILES).rglob("*"))
        if path.is_file()
    }
    text = (folder / TOKENIZER).read_text(encoding="utf-8")
    files = {**files, TOKENIZER: text.encode()} if files else files
    model = kind(config(**page.config), made)
    model = dataclasses.replace(model, metadata=Metadata(page.metadata, files))
    params = load_weights(where)
    params = (
        quantize_weights(params, weights) if weights else jax.tree.map(jax.numpy.asarray, params)
    )
    if page.tokenizer == "wordpiece":
        tokenizer: Any = parse_wordpiece(text, str(folder / TOKENIZER))
    else:
        tokenizer = Tokenizer.from_text(text)
    tasks: dict[str, Any] = {"regress": TextRegression, "lm": Language, "instruct": Language}
    task = page.settings["task"]
    if task == "tag":
        made_task: Any = TokenClassification(page.labels)
    elif task == "seq2seq":
        made_task = Translation(tokenizer)
    else:
        made_task = tasks[task]() if task in tasks else TextClassification(page.labels)
    return Tuned(folder, model, params, tokenizer, made_task, page.settings, step, scores)
