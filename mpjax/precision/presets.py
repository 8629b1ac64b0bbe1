"""Precisions by name, and reading one from a policy, a line of text, JSON or another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jmp

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.formats.checks import did_you_mean
from mpjax.precision.compression import Compression
from mpjax.precision.loss_scale import LossScaleSettings
from mpjax.precision.moments import MomentFormat, Moments
from mpjax.precision.policy import is_dtype_name, parse_policy, policy_text
from mpjax.precision.precision import OPTIONS, Precision, parse_options
from mpjax.precision.recipe import Recipe, get_recipe, recipe_names
from mpjax.precision.residuals import Residuals
from mpjax.precision.rule import Rule
from mpjax.typing import DTypeLike, Json, Settings

_DYNAMIC = LossScaleSettings("dynamic")
_INT8 = MomentFormat("int8")
_PRESETS: dict[str, Precision] = {}


def _base_rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules of a preset, from patterns and policies."""
    return tuple(Rule(pattern, parse_policy(text), user=False) for pattern, text in rules)


def _mixed(param: str, low: str) -> tuple[Rule, ...]:
    """Products low; softmax, norms, rotary angles, cell states, logits and loss in float32."""
    return _base_rules(
        ("**/softmax", f"p=f32,c=f32,o={low}"),
        ("**/norm*", f"p=f32,c=f32,o={low}"),
        ("**/rotary", f"p=f32,c=f32,o={low}"),
        ("**/cell/state", "f32"),
        ("**/head", f"p={param},c={low},o=f32"),
        ("**/loss", "f32"),
        ("**", f"p={param},c={low},o={low}"),
    )


def _low(param: str, low: str) -> tuple[Rule, ...]:
    """Every operation low; only the mean over tokens, which the loss scale needs, is float32."""
    return _base_rules(("**/loss", f"p=f32,c={low},o=f32"), ("**", f"p={param},c={low},o={low}"))


def _quantised_rules(recipe: Recipe) -> tuple[Rule, ...]:
    """As bf16, with the products of the blocks quantised; head, norms and attention stay high."""
    rules = _mixed("f32", "bf16")
    return (*rules[:-1], dataclasses.replace(rules[-1], recipe=recipe))


def register_preset(precision: Precision) -> None:
    """Makes a Precision available to `get_precision` and to every command line by its name.

    Args:
      precision: with a name of its own.

    Raises:
      ConfigError: no Precision, or a name that is taken or is not one word.

    Example:
      >>> import dataclasses
      >>> from mpjax.precision import get_precision
      >>> mine = get_precision("bf16", rules=["**/mlp=r=mxfp8"])
      >>> mine = dataclasses.replace(mine, name="bf16-mxfp8-mlp")
      >>> register_preset(mine)  # doctest: +SKIP
      >>> get_precision("bf16-mxfp8-mlp").recipe("decoder/mlp/up").name  # doctest: +SKIP
      'mxfp8'
    """
    if not isinstance(precision, Precision):
        raise ConfigError(
            f"preset: {brief(precision)} is no Precision; register what get_precision"
            " returns, with a name of its own"
        )
    if precision.name in _PRESETS or not precision.name or set(" =:,") & set(precision.name):
        raise ConfigError(
            f"preset: the name {precision.name!r} is taken, empty or holds one of ' =:,';"
            " choose another"
        )
    _PRESETS[precision.name] = precision


