"""What someone tired types into Python: wrong calls, and words that the one line must hold.

Run as a script it prints what each call did, as JSON. It is one process of its own, because the
tests' own check of annotations would stand before the code that has to refuse these.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from mpjax import formats, models, ops, tasks, train
from mpjax import optim as O
from mpjax import precision as P
from mpjax.formats.delayed import AmaxHistory

x, w, key = jnp.arange(6.0).reshape(2, 3), jnp.ones((3, 4)), jax.random.key(0)
params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
fp8 = jax.tree.map(lambda p: p.astype(jnp.float8_e4m3fn), params)
bf16, rounded = P.get_precision("bf16"), P.get_precision("pure-bf16-sr")
adam = optax.adam(1e-3)
DIMS = (((1,), (0,)), ((), ()))
IMAGE, KERNEL = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))


IDS = jnp.zeros((1, 2), jnp.int32)
SMALL: dict[str, Any] = {"layers": 1, "width": 16, "vocabulary": 50}
decoder = models.decoder("tiny", heads=2, **SMALL)
wider = models.decoder("tiny", heads=2, **(SMALL | {"width": 32}))
encoder = models.encoder("bert-tiny", heads=2, **SMALL)
recurrent = models.recurrent("tiny", **SMALL)


@functools.cache
def of(model: Any) -> Any:
    return model.init(key)


def layer(x: Any, w: Any) -> Any:
    return jax.nn.softmax(x @ w)


def opt(precision: Any = bf16, optimizer: Any = adam, **options: Any) -> Any:
    return O.wrap(optimizer, precision, **options)


def step(grads: Any = None, params: Any = params, state: Any = None, **options: Any) -> Any:
    optimizer = opt(**options)
    own = optimizer.init(params) if state is None else state
    return optimizer.step(
        jax.tree.map(jnp.ones_like, params) if grads is None else grads, own, params
    )


def value_and_grad(fn: Any, *args: Any, **options: Any) -> Any:
    return O.scaled_value_and_grad(fn, **options)(*(args or (O.DynamicLossScale(), params)))


def dot(a: Any = x, b: Any = w, dims: Any = DIMS, recipe: Any = "fp8", **options: Any) -> Any:
    return mpjax.dot_general(a, b, dims, recipe, **options)


def conv(*args: Any, **options: Any) -> Any:
    given = dict(enumerate((IMAGE, KERNEL, (1, 1), "SAME", "fp8"))) | dict(enumerate(args))
    return mpjax.conv_general_dilated(*given.values(), **options)


def operands(**options: Any) -> Any:
    pair = (P.Operand("e4m3"), P.Operand("e4m3"))
    return P.Recipe(**({"name": "mine", "fprop": pair, "dgrad": pair, "wgrad": pair} | options))


def total(p: Any) -> Any:
    return p["a"].sum()


plateau = optax.chain(adam, optax.contrib.reduce_on_plateau())

CASES: dict[str, tuple[Callable[[], Any], str]] = {
    # formats
    "Format(None)": (lambda: formats.Format(None), "format: None dtype write"),
    "Format(8)": (lambda: formats.Format(8), "format: 8 write"),
    "Format('float8_e4m3fn')": (lambda: formats.Format("float8_e4m3fn"), "did you mean e4m3"),
    "Format('E4M3')": (lambda: formats.Format("E4M3"), "'E4M3' did you mean e4m3"),
    "round_to(format=None)": (lambda: formats.round_to(x, None), "format: None"),
    "round_to(None)": (lambda: formats.round_to(None, "e4m3"), "round_to: x is None; give"),
    "round_to(tree)": (lambda: formats.round_to(params, "e4m3"), "a dict of 2 jax.tree.map"),
    "round_to(text)": (lambda: formats.round_to("x", "e4m3"), "'x' give an array"),
    "round_to(['a'])": (lambda: formats.round_to(["a"], "e4m3"), "['a'] give an array"),
    "round_to(ints)": (lambda: formats.round_to(jnp.arange(3), "e4m3"), "int32 cast"),
    "round_to(key=0)": (
        lambda: formats.round_to(x, "e4m3", "stochastic", 0), "random key is 0 jax.random.key",
    ),
    "round_to(two keys)": (
        lambda: formats.round_to(x, "e4m3", "stochastic", jax.random.split(key, 2)), "(2,) vmap",
    ),
    "round_to(float key)": (
        lambda: formats.round_to(x, "e4m3", "stochastic", x), "float32 jax.random.key",
    ),
    "round_to(old key of four)": (
        lambda: formats.round_to(x, "e4m3", "stochastic", jnp.zeros(4, jnp.uint32)), "uint32 (4,)",
    ),
    "round_to(key for rounding)": (
        lambda: formats.round_to(x, "e4m3", key), "unknown rounding known: nearest",
    ),
    "round_to(rounding=None)": (lambda: formats.round_to(x, "e4m3", None), "rounding None nearest"),
    "quantize(format=None)": (lambda: formats.quantize(x, None), "format: None"),
    "quantize(scaling=None)": (lambda: formats.quantize(x, "e4m3", None), "scaling: None tensor"),
    "quantize(scaling=128)": (lambda: formats.quantize(x, "e4m3", 128), "128 block(1x128)"),
    "quantize(axis=None)": (lambda: formats.quantize(x, "e4m3", "row", axis=None), "None -2 .. 1"),
    "quantize(axis=1.0)": (lambda: formats.quantize(x, "e4m3", "row", axis=1.0), "1.0 -2 .. 1"),
    "quantize(axis twice)": (
        lambda: formats.quantize(x, "e4m3", "row", axis=(0, -2)), "(0, -2) twice",
    ),
    "quantize(a number by row)": (
        lambda: formats.quantize(jnp.float32(3), "e4m3", "row"), "0 axes scaling=tensor",
    ),
    "quantize(key=3)": (
        lambda: formats.quantize(x, "e4m3", rounding="stochastic", key=3), "key is 3",
    ),
    "quantize(tree)": (lambda: formats.quantize(params, "e4m3"), "a dict of 2 jax.tree.map"),
    "quantize(None)": (lambda: formats.quantize(None, "e4m3"), "x is None"),
    "quantize(Quantized)": (
        lambda: formats.quantize(formats.quantize(x, "e4m3"), "e4m3"), "already dequantize()",
    ),
    "quantize(scale_rounding=True)": (
        lambda: formats.quantize(x, "e4m3", scale_rounding=True), "scale_rounding: True none",
    ),
    "fake_quantize(None)": (lambda: formats.fake_quantize(None, "e4m3"), "fake_quantize: None"),
    "dequantize('foo')": (lambda: formats.quantize(x, "e4m3").dequantize("foo"), "'foo' no dtype"),
    "Scaling('foo')": (lambda: formats.Scaling("foo"), "'foo' Scaling('tensor')"),
    "Scaling('block')": (lambda: formats.Scaling("block"), "'block' columns=0"),
    "Scaling('mx', 1, -3)": (lambda: formats.Scaling("mx", 1, -3), "-3"),
    "sqnr(None)": (lambda: formats.sqnr(None, x), "sqnr: x is None"),
    "sqnr(two shapes)": (lambda: formats.sqnr(x, x[0]), "sqnr: (2, 3) (3,)"),
    "max_error(text)": (lambda: formats.max_error(x, "a"), "max_error: q is 'a'"),
    "saturation_rate(array)": (lambda: formats.saturation_rate(x, x), "mpjax.quantize"),
    "AmaxHistory.empty('a')": (lambda: AmaxHistory.empty("a"), "'a' steps"),
    "AmaxHistory.empty(0)": (lambda: AmaxHistory.empty(0), "0 steps"),
    # products
    "dot_general(recipe=None)": (lambda: dot(recipe=None), "unknown recipe None known: fp8"),
    "dot_general(shapes)": (lambda: dot(x, x), "contracting (3,) (2,) equal"),
    "dot_general(flat dims)": (lambda: dot(dims=((1,), (0,))), "dimension_numbers= write"),
    "dot_general(dims=None)": (lambda: dot(dims=None), "dimension_numbers=None write"),
    "dot_general(axis 5)": (lambda: dot(dims=(((1,), (5,)), ((), ()))), "axes 5 right (3, 4)"),
    "dot_general(axis twice)": (lambda: dot(dims=(((1, 1), (0, 1)), ((), ()))), "left each once"),
    "dot_general(list)": (lambda: dot([["a"]]), "left operand give an array"),
    "dot_general(None)": (lambda: dot(None), "left operand is None"),
    "dot_general(key=3)": (lambda: dot(recipe="nvfp4", key=3), "dot_general: key is 3"),
    "dot_general(dtype='foo')": (lambda: dot(compute_dtype="foo"), "compute_dtype 'foo' bfloat16"),
    "dot_general(dtype=int8)": (lambda: dot(compute_dtype=jnp.int8), "compute_dtype int8 bfloat16"),
    "dot_general(result int8)": (
        lambda: dot(preferred_element_type=jnp.int8), "preferred_element_type int8",
    ),
    "dot_general(empty)": (lambda: dot(jnp.ones((0, 3))), "(0, 3) leave the product out"),
    "dot_general(amax=1)": (lambda: dot(recipe="fp8-delayed", amax=1), "amax is 1 AmaxHistory"),
    "conv(None)": (lambda: conv(None), "x is None"),
    "conv(stride 1)": (lambda: conv(IMAGE, KERNEL, 1), "conv_general_dilated: (1, 4, 4, 2)"),
    "conv(stride 0)": (lambda: conv(IMAGE, KERNEL, (0, 0)), "window_strides=(0, 0)"),
    "conv(padding)": (lambda: conv(IMAGE, KERNEL, (1, 1), "SAMEE"), "SAMEE"),
    "conv(channels)": (lambda: conv(IMAGE, jnp.ones((3, 3, 3, 5))), "(3, 3, 3, 5)"),
    "conv(NCHW)": (lambda: conv(dimension_numbers=("NCHW", "OIHW", "NCHW")), "'NCHW'"),
    "hadamard(3 signs)": (lambda: ops.hadamard(x, 0, jnp.ones(3)), "signs (3,)"),
    "hadamard(axis 5)": (lambda: ops.hadamard(x, 5, jnp.ones(2)), "axis 5 -2 .. 1"),
    "how_it_runs(platform)": (lambda: ops.how_it_runs("fp8", "gpu"), "platform: 'gpu' cuda"),
    # recipes and precisions
    "Recipe(1)": (lambda: operands(fprop=1), "'mine' fprop=1 Operand"),
    "Recipe(names)": (lambda: operands(dgrad=("e4m3", "e4m3")), "dgrad=('e4m3', 'e4m3') Operand"),
    "Recipe(hadamard=16.0)": (lambda: operands(hadamard=16.0), "hadamard=16.0 whole"),
    "Recipe(margin='a')": (lambda: operands(margin="a"), "margin='a' whole"),
    "Recipe(accumulate)": (lambda: operands(accumulate="foo"), "'foo'"),
    "Recipe(name=None)": (lambda: operands(name=None), "recipe None name"),
    "Operand(scaling)": (lambda: P.Operand("e4m3", None), "scaling: None"),
    "register_recipe('fp8')": (lambda: P.register_recipe("fp8"), "'fp8' Recipe"),
    "register_preset('x')": (lambda: P.register_preset("x"), "'x' no Precision"),
    "get_precision(None)": (lambda: P.get_precision(None), "precision: None bf16"),
    "get_precision(dtype)": (lambda: P.get_precision(jnp.bfloat16), "bfloat16 no text bf16"),
    "get_precision('BF16')": (lambda: P.get_precision("BF16"), "'BF16' did you mean bf16"),
    "get_precision(rules=text)": (
        lambda: P.get_precision("bf16", rules="**/a=fp32"), "rules: '**/a=fp32' no list",
    ),
    "get_precision(rules=None)": (lambda: P.get_precision("bf16", rules=None), "rules: None"),
    "get_precision(rules=pairs)": (
        lambda: P.get_precision("bf16", rules=[("**/a", "fp32")]), "('**/a', 'fp32') PATTERN=VALUE",
    ),
    "get_precision(moments=8)": (lambda: P.get_precision("bf16", moments=8), "moments '8'"),
    "get_precision(update=8)": (lambda: P.get_precision("bf16", update=8), "update: 8 kahan"),
    "get_precision(loss_scale=1024)": (
        lambda: P.get_precision("bf16", loss_scale=1024), "1024 static:1024",
    ),
    "Precision(rules=text)": (lambda: P.Precision("a", ("**=fp32",)), "rules= get_precision"),
    "Precision(None)": (lambda: P.Precision(None, ()), "name None"),
    "Precision(moments=None)": (lambda: P.Precision("a", (), moments=None), "moments: None"),
    "Rule(None)": (lambda: P.Rule(None, None), "pattern=None parse_rule"),
    "layout(text)": (lambda: bf16.layout("decoder/head"), "'decoder/head' ['decoder/head']"),
    "policy(None)": (lambda: bf16.policy(None), "path=None"),
    "get_schedule(None)": (lambda: P.get_schedule(None), "precision schedule: None"),
    "parse_policy(3)": (lambda: P.parse_policy(3), "dtype '3'"),
    "dtype_name('foo')": (lambda: P.dtype_name("foo"), "'foo'"),
    # weights and steps
    "store_weights(text)": (lambda: O.store_weights({"a": "s"}), "a is 's' where="),
    "store_weights(number)": (lambda: O.store_weights({"a": 1.0}), "a is 1.0 where="),
    "store_weights(where=None)": (lambda: O.store_weights(params, where=None), "where=None"),
    "store_weights(format=None)": (lambda: O.store_weights(params, None), "format: None"),
    "wrap(precision=None)": (lambda: opt(None), "precision: None bf16"),
    "wrap(None)": (lambda: opt(optimizer=None), "optimizer: None optax.adam(1e-3)"),
    "wrap(optax.adam)": (lambda: opt(optimizer=optax.adam), "function adam optax.adam(1e-3)"),
    "wrap(stacked=3)": (lambda: opt(stacked=3), "stacked: 3 stacked='**/layers'"),
    "value_and_grad(loss, params)": (
        lambda: opt().value_and_grad(total)(params, params), "loss: state opt_state, params",
    ),
    "wrap(clip='1')": (lambda: opt(clip="1"), "clip: '1' 1.0"),
    "wrap(clip=True)": (lambda: opt(clip=True), "clip: True 1.0"),
    "wrap(patience=None)": (lambda: opt(patience=None), "patience: None"),
    "wrap(seed=None)": (lambda: opt(seed=None), "seed: None whole number"),
    "wrap(seed='a')": (lambda: opt(seed="a"), "seed: 'a'"),
    "wrap(seed=key)": (lambda: opt(seed=key), "seed: key whole number"),
    "init(seed=1.5)": (lambda: opt(rounded).init(low, 1.5), "seed: 1.5"),
    "init(ints)": (lambda: opt().init({"n": jnp.arange(3)}), "n holds int32 keep it out"),
    "init(key)": (lambda: opt().init({"k": key}), "k holds key keep it out"),
    "init(complex)": (lambda: opt().init({"c": x.astype(jnp.complex64)}), "c holds complex64"),
    "init(number)": (lambda: opt().init({"a": 1.0}), "a is 1.0 asarray"),
    "init(raw fp8)": (lambda: opt("pure-bf16").init(fp8), "a holds float8_e4m3fn store_weights"),
    "step(grads missing)": (lambda: step({"a": x}), "b is in params not in gradients"),
    "step(grads=extra)": (lambda: step(params | {"c": x}), "c is in gradients not in params"),
    "step(shape)": (lambda: step(params | {"a": jnp.ones((3, 2))}), "a (3, 2) (2, 3)"),
    "step(shape that broadcasts)": (lambda: step(params | {"a": jnp.ones(3)}), "a (3,) (2, 3)"),
    "step(a gradient None)": (lambda: step(params | {"a": None}), "a is in params"),
    "step(other containers)": (
        lambda: step([(x, x)], params=[[x, x]]), "containers",
    ),
    "step(state=params)": (lambda: step(state=params), "state is a dict of 2 init"),
    "step(another optimizer's state)": (
        lambda: step(state=opt(optimizer=optax.sgd(0.1)).init(params)), "state init(params)",
    ),
    "step(another rule's state)": (
        lambda: step(params=low, state=opt(rounded).init(low), precision="pure-bf16"), "update=",
    ),
    "step(argument missing)": (lambda: step(optimizer=plateau), "value value=loss"),
    "apply_updates(None)": (lambda: O.apply_updates(params, None), "a is in params updates"),
    "quantize_moments(None)": (lambda: O.quantize_moments(None, first="int8"), "optimizer: None"),
    "quantize_moments(first=8)": (lambda: O.quantize_moments(adam, first=8), "first: '8'"),
    "quantize_moments(keep=text)": (
        lambda: O.quantize_moments(adam, first="int8", keep="**/a"), "keep='**/a' tuple",
    ),
    "quantize_moments(keep=None)": (
        lambda: O.quantize_moments(adam, first="int8", keep=None), "keep=None tuple",
    ),
    "quantize_blocks(bf16)": (lambda: O.quantize_blocks(x, "bf16", True), "bf16 int8@256"),
    "pruned(optax.adam)": (lambda: O.pruned(optax.adam, 0.5), "function adam"),
    "prune_weights(numbers)": (lambda: O.prune_weights({"a": 1.0}, 0.5), "a is 1.0"),
    "sparsity_by_path({})": (lambda: O.sparsity_by_path({}), "no weight"),
    "cubic_sparsity(end)": (lambda: O.cubic_sparsity(1, 0.5, 5, 3), "end=3 begin=5"),
    "make_schedule(None)": (lambda: O.make_schedule(None, 1e-3, 5, 0), "None linear"),
    "make_schedule(lr='a')": (lambda: O.make_schedule("linear", "a", 5, 0), "lr: 'a'"),
    "make_schedule(steps=None)": (lambda: O.make_schedule("linear", 1.0, None, 0), "steps: None"),
    # loss scales
    "DynamicLossScale(None)": (lambda: O.DynamicLossScale(None), "init=None 65536"),
    "DynamicLossScale(True)": (lambda: O.DynamicLossScale(True), "init=True"),
    "StaticLossScale(None)": (lambda: O.StaticLossScale(None), "init=None"),
    "LogMaxLossScale(None)": (lambda: O.LogMaxLossScale(None), "format: None"),
    "LeafLossScale(None)": (lambda: O.LeafLossScale(None), "groups=None ['**/embed', '**']"),
    "LeafLossScale([1])": (lambda: O.LeafLossScale([1]), "group 1"),
    "adjust(None)": (lambda: O.DynamicLossScale().adjust(None), "finite is None jnp.all"),
    "adjust(flags)": (
        lambda: O.DynamicLossScale().adjust(jnp.array([True, False])), "(2,) jnp.all(finite)",
    ),
    "adjust(numbers)": (lambda: O.StaticLossScale(8.0).adjust(jnp.float32(1)), "float32 jnp.all"),
    "adjust(grads, finite)": (lambda: O.LogMaxLossScale().adjust(params, True), "a dict of 2"),
    "MultiLossScale([8])": (lambda: O.MultiLossScale([8.0]), "8.0 DynamicLossScale()"),
    "MultiLossScale.adjust(one)": (
        lambda: O.MultiLossScale([O.NoOpLossScale()] * 2).adjust(jnp.bool_(True)), "2 scales",
    ),
    "make_loss_scale(None)": (lambda: O.make_loss_scale(None), "None none"),
    "make_loss_scale(1024.0)": (lambda: O.make_loss_scale(1024.0), "1024.0 static:1024.0"),
    "scale_gradient(None)": (lambda: O.scale_gradient(x, None), "scale is None"),
    "value_and_grad(None)": (lambda: value_and_grad(None), "loss: None not a function"),
    "value_and_grad(vector)": (lambda: value_and_grad(lambda p: p["a"]), "(2, 3) mean"),
    "value_and_grad(pair)": (lambda: value_and_grad(lambda p: (total(p), 1)), "has_aux=True"),
    "value_and_grad(no pair)": (lambda: value_and_grad(total, has_aux=True), "leave has_aux out"),
    "value_and_grad(int loss)": (
        lambda: value_and_grad(lambda p: total(p).astype(jnp.int32)), "int32 floating-point",
    ),
    "value_and_grad(no loss)": (lambda: value_and_grad(lambda p: None), "returned None"),
    "value_and_grad(swapped)": (
        lambda: value_and_grad(total, params, O.DynamicLossScale()), "no loss scale before params",
    ),
    "value_and_grad(8.0)": (lambda: value_and_grad(total, 8.0, params), "8.0 StaticLossScale"),
    "value_and_grad('dynamic')": (lambda: value_and_grad(total, "dynamic", params), "'dynamic'"),
    "value_and_grad(int params)": (
        lambda: value_and_grad(lambda p: p.sum(), O.NoOpLossScale(), jnp.arange(3)), "params int32",
    ),
    "value_and_grad(stored fp8)": (
        lambda: value_and_grad(total, O.NoOpLossScale(), O.store_weights(params)), "weight_view",
    ),
    "LeafLossScale.grad(vector)": (
        lambda: O.LeafLossScale(["**"]).grad(lambda p: (p["a"], None))(params), "(2, 3) mean",
    ),
    "value_and_grads(one scale)": (
        lambda: O.scaled_value_and_grads(lambda p: (total(p),))(O.DynamicLossScale(), params),
        "MultiLossScale",
    ),
    # models
    "decoder(float ids)": (lambda: decoder.apply(of(decoder), jnp.ones((1, 2))), "float32 (1, 2)"),
    "decoder(flat ids)": (lambda: decoder.apply(of(decoder), jnp.arange(3)), "int32 (3,) (B, T)"),
    "decoder(None)": (lambda: decoder.apply(of(decoder), None), "decoder: ids is None"),
    "decoder(an encoder's params)": (
        lambda: decoder.apply(of(encoder), IDS), "decoder: params hold encoder init",
    ),
    "encoder(float ids)": (lambda: encoder.apply(of(encoder), jnp.ones((1, 2))), "float32"),
    "decoder(segments=float)": (
        lambda: decoder.apply(of(decoder), IDS, segments=jnp.ones((1, 2))), "float32 (1, 2) integ",
    ),
    "packed_batches(a stream)": (
        lambda: mpjax.data.packed_batches(IDS[0], batch=1, length=2, seed=0), "examples list dicts",
    ),
    "encoder(params=None)": (lambda: encoder.apply(None, IDS), "encoder: params no dict"),
    "recurrent(float ids)": (
        lambda: recurrent.apply(of(recurrent), jnp.ones((1, 2))), "recurrent: float32 (B, T)",
    ),
    "generate(another model's params)": (
        lambda: models.generate(decoder, of(encoder), IDS, new=2), "decoder: missing unexpected",
    ),
    "generate(another width)": (
        lambda: models.generate(decoder, of(wider), IDS, new=2),
        "decoder: misshaped decoder/embed/table (50, 32) (50, 16)",
    ),
    # arguments by a wrong name, or of a wrong kind
    "wrap(clip_norm=1)": (lambda: opt(clip_norm=1.0), "wrap: 'clip_norm' did you mean clip? takes"),
    "wrap()": (lambda: O.wrap(), "wrap: missing 'optimizer' it takes optimizer, precision"),
    "DynamicLossScale(init_scale=8)": (
        lambda: O.DynamicLossScale(init_scale=8.0), "DynamicLossScale: did you mean init? takes",
    ),
    "generate(max_new_tokens=3)": (
        lambda: models.generate(decoder, of(decoder), IDS, max_new_tokens=3), "did you mean new?",
    ),
    "round_to(mode='floor')": (
        lambda: formats.round_to(x, "e4m3", mode="floor"), "'mode' it takes x, format, rounding",
    ),
    "round_to(saturate='no')": (
        lambda: formats.round_to(x, "e4m3", saturate="no"), "saturate='no' True or False",
    ),
    "get_precision(rules=[=fp9])": (
        lambda: P.get_precision("bf16", rules=["**/mlp=fp9"]), "'fp9' did you mean fp8 recipe",
    ),
    "decoder(layers='2')": (
        lambda: models.decoder("tiny", layers="2"), "model: layers='2' no whole number",
    ),
    "decoder(dropout=None)": (
        lambda: models.decoder("tiny", dropout=None), "model: dropout=None no number",
    ),
    "make_optimizer(['adamw'])": (lambda: O.make_optimizer(["adamw"], 1e-3), "['adamw'] known:"),
    "TextClassification('ab')": (
        lambda: tasks.TextClassification("ab"), "classes: 'ab' at least two texts",
    ),
    "objective(None)": (
        lambda: tasks.TextClassification(("a", "b")).objective(None), "the model is None encoder",
    ),
    "make_train_step(7)": (lambda: train.make_train_step(7, opt()), "loss: 7 no function"),
    "make_train_step(raw)": (
        lambda: train.make_train_step(layer, adam), "optimizer: not wrapped wrap(optax.adam",
    ),
    "init_state(raw)": (lambda: train.init_state(params, adam), "optimizer: not wrapped"),
    "init_state(seed='a')": (lambda: train.init_state(params, opt(), seed="a"), "seed: 'a'"),
    "build(an Objective)": (
        lambda: train.build(decoder, adam, objective=ops.Objective.of_model(decoder)),
        "objective: give a function task.objective",
    ),
    "parse_mesh(None)": (lambda: train.parse_mesh(None), "mesh: None no text data=2"),
    # batches
    "judge(ids beyond)": (
        lambda: models.judge(decoder, of(decoder), [{"inputs": IDS + 50, "targets": IDS}]),
        "decoder: inputs 50 0..49 tokenizer",
    ),
    "judge(negative targets)": (
        lambda: models.judge(decoder, of(decoder), [{"inputs": IDS, "targets": IDS - 1}]),
        "decoder: targets -1 0..49",
    ),
    "left_pad(a number)": (lambda: models.left_pad(5), "prompt: 5 a list of prompts [[5, 6]]"),
    "left_pad(fractions)": (lambda: models.left_pad([[1.7]]), "prompt: [1.7] integers"),
    "judge(a number)": (lambda: models.judge(decoder, of(decoder), 5), "judge: batches 5 [batch]"),
    "judge(a batch)": (
        lambda: models.judge(decoder, of(decoder), {"inputs": IDS, "targets": IDS}),
        "judge: batches [batch]",
    ),
    "compare(None)": (
        lambda: models.compare(decoder, of(decoder), None, [models.Variant()]),
        "compare: batches None [batch]",
    ),
    "input_moments(a number)": (
        lambda: models.input_moments(decoder, of(decoder), 5), "input_moments: batches 5",
    ),
    "loss(a tuple)": (
        lambda: decoder.loss(of(decoder), (IDS, IDS)), "decoder: a batch a tuple of 2 'inputs'",
    ),
    "loss(targets of fractions)": (
        lambda: decoder.loss(of(decoder), {"inputs": IDS, "targets": jnp.ones((1, 2))}),
        "decoder: targets float32 (1, 2) integers",
    ),
    "cross_entropy(targets of fractions)": (
        lambda: ops.cross_entropy(
            jnp.ones((1, 2, 3)), jnp.ones((1, 2)), lambda x: x, bf16.policy("loss"), chunk=2
        ),
        "cross_entropy: targets float32 integers",
    ),
    "cross_entropy(nothing)": (
        lambda: ops.cross_entropy(
            jnp.ones((0, 2, 3)), IDS[:0], lambda x: x, bf16.policy("loss"), chunk=2
        ),
        "cross_entropy: no targets (0, 2)",
    ),
    # transforms
    "autocast(swapped)": (lambda: mpjax.autocast("bf16", layer), "autocast: 'bf16' not a function"),
    "autocast(None)": (lambda: mpjax.autocast(layer, None), "precision: None"),
    "autocast(low=None)": (lambda: mpjax.autocast(layer, "bf16", low=None), "low=None ['exp']"),
    "autocast(low=functions)": (
        lambda: mpjax.autocast(layer, "bf16", low=[jnp.exp]), "low= ['exp']",
    ),
    "autocast(lists=None)": (lambda: mpjax.autocast(layer, "bf16", lists=None), "lists None cuda"),
    "autocast(rules=text)": (lambda: mpjax.autocast(layer, "bf16", rules="**=fp32"), "no list"),
    "autocast(array)": (lambda: mpjax.autocast(x, "bf16"), "an array of float32, shape (2, 3)"),
    "no_autocast(None)": (lambda: mpjax.no_autocast(None), "no_autocast: None not a function"),
    "monitor(sample='a')": (lambda: mpjax.monitor(layer, sample="a"), "sample='a' whole number"),
    "monitor(where=None)": (lambda: mpjax.monitor(layer, where=None), "where=None"),
    "monitor(what=None)": (lambda: mpjax.monitor(layer, what=None), "what=None weights"),
    "autocast('bf61')": (lambda: mpjax.autocast(layer, "bf61"), "bf61 did you mean bf16"),
    "autocast(a rule)": (
        lambda: mpjax.autocast(layer, "bf16", rules=["**/mlp=bf61"]), "bf61 did you mean bf16"),
    "autocast(no path)": (
        lambda: mpjax.autocast(layer, "bf16", rules=["**/mlp=fp32"])(x, w), "mpjax.named(model)"),
    "autocast(a list)": (
        lambda: mpjax.autocast(layer, "bf16", low=["dot_generl"]), "dot_general"),
    "a rule that matches nothing": (
        lambda: models.decoder("tiny", P.get_precision("bf16", rules=["**/mpl=fp32"])).init(key),
        "near misses: **/mlp"),
    "a layer too many": (
        lambda: models.decoder("tiny", P.get_precision("bf16", rules=["**/layers/9=fp32"]),
                               layers=2).init(key), "2 layers, 0 to 1"),
    "audit(platform='gpu')": (
        lambda: mpjax.audit(layer, x, w, platform="gpu"), "platform='gpu' cuda"),
    "audit of a typo": (
        lambda: mpjax.audit(lambda x: formats.round_to(x, "e4mx"), x), "e4mx"),
    "trace_nonfinite of a typo": (
        lambda: mpjax.trace_nonfinite(jax.jit(lambda x: formats.round_to(x, "e4mx")), x), "e4mx"),
    "a key missing in a gradient": (
        lambda: mpjax.audit(jax.grad(lambda w: jnp.sum(mpjax.dot_general(
            x, w, DIMS, recipe="int8"))), w), "int8 key=jax.random.key"),
}  # fmt: skip

# What looks wrong and is right: nothing of it may be refused.
RIGHT: dict[str, Callable[[], bool]] = {
    "a dtype is a format": lambda: formats.Format(jnp.bfloat16) == formats.Format("bfloat16"),
    "so in round_to": lambda: bool(
        (formats.round_to(x, jnp.float8_e4m3fn) == formats.round_to(x, "e4m3")).all()
    ),
    "numbers are arrays": lambda: formats.round_to([1.0, 0.3], "e4m3").tolist() == [1.0, 0.3125],
    "numpy too": lambda: float(formats.sqnr(np.ones(2, np.float32), [1.0, 1.0])) == np.inf,
    "old keys": lambda: (
        formats.round_to(x, "e4m3", "stochastic", jax.random.PRNGKey(0)).shape == (2, 3)
    ),
    "a key under vmap": lambda: (
        jax.vmap(lambda k: formats.round_to(x, "e4m3", "stochastic", k))(
            jax.random.split(key, 2)
        ).shape
        == (2, 2, 3)
    ),
    "axes from the end": lambda: bool((dot(dims=(((-1,), (-2,)), ((), ()))) == dot()).all()),
    "a Precision by name": lambda: opt("bf16") == opt(P.get_precision("bf16"), opt("bf16").inner),
    "fields of a Precision as texts": lambda: (
        P.Precision(
            "a", (), loss_scale="dynamic", moments="int8", gradient_dtype="bf16"
        ).loss_scale.kind
        == "dynamic"
    ),
    "a loss scale of numpy's number": lambda: float(O.DynamicLossScale(np.float32(8)).value) == 8.0,
    "of a JAX number": lambda: float(O.StaticLossScale(jnp.float32(8)).value) == 8.0,
    "by its text": lambda: float(O.make_loss_scale("static:8").scale(2.0)) == 16.0,
    "adjust(True)": lambda: float(O.DynamicLossScale(8.0).adjust(False).value) == 4.0,
    "a Python number as loss": lambda: float(value_and_grad(lambda p: 0.5)[0]) == 0.5,
    "no weights, clipped": lambda: step({}, params={}, clip=1.0)[0] == {},
    "an argument of the optimizer": lambda: (
        opt(optimizer=plateau)
        .step(params, opt(optimizer=plateau).init(params), params, value=jnp.float32(1))[0]["a"]
        .shape
        == (2, 3)
    ),
}


def outcome(call: Callable[[], Any]) -> tuple[str, str, int]:
    """The type of the error of a call, what it says, and how many tracebacks Python would print."""
    try:
        call()
    except Exception as error:
        printed = "".join(traceback.format_exception(error))
        chained = ("During handling of", "direct cause of", "The preceding stack trace")
        return (
            type(error).__name__,
            str(error),
            printed.count("Traceback (most recent") + sum(map(printed.count, chained)),
        )
    return "none", "", 0


if __name__ == "__main__":
    done = {name: outcome(call) for name, (call, _) in CASES.items()}
    right = {name: str(call()) for name, call in RIGHT.items()}
    json.dump({"wrong": done, "right": right}, sys.stdout)
