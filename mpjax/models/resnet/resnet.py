"""A residual network for images; every convolution, norm and addition has its path.

Norms are GroupNorms: every loop would have to thread the running averages of BatchNorm, whose
statistics depend on the batch, the microbatch and the shard of an image.
Shapes: N images, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import weight_view
from mpjax.formats.checks import as_array
from mpjax.models.core.checks import below, field, targets_of
from mpjax.models.core.layers import Linear
from mpjax.models.core.module import At, Layer, run_module, save_input
from mpjax.models.core.network import Network
from mpjax.models.core.sizes import FieldValue
from mpjax.models.resnet.config import ResNetConfig, resnet_config
from mpjax.precision import Precision, get_precision
from mpjax.precision.policy import CARRIED
from mpjax.typing import Array, Batch, Key, ModelState, Params

_IMAGE = ("batch", None, None, None)


class Conv(Layer):
    """x * K; the weight is normal with variance 2 gain^2 / (size^2 inputs).

    Args:
      features: channels of the result.
      size: height and width of the kernel.
      stride: of the window.
      gain: of the initial weight.
    """

    features: int
    size: int = 3
    stride: int = 1
    gain: float = 1.0

    @nn.compact
    def __call__(self, x_NHWC: Array | ops.Saved) -> Array:
        saved = x_NHWC if isinstance(x_NHWC, ops.Saved) else save_input(self, x_NHWC)
        inputs, size = saved.x.shape[-1], self.size
        init = nn.initializers.normal(self.gain * (2 / (size * size * inputs)) ** 0.5)
        axes = (None, None, "embed", "mlp")
        kernel = self.weight("kernel", init, (size, size, inputs, self.features), axes)
        # Gathered over fsdp: a sum over sharded input channels would reduce over whole images.
        kernel = self.context.shard(kernel, (None, None, None, "mlp"))
        strides = (self.stride, self.stride)
        return self.multiply(saved, kernel, functools.partial(ops.convolution, strides=strides))


class GroupNorm(Layer):
    """Normalises each image over space and groups of channels.

    Args:
      groups: of channels.
      epsilon: added to the variance.
    """

    groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x_NHWC: Array) -> Array:
        width = (x_NHWC.shape[-1],)
        scale = self.weight("scale", nn.initializers.ones, width, (None,))
        bias = self.weight("bias", nn.initializers.zeros, width, (None,))
        norm = functools.partial(
            ops.group_norm, policy=self.policy(), groups=self.groups, epsilon=self.epsilon,
            gradient_dtype=self.gradient_dtype,
        )  # fmt: skip
        return ops.from_saved(norm, (save_input(self, x_NHWC),), scale, bias)


def active(layer: Layer, config: ResNetConfig, name: str, x_NHWC: Array) -> Array:
    """Returns max(norm(x), 0) under the policies of a layer's norm and of its `activation`."""
    y = GroupNorm(layer.context, config.groups, config.epsilon, name=name)(x_NHWC)
    policy = layer.policy("activation")
    return jax.nn.relu(y.astype(policy.compute_dtype)).astype(policy.output_dtype)


class ResidualBlock(Layer):
    """x + conv2(f(conv1(f(x)))), f a norm and a ReLU; the sum is cast as `residual` says.

    Args:
      config: shape.
      features: channels of the result.
      stride: of the first convolution; where x changes its shape, a 1 x 1 convolution fits it.
    """

    config: ResNetConfig
    features: int
    stride: int

    @nn.compact
    def __call__(self, x_NHWC: Array) -> Array:
        c, policy = self.config, self.policy("residual")

        told = save_input(self, active(self, c, "norm1", x_NHWC), "conv1")
        if self.stride != 1 or x_NHWC.shape[-1] != self.features:
            fit = Conv(self.context, self.features, 1, self.stride, 0.5**0.5, name="conv_shortcut")
            x_NHWC = fit(told)
        y = Conv(self.context, self.features, stride=self.stride, name="conv1")(told)
        # The gain keeps the variance of the residual stream over the depth.
        last = Conv(self.context, self.features, gain=c.depth**-0.5, name="conv2")
        y = last(active(self, c, "norm2", y))
        total = x_NHWC.astype(policy.compute_dtype) + y.astype(policy.compute_dtype)
        return self.context.shard(total.astype(policy.output_dtype), _IMAGE)


class Stage(Layer):
    """Blocks of one width; the first may halve height and width."""

    config: ResNetConfig
    number: int

    @nn.compact
    def __call__(self, x_NHWC: Array) -> Array:
        width = self.config.widths[self.number]
        for block in range(self.config.blocks):
            stride = 2 if self.number and not block else 1
            name = f"block{block}"
            x_NHWC = ResidualBlock(self.context, self.config, width, stride, name=name)(x_NHWC)
        return x_NHWC