for _preset in (
    Precision("fp32", _base_rules(("**", "f32"))),
    # Mixed: Micikevicius et al. 2018; for bfloat16 Kalamkar et al. 2019 (no loss scale).
    Precision("bf16", _mixed("f32", "bf16")),
    Precision("fp16", _mixed("f32", "f16"), _DYNAMIC),
    # Low-precision: every operation low, float32 weights and update.
    Precision("low-bf16", _low("f32", "bf16")),
    Precision("low-fp16", _low("f32", "f16"), _DYNAMIC),
    # Pure: weights too are stored low and updated with rounding to nearest.
    Precision("pure-bf16", _low("bf16", "bf16"), update="nearest"),
    Precision("pure-fp16", _low("f16", "f16"), _DYNAMIC, update="nearest"),
    # Apex's optimisation levels (O1 casts inside functions, as mpjax.autocast does). O2 keeps batch
    # norms, which we read as all norms, in float32 and float32 master weights; O3 is all float16.
    Precision("O0", _base_rules(("**", "f32"))),
    Precision("O2", _mixed("f16", "f16"), _DYNAMIC, update="master"),
    Precision("O3", _low("f16", "f16"), update="nearest"),
    # Stochastic rounding: Zamirai et al. 2020, Revisiting BFloat16 Training; Kahan likewise.
    Precision("pure-bf16-sr", _low("bf16", "bf16"), update="stochastic"),
    Precision("pure-bf16-kahan", _low("bf16", "bf16"), update="kahan"),
    # Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization: embeddings stay 32-bit.
    Precision(
        "adam8bit",
        _mixed("f32", "bf16"),
        moments=Moments(_INT8, _INT8, keep=("**/embed",), user=False),
    ),
    # One for each recipe, whose source the table prints.
    *(Precision(name, _quantised_rules(get_recipe(name))) for name in recipe_names()),
):
    register_preset(_preset)


def preset_names() -> tuple[str, ...]:
    """Returns the names of all presets."""
    return tuple(_PRESETS)


def parse_rule(text: str | Rule) -> Rule:
    """Reads `PATTERN=VALUE`, split at the first `=`.

    Args:
      text: VALUE is a jmp policy, `r=RECIPE` after it or alone, or a preset's name, which stands
        for its default policy and recipe (`bf16` is `p=f32,c=bf16,o=bf16`, while jmp's `bfloat16`
        stores in bfloat16 too). A recipe alone is used under `p=f32,c=bf16,o=bf16`.

    Raises:
      ConfigError: no `=`, an empty side, or a VALUE that is none of these.

    Example:
      >>> str(parse_rule("**/norm*=fp32"))
      '**/norm*=p=f32,c=f32,o=f32'
      >>> str(parse_rule("**/mlp=r=fp8-row"))
      '**/mlp=p=f32,c=bf16,o=bf16,r=fp8-row'
    """
    if isinstance(text, Rule):
        return text
    if not isinstance(text, str):
        raise ConfigError(f"rule {brief(text)}: write PATTERN=VALUE, such as '**/norm*=fp32'")
    pattern, equals, value = text.partition("=")
    if not equals or not pattern or not value:
        raise ConfigError(f"rule {text!r}: write PATTERN=VALUE, such as **/norm*=fp32")
    policy, recipe = _read(value, f"rule {text!r}")
    return Rule(pattern, policy, recipe=recipe)


def parse_rules(rules: Sequence[str | Rule]) -> tuple[Rule, ...]:
    """Reads a list of rules.

    Raises:
      ConfigError: it is no list, or holds what is no rule.

    Example:
      >>> [str(rule) for rule in parse_rules(["**/head=fp32"])]
      ['**/head=p=f32,c=f32,o=f32']
    """
    if not isinstance(rules, list | tuple):
        shown = str(rules) if isinstance(rules, Rule) else rules
        raise ConfigError(f"rules: {brief(shown)} is no list; write rules=['**/norm*=fp32']")
    return tuple(map(parse_rule, rules))


