"""Names for modules that have none: paths, and a copy that is used like the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from mpjax.errors import ConfigError
from mpjax.interpret.audit.audit import assert_low_precision
from mpjax.interpret.autocast.autocast import autocast
from mpjax.interpret.core.named import named
from mpjax.interpret.core.trace import trace
from mpjax.interpret.core.walk import equations
from mpjax.interpret.monitor.monitor import monitor
from tests.interpret.models import equinox as equinox_model
from tests.interpret.models import nnx as nnx_model

pytestmark = pytest.mark.usefixtures("fast_compile")

SHAPE = {"vocabulary": 11, "width": 8, "layers": 2, "heads": 2, "context": 4}
SHALLOW = SHAPE | {"layers": 1}
IDS = jnp.asarray([[1, 5, 3, 2], [0, 9, 10, 4]], jnp.int32)
KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 4)
OF = {"nnx": nnx_model, "equinox": equinox_model}


def paths(fn: Callable[..., Any], *args: Any, name: str = "dot_general") -> list[str]:
    """The module path of each product, in the order in which they run."""
    program = trace("test", fn, args, {})
    return [s.location.path for s in equations(program.closed) if s.eqn.primitive.name == name]


def expected(layers: int, parts: dict[str, int], mlp: tuple[str, ...]) -> list[str]:
    """Paths of the models' products, written down from their attributes."""
    block = [f"attention/{part}".rstrip("/") for part, count in parts.items() for _ in range(count)]
    return [f"blocks/{i}/{p}" for i in range(layers) for p in (*block, *mlp)] + ["head"]


def bits(tree: Any) -> list[bytes]:
    arrays = [x for x in jax.tree.leaves(tree) if eqx.is_array(x)]
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays]
    data = [jax.random.key_data(x) if k else x for x, k in zip(arrays, is_key, strict=True)]
    return [np.asarray(x).tobytes() for x in data]


# Paths.


def test_every_product_has_the_path_of_its_attributes() -> None:
    weights, apply = nnx_model.functional(named(nnx_model.model(SHAPE, 0)))
    parts = {"query": 1, "key": 1, "value": 1, "": 2, "out": 1}
    assert paths(apply, weights, IDS) == expected(2, parts, ("up", "down"))
    weights, apply = equinox_model.functional(named(equinox_model.model(SHAPE, 0)))
    parts = {"query_proj": 1, "key_proj": 1, "value_proj": 1, "": 2, "output_proj": 1}
    assert paths(apply, weights, IDS) == expected(2, parts, ("mlp/layers/0", "mlp/layers/1"))


@pytest.mark.parametrize("library", OF)
def test_without_it_there_are_none(library: str) -> None:
    weights, apply = OF[library].functional(OF[library].model(SHAPE, 0))
    assert not {p for p in paths(apply, weights, IDS) if "block" in p or "attention" in p}
    hint = (
        r"matches no path .*; (it has no module paths; wrap|.*; Equinox modules have paths).*named"
    )
    with pytest.raises(ConfigError, match=hint):
        jax.make_jaxpr(autocast(apply, "bf16", rules=["**/attention=fp32"]))(weights, IDS)
    with pytest.raises(ConfigError, match=hint):
        assert_low_precision(apply, weights, IDS, allow=["**/attention"])


@pytest.mark.parametrize("library", ["equinox", "nnx"])
def test_a_model_without_names_is_told_of_them(library: str) -> None:
    """A rule, an allowed path and a monitored one that match nothing; with names they match."""
    mlp: Any = eqx.nn.MLP(4, 4, 4, 1, key=KEY)
    if library == "nnx":
        mlp = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    for call in (
        lambda model: autocast(model, "bf16", rules=["**/layers/0=fp32"])(X),
        lambda model: assert_low_precision(autocast(model, "bf16"), X, allow=["**/layers/0"]),
    ):
        with pytest.raises(ConfigError, match=r"no module paths; wrap .*mpjax\.named\(model\)"):
            call(mlp)
        call(named(mlp))
    with pytest.raises(ConfigError, match=r"where='lin_in' matches no path .*mpjax\.named"):
        monitor(lambda x: mlp(x), where="lin_in")(X)


def test_backward_and_recomputed_products_have_it_too() -> None:
    model = named(equinox_model.model(SHAPE, 0))
    weights, rest = eqx.partition(model, eqx.is_array)

    def loss(weights: Any, ids: Any) -> Any:
        return eqx.combine(weights, rest)(ids).sum()

    forward = paths(loss, weights, IDS[0])
    found = paths(jax.grad(jax.checkpoint(loss)), weights, IDS[0])
    assert set(found) == set(forward) and len(found) >= 3 * len(forward)