class Body(Layer):
    """Convolution, stages, norm, mean over space, head."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, x_NHWC: Array) -> Array:
        c = self.config
        stem = Conv(self.context, c.widths[0], stride=c.stride, gain=0.5**0.5, name="conv_stem")
        x = stem(self.context.shard(x_NHWC, _IMAGE))
        for number in range(len(c.widths)):
            x = Stage(self.context, c, number, name=f"stage{number}")(x)
        x = active(self, c, "norm", x)
        pool = self.policy("pool")
        x_NC = jnp.mean(x.astype(pool.compute_dtype), axis=(1, 2)).astype(pool.output_dtype)
        return Linear(self.context, c.classes, ("embed", None), bias=True, name="head")(x_NC)


_BATCH = "{'inputs': images (N, H, W, C), 'targets': classes (N,)}"


@dataclasses.dataclass(frozen=True)
class ResNet(Network):
    """A residual network: `init(key) -> params`, `apply(params, images) -> logits, state`.

    `resnet` makes it; see there.

    Args:
      config: shape.
      precision: the Precision that it carries.
      shard: constrains activations to logical axes; `sharded` sets it.
    """

    config: ResNetConfig
    root: ClassVar[str] = "resnet"

    def _body(self, at: At) -> Body:
        return Body(at(), self.config, name=self.root)

    def init_with_axes(self, at: At, key: Key) -> Params:
        """See `Network`."""
        image = jnp.zeros((1, 1, 1, self.config.inputs))
        return {self.root: self._body(at).init(key, image)["params"]}

    @jax.named_scope(CARRIED)
    def apply(
        self, params: Params, images: Array, *, state: ModelState = None, key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the logits (N, K) and the new state.

        Args:
          params: from `init`.
          images: (N, H, W, C) of any size, floating-point.
          state: amax histories from `init_state`, or None.
          key: of recipes that draw, needed only for training.
          train: nothing differs in training.

        Raises:
          ConfigError: images of another layout or with whole numbers.
        """
        del train
        if images.ndim != 4 or images.shape[-1] != self.config.inputs:
            raise ConfigError(
                f"images: shape {images.shape} is not (N, H, W, {self.config.inputs}); reshape"
                " them, or set inputs= to their channels"
            )
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ConfigError(
                f"images: {images.dtype.name} is not floating-point; divide by 255 in float32"
            )
        p, history = below(weight_view(params), self.root), (state or {}).get("amax")
        rngs = {"rounding": key} if key is not None and self.rounds else {}
        logits, amax = run_module(self._body(self.at), p, images, history=history, rngs=rngs)
        return logits, {"amax": amax} if amax else None

    def loss(
        self, params: Params, batch: Batch, *, state: ModelState = None, key: Key | None = None,
        train: bool = False,
    ) -> tuple[Array, ModelState]:  # fmt: skip
        """Returns the mean cross-entropy over images and the state.

        Args:
          batch: `{"inputs": images (N, H, W, C), "targets": classes (N,)}`, and `weights` (N,) if
            not all images count alike.
        """
        images = as_array(field(batch, "inputs", self.root, _BATCH), f"{self.root}: images")
        weights, targets = batch.get("weights"), targets_of(batch, images.shape[:1], self.root)
        logits, state = self.apply(params, images, state=state, key=key, train=train)
        loss = ops.cross_entropy(
            logits[:, None], targets[:, None], lambda x: x,
            self.precision.policy(f"{self.root}/loss"), chunk=1,
            weights_BT=None if weights is None else weights[:, None],
        )  # fmt: skip
        return loss, state


def resnet(
    size: str | ResNetConfig, precision: str | Precision = "fp32", **changes: FieldValue
) -> ResNet:
    """Returns a residual network that carries its Precision.

    A rule on `**/conv*` decides all convolutions. With the preset fp32 and the rule
    `**/conv*=p=f32,c=bf16,o=f32` each is X32 * K16 -> Y32: its operands are rounded to bfloat16,
    its result, and all between convolutions, is float32. The preset bf16 is X16 * K16 -> Y16.

    Args:
      size: `tiny small cifar20` or a ResNetConfig.
      precision: anything that `get_precision` reads.
      changes: fields of ResNetConfig.

    Raises:
      ConfigError: unknown size or field, a path that no rule covers, a rule that matches nothing.

    Example:
      >>> model = resnet("tiny", "fp32 rule:**/conv*=p=f32,c=bf16,o=f32", widths=(4, 8))
      >>> params = model.init(jax.random.key(0))
      >>> model.apply(params, jnp.ones((2, 8, 8, 1)))[0].shape
      (2, 10)

    References:
      He et al. 2016, Identity Mappings in Deep Residual Networks; Wu and He 2018, Group
      Normalization.
    """
    return ResNet(resnet_config(size, **changes), get_precision(precision))
