"""Models of other people, as they are published: where each comes from, and a small loss of it.

Nothing of them is copied here. The examples of Flax, Haiku, Equinox and diffrax are read at run
time from a folder that holds their repositories: FOLDER/flax/examples, FOLDER/haiku/examples,
FOLDER/equinox/docs/examples, FOLDER/diffrax/docs/examples. What they import beside a model (data
sets, plots, other frameworks) is replaced by empty modules.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

_ABSENT = frozenset(
    "tensorflow tensorflow_datasets ml_collections clu torch torchvision datasets imageio"
    " tensorboard dm_env examples sentencepiece tensorflow_text".split()
)
KEY = jax.random.key(0)
# The commits of the examples that the page was measured with.
COMMITS = {
    "flax": "18f8f311", "equinox": "9336d820", "diffrax": "5ea5fcb0", "haiku": "30b2cb5c"
}  # fmt: skip


class Built(NamedTuple):
    """A model at work.

    Args:
      loss: of weights and batch, a number.
      weights: a tree of arrays.
      batch: another.
    """

    loss: Callable[[Any, Any], Any]
    weights: Any
    batch: Any


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an empty module, in which every name is there, for what is beside the models."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] not in _ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__spec__, module.__path__ = spec, []
        return module

    def exec_module(self, module: Any) -> None:
        pass


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    before, finder = set(sys.modules), _Empty()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in _ABSENT:
                del sys.modules[name]


def load(path: Path) -> Any:
    """Returns an example as a module; of a notebook its imports, classes and functions."""
    name = "third_party_" + "_".join(path.with_suffix("").parts[-3:])
    with _without_data():
        if path.suffix == ".py":
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module
        module = types.ModuleType(name)
        sys.modules[name] = module
        cells = (c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
        for text in ("".join(cell["source"]) for cell in cells):
            if text.lstrip().startswith(("%", "!")):
                continue
            kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
            body: list[ast.stmt] = [node for node in ast.parse(text).body if isinstance(node, kept)]
            # Annotations stay texts: some name what newer versions of a library do not have.
            flags = __future__.annotations.compiler_flag
            code = compile(ast.Module(body, []), str(path), "exec", flags, dont_inherit=True)
            exec(code, module.__dict__)
    return module


def _ids(*shape: int, below: int = 16) -> Any:
    return jnp.asarray(np.random.default_rng(0).integers(1, below, shape), jnp.int32)


def _normal(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def _squared(found: Any) -> Any:
    """A squared error against fixed random targets, over all outputs that are real."""
    leaves = [x for x in jax.tree.leaves(found) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(jnp.mean(jnp.square(x - _normal(*x.shape).astype(x.dtype))) for x in leaves)


def _crossed(logits: Any) -> Any:
    labels = _ids(*logits.shape[:-1], below=logits.shape[-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen(model: Any, *inputs: Any, judge: Any = _squared, **options: Any) -> Built:
    """A Flax Linen module; its statistics are updated and dropped, dropout has a fixed key."""
    keys = {"params": KEY, "dropout": jax.random.key(1), "lstm": jax.random.key(2)}
    variables = dict(jax.jit(lambda: model.init(keys, *inputs, **options))())
    weights = variables.pop("params")

    def loss(weights: Any, batch: Any) -> Any:
        rngs = {name: key for name, key in keys.items() if name != "params"}
        found, _ = model.apply(
            {"params": weights, **variables}, *batch, rngs=rngs, mutable=[*variables], **options
        )
        return judge(found)

    return Built(loss, weights, inputs)


def equinox(
    model: Any, call: Callable[[Any, Any], Any], batch: Any, judge: Any = _squared
) -> Built:
    """An Equinox module, and how it is called."""
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    return Built(lambda w, b: judge(call(eqx.combine(w, rest), b)), weights, batch)


def haiku(fn: Callable[..., Any], *inputs: Any, judge: Any = _squared) -> Built:
    """A function of Haiku modules."""
    pair = hk.transform_with_state(fn)
    weights, state = jax.jit(pair.init)(KEY, *inputs)
    return Built(lambda w, b: judge(pair.apply(w, state, KEY, *b)[0]), weights, inputs)


def _mnist(at: Path) -> Built:
    model = load(at / "flax/examples/mnist/train.py").CNN(nnx.Rngs(0))
    graph, weights, *rest = nnx.split(model, nnx.Param, ...)

    def loss(weights: Any, batch: Any) -> Any:
        return _crossed(nnx.merge(graph, weights, *rest, copy=True)(batch, nnx.Rngs(1)))

    return Built(loss, weights, _normal(2, 28, 28, 1))


_TINY = dict(emb_dim=16, num_heads=2, num_layers=1, qkv_dim=16, mlp_dim=32, max_len=8)


def _text(at: Path, which: str) -> Any:
    module = load(at / f"flax/examples/{which}/models.py")
    return module, module.TransformerConfig(vocab_size=16, output_vocab_size=16, **_TINY)


def _lm1b(at: Path) -> Built:
    module, config = _text(at, "lm1b")
    return linen(module.TransformerLM(config), _ids(2, 8), judge=_crossed)


def _wmt(at: Path) -> Built:
    module, config = _text(at, "wmt")
    return linen(module.Transformer(config), _ids(2, 8), _ids(2, 8), judge=_crossed)


def _nlp_seq(at: Path) -> Built:
    module, config = _text(at, "nlp_seq")
    model, ids, keys = module.Transformer(config), _ids(2, 8), {"dropout": KEY}
    weights = jax.jit(lambda: model.init(KEY, inputs=ids, train=False))()["params"]

    def loss(weights: Any, ids: Any) -> Any:
        return _crossed(model.apply({"params": weights}, inputs=ids, train=True, rngs=keys))

    return Built(loss, weights, ids)


def _resnet(at: Path) -> Built:
    module = load(at / "flax/examples/imagenet/models.py")
    model = module.ResNet([1, 1], module.ResNetBlock, num_classes=10, num_filters=8)
    # As it is used after training: in training it needs the axis of a pmap over devices.
    return linen(model, _normal(4, 16, 16, 3), judge=_crossed, train=False)


def _seq2seq(at: Path) -> Built:
    model = load(at / "flax/examples/seq2seq/models.py").Seq2seq(True, 16, 16)
    one_hot = jax.nn.one_hot(_ids(2, 6), 16)
    return linen(model, one_hot, one_hot)


def _sst2(at: Path) -> Built:
    module = load(at / "flax/examples/sst2/models.py")
    model = module.TextClassifier(16, 16, 20, 2, 0.1, 0.1, deterministic=False)
    return linen(model, _ids(2, 8), jnp.array([5, 8]), judge=_crossed)


def _flax_vae(at: Path) -> Built:
    model = load(at / "flax/examples/vae/models.py").VAE(latents=8)
    weights = jax.jit(lambda: model.init(KEY, _normal(2, 784), KEY))()["params"]
    return Built(
        lambda w, x: _squared(model.apply({"params": w}, x, jax.random.key(1))),
        weights,
        _normal(2, 784),
    )


def _ppo(at: Path) -> Built:
    model = load(at / "flax/examples/ppo/models.py").ActorCritic(num_outputs=4)
    return linen(model, _normal(1, 84, 84, 4))


def _graphs(at: Path, which: str) -> Built:
    import jraph

    n = jnp.array
    graphs = jraph.GraphsTuple(
        n_node=n([3, 4]), n_edge=n([4, 5]), nodes=_normal(7, 9), edges=_normal(9, 3),
        globals=jnp.zeros((2, 4)), senders=n([0, 1, 2, 0, 3, 4, 5, 6, 3]),
        receivers=n([1, 2, 0, 2, 4, 5, 6, 3, 5]),
    )  # fmt: skip
    module = load(at / "flax/examples/ogbg_molpcba/models.py")
    model = getattr(module, which)(16, 1, 2, 4, dropout_rate=0.1, deterministic=False)
    return linen(model, graphs, judge=lambda found: _squared(found.globals))


def _vit(at: Path) -> Built:
    module = load(at / "equinox/docs/examples/vision_transformer.ipynb")
    module.channels = 3  # the notebook's own, of CIFAR
    model = module.VisionTransformer(16, 32, 2, 1, 0.1, 4, 16, 10, KEY)

    def call(model: Any, x: Any) -> Any:
        return jax.vmap(model, (0, None, 0))(x, True, jax.random.split(KEY, len(x)))

    return equinox(model, call, _normal(2, 3, 16, 16), _crossed)


def _unet(at: Path) -> Built:
    module = load(at / "equinox/docs/examples/unet.ipynb")
    model = module.UNet((1, 8, 8), True, [1, 2], 8, 2, 4, 0.1, 2, [4], key=KEY)

    def call(model: Any, batch: Any) -> Any:
        return jax.vmap(lambda t, y: model(t, y, key=KEY))(*batch)

    return equinox(model, call, (jnp.array([0.1, 0.7]), _normal(2, 1, 8, 8)))


def _bert(at: Path) -> Built:
    module = load(at / "equinox/docs/examples/bert.ipynb")
    config = {
        "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "hidden_act": "gelu", "intermediate_size": 32, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 8, "type_vocab_size": 2,
    }  # fmt: skip
    model = module.BertClassifier(config, 2, KEY)

    def call(model: Any, ids: Any) -> Any:
        one = {"token_ids": ids, "segment_ids": jnp.zeros_like(ids)}
        keys = jax.random.split(KEY, len(ids))
        return jax.vmap(lambda inputs, key: model(inputs, True, key))(one, keys)

    return equinox(model, call, _ids(2, 8), _crossed)


def _mixer(at: Path) -> Built:
    module = load(at / "equinox/docs/examples/score_based_diffusion.ipynb")
    model = module.Mixer2d((1, 8, 8), 4, 16, 16, 16, 2, 1.0, key=KEY)
    batch = (jnp.array([0.2, 0.5]), _normal(2, 1, 8, 8))
    return equinox(model, lambda model, batch: jax.vmap(model)(*batch), batch)


def _eqx_rnn(at: Path) -> Built:
    model = load(at / "equinox/docs/examples/train_rnn.ipynb").RNN(2, 1, 16, key=KEY)
    return equinox(model, lambda model, x: jax.vmap(model)(x), _normal(2, 8, 2))


def _eqx_cnn(at: Path) -> Built:
    model = load(at / "equinox/docs/examples/mnist.ipynb").CNN(KEY)
    return equinox(model, lambda model, x: jax.vmap(model)(x), _normal(2, 1, 28, 28))


def _hk_transformer(at: Path) -> Built:
    module = load(at / "haiku/examples/transformer/model.py")

    def fn(h: Any) -> Any:
        return module.Transformer(2, 1, 0.1)(h, jnp.ones(h.shape[:2]), True)

    return haiku(fn, _normal(2, 8, 128))  # two heads of 64


def _hk_vae(at: Path) -> Built:
    module = load(at / "haiku/examples/vae.py")
    shape = (28, 28, 1)

    def fn(x: Any) -> Any:
        found = module.VariationalAutoEncoder(32, 8, shape)(x)
        return found.logits, found.mean, found.stddev

    return haiku(fn, _normal(2, *shape))


def _hk_mnist(at: Path) -> Built:
    module = load(at / "haiku/examples/mnist.py")
    return haiku(
        lambda x: module.net_fn({"image": x * 255.0}), _normal(2, 28, 28, 1), judge=_crossed
    )


def _hk_resnet(at: Path) -> Built:
    def fn(x: Any) -> Any:
        widths: dict[str, Any] = dict(channels_per_group=(8, 8, 16, 16), bottleneck=False)
        net = hk.nets.ResNet((1, 1, 1, 1), 10, resnet_v2=True, **widths)
        return net(x, is_training=True)

    return haiku(fn, _normal(4, 32, 32, 3), judge=_crossed)


def _hk_rnn(at: Path) -> Built:
    def fn(x: Any) -> Any:
        core = hk.DeepRNN([hk.LSTM(16), jax.nn.relu, hk.GRU(16), hk.nets.MLP([16, 8])])
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    return haiku(fn, _normal(5, 2, 8))


_TIMES = jnp.linspace(0.0, 1.0, 5)


def _neural_ode(at: Path) -> Built:
    model = load(at / "diffrax/docs/examples/neural_ode.ipynb").NeuralODE(2, 16, 2, key=KEY)
    return equinox(model, lambda m, y: jax.vmap(m, (None, 0))(_TIMES, y), _normal(2, 2))


def _latent_ode(at: Path) -> Built:
    make = load(at / "diffrax/docs/examples/latent_ode.ipynb").LatentODE
    model = make(data_size=2, hidden_size=8, latent_size=4, width_size=8, depth=1, key=KEY)

    def call(model: Any, ys: Any) -> Any:
        return jax.vmap(lambda y: model.train(_TIMES, y, key=KEY))(ys)

    return equinox(model, call, _normal(2, 5, 2), lambda x: x.mean() / 10)


def _neural_cde(at: Path) -> Built:
    import diffrax

    model = load(at / "diffrax/docs/examples/neural_cde.ipynb").NeuralCDE(3, 8, 16, 1, key=KEY)
    path = jnp.concatenate([jnp.tile(_TIMES[:, None], (2, 1, 1)), _normal(2, 5, 2)], -1)
    path = path.at[1].set(path[0][:, ::-1].at[:, 0].set(_TIMES))
    coefficients = jax.vmap(diffrax.backward_hermite_coefficients, (None, 0))(_TIMES, path)
    return equinox(model, lambda m, c: jax.vmap(m, (None, 0))(_TIMES, c), coefficients)


def _flow(at: Path) -> Built:
    make = load(at / "diffrax/docs/examples/continuous_normalising_flow.ipynb").CNF
    model = make(data_size=2, exact_logp=True, num_blocks=1, width_size=8, depth=1, key=KEY)
    return equinox(model, lambda m, y: jax.vmap(lambda y: m.train(y, key=KEY))(y), _normal(2, 2))


def _equilibrium(at: Path) -> Built:
    import optimistix

    model = eqx.nn.MLP(8, 8, 16, 1, key=KEY)

    def call(model: Any, x: Any) -> Any:
        def residual(z: Any, x: Any) -> Any:
            return z - jnp.tanh(0.3 * model(z) + x)

        solver: optimistix.Newton[Any, Any, Any] = optimistix.Newton(1e-3, 1e-3)
        root = lambda x: optimistix.root_find(residual, solver, x, args=x, throw=False).value  # noqa: E731
        return jax.vmap(root)(x)

    return equinox(model, call, _normal(2, 8))


def _least_squares(at: Path) -> Built:
    import optimistix

    model = eqx.nn.MLP(4, 6, 16, 1, key=KEY)

    def call(model: Any, x: Any) -> Any:
        solver: optimistix.GaussNewton[Any, Any, Any] = optimistix.GaussNewton(1e-3, 1e-3)

        def one(x: Any) -> Any:
            wanted = jnp.concatenate([x, x[:2]])
            found: optimistix.Solution[Any, Any] = optimistix.least_squares(
                lambda z, _: jnp.concatenate([z, z[:2]]) + 0.2 * model(z) - wanted, solver, x,
                throw=False, max_steps=8,
            )  # fmt: skip
            return found.value

        return jax.vmap(one)(x)

    return equinox(model, call, _normal(2, 4))


_SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


def _hf(kind: str, module: str, config: str, *inputs: Any, **options: Any) -> Built:
    import importlib

    place = f"transformers.models.{kind}"
    settings = getattr(importlib.import_module(f"{place}.configuration_{kind}"), config)(**options)
    made = getattr(importlib.import_module(f"{place}.modeling_flax_{kind}"), module)(settings)
    return linen(made, *inputs, judge=lambda found: _squared(found[0]))


def _hf_bert(at: Path) -> Built:
    ids, zeros = _ids(2, 8), jnp.zeros((2, 8), jnp.int32)
    where = jnp.tile(jnp.arange(8), (2, 1))
    given = (ids, zeros + 1, zeros, where, None)
    return _hf("bert", "FlaxBertForMaskedLMModule", "BertConfig", *given, vocab_size=16, **_SMALL)


def _hf_roberta(at: Path) -> Built:
    ids, zeros = _ids(2, 8), jnp.zeros((2, 8), jnp.int32)
    where = jnp.tile(jnp.arange(2, 10), (2, 1))
    given = (ids, zeros + 1, zeros, where, None)
    name = "FlaxRobertaForMaskedLMModule"
    return _hf("roberta", name, "RobertaConfig", *given, vocab_size=16, **_SMALL)


def _hf_gpt2(at: Path) -> Built:
    ids = _ids(2, 8)
    given = (ids, jnp.ones_like(ids), jnp.tile(jnp.arange(8), (2, 1)))
    sizes = dict(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    return _hf("gpt2", "FlaxGPT2LMHeadModule", "GPT2Config", *given, **sizes)


def _hf_vit(at: Path) -> Built:
    sizes = _SMALL | dict(image_size=16, patch_size=4)
    return _hf("vit", "FlaxViTModule", "ViTConfig", _normal(2, 16, 16, 3), **sizes)


def _spline_flow(at: Path) -> Built:
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow

    flow = masked_autoregressive_flow(
        KEY, base_dist=Normal(jnp.zeros(3)), flow_layers=1, nn_width=16
    )
    import paramax

    return equinox(flow, lambda f, x: paramax.unwrap(f).log_prob(x), _normal(4, 3))


class Decoder(NamedTuple):
    """A model of others.

    Args:
      name: in the table.
      package: whose version the table names.
      source: repository of the example; empty for a model of the package itself.
      build: makes it, given the folder of the repositories.
    """

    name: str
    package: str
    source: str
    build: Callable[[Path], Built]


def _of(package: str, source: str, **builds: Callable[[Path], Built]) -> list[Decoder]:
    return [Decoder(name.replace("_", " "), package, source, make) for name, make in builds.items()]


MODELS = [
    *_of(
        "flax", "flax", mnist_CNN=_mnist, imagenet_ResNet=_resnet, lm1b_TransformerLM=_lm1b,
        wmt_Transformer=_wmt, nlp_seq_Transformer=_nlp_seq, seq2seq_LSTM=_seq2seq,
        sst2_TextClassifier=_sst2, VAE=_flax_vae, PPO_ActorCritic=_ppo,
        molecules_GraphNet=lambda at: _graphs(at, "GraphNet"),
        molecules_GraphConvNet=lambda at: _graphs(at, "GraphConvNet"),
    ),
    *_of(
        "equinox", "equinox", vision_transformer=_vit, UNet=_unet, BERT_classifier=_bert,
        score_MLP_mixer=_mixer, GRU_classifier=_eqx_rnn, CNN=_eqx_cnn,
    ),
    *_of(
        "dm-haiku", "haiku", example_Transformer=_hk_transformer, example_VAE=_hk_vae,
        example_MNIST=_hk_mnist,
    ),
    *_of("dm-haiku", "", nets_ResNet_V2=_hk_resnet, LSTM_GRU_MLP=_hk_rnn),
    *_of(
        "diffrax", "diffrax", neural_ODE=_neural_ode, latent_ODE=_latent_ode,
        neural_CDE=_neural_cde, normalising_flow=_flow,
    ),
    *_of("optimistix", "", equilibrium_by_Newton=_equilibrium, least_squares=_least_squares),
    *_of(
        "transformers", "", FlaxBert=_hf_bert, FlaxRoberta=_hf_roberta, FlaxGPT2=_hf_gpt2,
        FlaxViT=_hf_vit,
    ),
    *_of("flowjax", "", masked_autoregressive_flow=_spline_flow),
]  # fmt: skip