def test_scopes_of_ones_own_are_kept() -> None:
    model = named([eqx.nn.Linear(4, 4, key=KEY)])

    def fn(model: Any, x: Any) -> Any:
        with jax.named_scope("teacher"):
            return model[0](x)

    assert paths(fn, model, X) == ["teacher/0"]


class Twice(eqx.Module):
    """One layer held in two places, and called from within a module that does not hold it."""

    first: eqx.nn.Linear
    inner: eqx.nn.Sequential
    head: Callable[..., Any]

    def __init__(self) -> None:
        self.first = eqx.nn.Linear(4, 4, key=KEY)
        self.inner = eqx.nn.Sequential([self.first, eqx.nn.Linear(4, 4, key=KEY)])
        self.head = Head()

    def __call__(self, x: Any) -> Any:
        return self.head(self.inner(self.first(x)), self.first)


class Head(eqx.Module):
    def __call__(self, x: Any, layer: Any) -> Any:
        with jax.named_scope("tied"):
            x = layer(jnp.dot(x, x[:, None]) * x)
        return x * jnp.dot(x, x[:, None])


def test_what_is_shared_has_its_first_path_whoever_calls_it() -> None:
    assert paths(named(Twice()), X) == ["first", "first", "inner/layers/1", "head/tied", "first",
                                        "head"]  # fmt: skip
    vmapped = paths(jax.vmap(named(Twice())), X[None])
    assert vmapped == paths(named(Twice()), X)
    shared = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    two = named(nnx.List([shared, shared]))
    assert two[0] is two[1]


def test_paths_survive_jit_scan_and_remat() -> None:
    layers = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 4, 4, 1, key=key))(jax.random.split(KEY, 3))
    model = named({"layers": layers})
    arrays, rest = eqx.partition(model, eqx.is_array)

    @jax.jit
    def apply(arrays: Any, x: Any) -> Any:
        def body(x: Any, layer: Any) -> Any:
            return eqx.combine(layer, rest["layers"])(x), None

        return jax.lax.scan(jax.checkpoint(body), x, arrays["layers"])[0]

    assert paths(apply, arrays, X) == ["layers/layers/0", "layers/layers/1"]


class Coder(eqx.Module):
    """No `__call__`, and a method that JAX compiles."""

    weight: jax.Array
    activation: Callable[..., Any] = jax.nn.relu

    def encode(self, x: Any) -> Any:
        return self.decode(self.activation(self.weight @ x))

    @eqx.filter_jit
    def decode(self, x: Any) -> Any:
        return self.weight @ x

    @property
    def size(self) -> int:
        return len(self.weight)

    @staticmethod
    def zero() -> int:
        return 0


def test_methods_count_as_calls() -> None:
    model = named({"coder": Coder(jnp.eye(4)), "embed": nnx.Embed(5, 4, rngs=nnx.Rngs(0))})

    def fn(model: Any, x: Any) -> Any:
        return model["embed"].attend(model["coder"].encode(x)[None])

    assert paths(fn, model, X) == ["coder", "coder", "embed"]
    assert model["coder"].size == 4 and model["coder"].zero() == 0
    assert type(model["coder"]).__name__ == "Coder" and isinstance(model["coder"], Coder)


def test_a_call_that_fails_leaves_no_path_behind() -> None:
    model = named({"layer": eqx.nn.Linear(4, 4, key=KEY), "other": eqx.nn.Linear(4, 4, key=KEY)})
    with pytest.raises(TypeError):
        model["layer"](jnp.ones(3))
    assert paths(lambda m, x: m["other"](x), model, X) == ["other"]


# A copy that is used like the original.


@pytest.mark.parametrize("library", OF)
def test_outputs_and_gradients_are_the_same_bits(library: str) -> None:
    found = []
    for naming in (lambda model: model, named):
        weights, apply = OF[library].functional(naming(OF[library].model(SHALLOW, 0)))
        step = jax.jit(jax.value_and_grad(lambda w, apply=apply: (apply(w, IDS) ** 2).mean()))
        found.append((bits(weights), bits(step(weights)), bits(apply(weights, IDS))))
    assert found[0] == found[1] and len(set(found[0][1])) > 10