def _read(value: str, where: str) -> tuple[jmp.Policy, Recipe | None]:
    """Policy and recipe of a rule's VALUE."""
    preset = _PRESETS.get(value)
    if preset is not None:
        return preset.rules[-1].policy, preset.rules[-1].recipe
    if "=" not in value and _is_recipe(value):
        value = f"r={value}"
    elif not set("=,") & set(value) and not is_dtype_name(value):
        known = dict.fromkeys((*_PRESETS, *recipe_names(), "float32", "bfloat16", "float16"))
        raise ConfigError(
            f"{where}: unknown {value!r}; {did_you_mean(value, known, 2)}give a preset, a recipe or"
            f" a dtype: {' '.join(known)}; or a policy such as p=f32,c=bf16,o=f32"
        )
    policy, recipe = _split_recipe(value, where)
    return parse_policy(policy or "p=f32,c=bf16,o=bf16", where), recipe


def _split_recipe(value: str, where: str) -> tuple[str, Recipe | None]:
    """The policy's text and the recipe that stands in it as `r=` or `recipe=`."""
    recipe, rest = None, []
    for part in value.split(","):
        name, _, text = part.strip().partition("=")
        if name not in ("r", "recipe"):
            rest.append(part)
        elif recipe is not None:
            raise ConfigError(f"{where}: recipe stands twice in {value!r}; keep one")
        else:
            recipe = get_recipe(text, where)
    return ",".join(rest), recipe


def _is_recipe(text: str) -> bool:
    return text in recipe_names() or text.startswith(("emulate(", "fixed-"))


def _from_policy(text: str) -> Settings:
    """A policy for every path; norms, softmax, rotary angles, cell states, loss stay float32."""
    text, recipe = _split_recipe(text, "precision")
    if not text:
        raise ConfigError(
            "precision: a recipe alone; write its name, such as fp8, or a policy before r="
        )
    policy = parse_policy(text, "precision")
    full = policy_text(policy)
    param, _, out = full.split(",")
    rules = _base_rules(
        *((f"**/{name}", f"{param},c=f32,{out}") for name in ("softmax", "norm*", "rotary")),
        *(("**/cell/state", "f32"), ("**/loss", "f32"), ("**", full)),
    )
    if recipe is None:
        return {"name": full, "rules": rules}
    head, last = Rule("**/head", policy, user=False), dataclasses.replace(rules[-1], recipe=recipe)
    return {"name": last.value, "rules": (*rules[:-1], head, last)}


def _start(word: str) -> Settings:
    preset = _PRESETS.get(word)
    if preset is None and _is_recipe(word):
        preset = Precision(word, _quantised_rules(get_recipe(word, "precision")))
    if preset is not None:
        return dict(vars(preset))
    if word == "O1":
        raise ConfigError(
            "precision: O1 casts inside functions and not by path: for any model take"
            " mpjax.autocast(fn, 'fp16') and a DynamicLossScale; for a model of mpjax, fp16 is the"
            " same, and O2 has float16 weights with float32 master copies"
        )
    try:
        return _from_policy(word)
    except ConfigError:
        if "=" in word:
            raise
        hint = did_you_mean(word.lower(), preset_names(), 2, 0.5)
        raise ConfigError(
            f"precision: unknown preset {word!r}; {hint}presets: {' '.join(preset_names())}; or a"
            " policy such as p=f32,c=bf16,o=f32"
        ) from None


def _from_dict(data: dict[str, Json]) -> Settings:
    known = {"name", "rules", *OPTIONS}
    absent: dict[str, Json] = {"compression": "none", "residuals": "none"}  # from older files
    data = absent | data
    if set(data) != known:
        odd = " ".join(sorted(set(data) ^ known))
        raise ConfigError(f"precision: JSON must have exactly {' '.join(sorted(known))}; see {odd}")
    for key in sorted(known - {"rules"}):
        if not isinstance(data[key], str):
            raise ConfigError(f"precision: JSON field {key} is {data[key]!r}; write it as a text")
    try:
        rules = tuple(
            dataclasses.replace(parse_rule(f"{p}={text}"), user=bool(user))
            for p, text, user in data["rules"]
        )
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"precision: JSON field rules is {data['rules']!r}; write [PATTERN, POLICY, true]"
            " for each"
        ) from None
    return _of_preset({"name": data["name"], "rules": rules} | parse_options(data))


