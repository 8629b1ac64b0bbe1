"""Reading a Precision: from a preset, a policy, a line of text, JSON or another Precision."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jmp

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.precision.moments import Moments
from mpjax.precision.policy import parse_policy, policy_text
from mpjax.precision.precision import OPTIONS, Precision, parse_options
from mpjax.precision.presets import base_rules, find_preset, preset_names, quantised_rules
from mpjax.precision.recipe import Recipe
from mpjax.precision.recipe_presets import get_recipe, recipe_names
from mpjax.precision.rule import Rule
from mpjax.typing import DTypeLike, Json, Settings


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
    preset = find_preset(value)
    if preset is not None:
        return preset.rules[-1].policy, preset.rules[-1].recipe
    if "=" not in value and _is_recipe(value):
        value = f"r={value}"
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
    rules = base_rules(
        *((f"**/{name}", f"{param},c=f32,{out}") for name in ("softmax", "norm*", "rotary")),
        *(("**/cell/state", "f32"), ("**/loss", "f32"), ("**", full)),
    )
    if recipe is None:
        return {"name": full, "rules": rules}
    head, last = Rule("**/head", policy, user=False), dataclasses.replace(rules[-1], recipe=recipe)
    return {"name": last.value, "rules": (*rules[:-1], head, last)}


def _start(word: str) -> Settings:
    preset = find_preset(word)
    if preset is None and _is_recipe(word):
        preset = Precision(word, quantised_rules(get_recipe(word, "precision")))
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
    preset = find_preset(fields["name"])
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


def get_precision(
    value: str | dict[str, Json] | Precision,
    *,
    rules: Sequence[str | Rule] = (),
    loss_scale: object = None,
    update: str | None = None,
    moments: DTypeLike | Moments | None = None,
    gradient_dtype: DTypeLike | None = None,
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

    Raises:
      ConfigError: what cannot be read, with the nearest that can.

    Example:
      >>> p = get_precision("fp16", rules=["**/norm*=fp32"], loss_scale="dynamic:init=1024")
      >>> get_precision(p.to_text()) == p == get_precision(p.to_json())
      True
    """
    values = loss_scale, update, moments, gradient_dtype
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