def test_training_an_equinox_copy_leaves_the_original() -> None:
    model = equinox_model.model(SHALLOW, 0)
    before, kinds = bits(model), [type(b) for b in model.blocks]
    copied, tx = named(model), optax.sgd(0.1)
    state = tx.init(eqx.filter(copied, eqx.is_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> Any:
        loss, grads = eqx.filter_value_and_grad(lambda m: (jax.vmap(m)(IDS) ** 2).mean())(model)
        updates, state = tx.update(grads, state)
        return loss, eqx.apply_updates(model, updates), state

    losses = []
    for _ in range(3):
        loss, copied, state = step(copied, state)
        losses.append(float(loss))
    assert losses[2] < losses[0] and bits(copied) != before == bits(model)
    assert [type(b) for b in model.blocks] == kinds == [equinox_model.Block]
    back = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(copied))
    assert bits(back) == bits(copied) and type(back.blocks[0]) is equinox_model.Block


class Stateful(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.norm(self.up(x)))


def test_training_an_nnx_copy_leaves_the_original() -> None:
    model = Stateful(nnx.Rngs(0))
    before = bits(nnx.state(model))
    copied = named(model)
    optimizer = nnx.Optimizer(copied, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    x = jnp.reshape(jnp.arange(12.0), (3, 4))
    first = named(model)(x)
    assert first.tobytes() == Stateful(nnx.Rngs(0))(x).tobytes(), "the same random bits"
    for _ in range(2):
        step(copied, optimizer, x)
    assert copied.dropout.rngs.count[...] == 2 and copied.norm.mean[...].any()
    assert bits(nnx.state(model)) == before != bits(nnx.state(copied))
    nnx.update(model, nnx.state(copied))
    assert bits(nnx.state(model)) == bits(nnx.state(copied)), "states fit both"


def test_a_state_of_equinox_goes_through() -> None:
    model, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
    outs = [
        jax.vmap(m, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X[None], state)
        for m in (model, named([model])[0])
    ]
    assert bits(outs[0]) == bits(outs[1])


@pytest.mark.parametrize("library", OF)
def test_the_same_names_make_the_same_structure(library: str) -> None:
    model = OF[library].model(SHAPE, 0)
    tree = jax.tree.structure(named(model))
    assert tree == jax.tree.structure(named(model)) == jax.tree.structure(named(named(model)))
    assert tree == jax.tree.structure(copy.deepcopy(named(model)))
    assert tree != jax.tree.structure(model)
    assert bits(named(model)) == bits(model)
    inner = named({"student": named(model)})
    found = paths(lambda m: m["student"](IDS if library == "nnx" else IDS[0]), inner)
    assert found[0].startswith("student/blocks/0/attention/query") and found[-1] == "student/head"


@pytest.mark.parametrize(
    "model", [[eqx.nn.LayerNorm(4), eqx.nn.Linear(4, 4, key=KEY)], Stateful(nnx.Rngs(0))]
)
def test_a_copy_is_pickled(model: Any) -> None:
    again = pickle.loads(pickle.dumps(named(model)))
    assert jax.tree.structure(again) == jax.tree.structure(named(model))
    assert bits(again) == bits(model)


@jax.tree_util.register_pytree_with_keys_class
class Own:
    """A module of bare JAX."""

    def __init__(self, weight: Any, name: str):
        self.weight, self.name = weight, name

    def tree_flatten_with_keys(self) -> Any:
        return [(jax.tree_util.GetAttrKey("weight"), self.weight)], self.name

    @classmethod
    def tree_unflatten(cls, name: str, children: Any) -> Own:
        return cls(*children, name)

    def __call__(self, x: Any) -> Any:
        return self.weight @ x


def test_a_module_of_bare_jax_is_named() -> None:
    model = named([Own(jnp.eye(4), "a"), Own(jnp.eye(4), "b")])

    def loss(model: Any, x: Any) -> Any:
        return (model[1](model[0](x)) * x).sum()

    grads = jax.grad(loss)(model, X)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    assert [m.name for m in grads] == ["a", "b"] and isinstance(grads[0], Own)
    assert paths(loss, model, X) == ["0", "1"]
    assert sorted(paths(jax.grad(loss), model, X)) == ["0", "0", "1", "1", "1"]
    assert paths(loss, pickle.loads(pickle.dumps(model)), X) == ["0", "1"]


def test_a_partial_is_gone_through() -> None:
    model = named({"run": jax.tree_util.Partial(run, eqx.nn.Linear(4, 4, key=KEY))})
    assert paths(lambda m, x: m["run"](x), model, X) == ["run/0/0"]  # of its arguments the first
    assert type(model["run"]) is jax.tree_util.Partial


def run(layer: Any, x: Any) -> Any:
    return layer(x)


# What cannot be named.


class Unregistered(nnx.Module, pytree=False):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (linen.Dense(3), "named: Dense is of Flax Linen, whose modules have paths already; use"),
        (hk.transform(lambda x: x), "named: Transformed is of Haiku, whose modules have paths"),
        (eqx.nn.MLP, "named: MLP is a class; pass an instance of it"),
        (jnp.sin, "named: .* holds no modules .*; open jax.named_scope"),
        ({"a": Unregistered()}, "named: a: Unregistered is an NNX module with pytree=False, which"),
        ({"w": jnp.ones(2)}, "named: dict holds no modules .*; open jax.named_scope"),
    ],
)
def test_what_has_no_modules_to_name_is_one_line(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        named(model)
    assert "\n" not in str(caught.value)