def _of_preset(fields: Settings) -> Settings:
    """The fields of a whole Precision, as written by it, with the preset's moments as such."""
    preset = _PRESETS.get(fields["name"])
    if preset is not None and fields.get("moments") == preset.moments:
        fields["moments"] = preset.moments
    return fields


def _from_text(text: str) -> Settings:
    words = text.split()
    if not words:
        raise ConfigError(f"precision: empty; presets: {' '.join(preset_names())}")
    rules: list[Rule] = []
    complete = any(word.startswith("base:") for word in words[1:])
    options: dict[str, str] = {}
    for word in words[1:]:
        kind, _, rest = word.partition(":")
        key, equals, option = word.partition("=")
        if kind in ("rule", "base") and rest:
            rules.append(dataclasses.replace(parse_rule(rest), user=kind == "rule"))
        elif word == "base:":
            continue  # says that there are no preset rules
        elif key in OPTIONS and equals:
            options[key] = option
        else:
            raise ConfigError(
                f"precision: bad word {word!r}; write rule:PATTERN=VALUE or KEY=VALUE with KEY in"
                f" {' '.join(OPTIONS)}"
            )
    start = {"name": words[0], "rules": ()} if complete else _start(words[0])
    fields = start | {"rules": (*rules, *start["rules"])} | parse_options(options)
    return _of_preset(fields) if complete else fields


@explains_calls
def get_precision(
    value: str | dict[str, Json] | Precision,
    *,
    rules: Sequence[str | Rule] = (),
    loss_scale: object = None,
    update: str | None = None,
    moments: DTypeLike | Moments | None = None,
    gradient_dtype: DTypeLike | None = None,
    compression: str | Compression | None = None,
    residuals: str | Residuals | None = None,
) -> Precision:
    """Returns a Precision from a preset, a policy, a line of text, JSON or another Precision.

    Args:
      value: a preset (`bf16`), a jmp policy (`p=f32,c=bf16,o=f32`: norms, softmax, cell states
        and loss keep float32 inside; no loss scale), a line of `Precision.to_text`, JSON or a
        Precision.
      rules: `PATTERN=VALUE` in order; they come before those of `value`.
      loss_scale: `none`, `static:1024`, `dynamic:init=65536`, settings, or a loss scale.
      update: `none`, `master`, `nearest`, `stochastic` or `kahan`.
      moments: a dtype or `int8@256`, `first=FORMAT,second=FORMAT`, `keep=PATTERN`, or Moments.
      gradient_dtype: dtype of weight gradients as they are summed over replicas.
      compression: of gradients between replicas: `int8@256`, `sign`, `topk:0.01`, `powersgd:4` or
        another Compression.
      residuals: of the forward pass for the backward pass: `e4m3`, `int8@64`, `bf16` or Residuals.

    Raises:
      ConfigError: what cannot be read, with the nearest that can.

    Example:
      >>> p = get_precision("fp16", rules=["**/norm*=fp32"], loss_scale="dynamic:init=1024")
      >>> get_precision(p.to_text()) == p == get_precision(p.to_json())
      True
    """
    values = loss_scale, update, moments, gradient_dtype, compression, residuals
    options = parse_options(dict(zip(OPTIONS, values, strict=True)))
    if isinstance(value, Precision):
        fields = dict(vars(value))
    elif isinstance(value, dict):
        fields = _from_dict(value)
    elif not isinstance(value, str):
        raise ConfigError(
            f"precision: {brief(value)} is no text, JSON or Precision; write a preset, such as"
            f" bf16, of {' '.join(preset_names())}"
        )
    elif value.lstrip().startswith("{"):
        try:
            fields = _from_dict(json.loads(value))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"precision: malformed JSON: {error}; write what Precision.to_json gives"
            ) from None
    else:
        fields = _from_text(value)
    fields["rules"] = (*parse_rules(rules), *fields["rules"])
    return Precision(**(fields | options))
