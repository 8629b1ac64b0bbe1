"""What a student takes from inside of a teacher: hidden states and relations of attention.

Shapes: B batch, T tokens, D width of the student, E of the teacher, R relation heads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.tasks.distill.divergence import between
from mpjax.typing import Array

Layers = tuple[tuple[int, int], ...]  # (layer of the student, layer of the teacher) pairs


def even_layers(student: int, teacher: int) -> Layers:
    r"""Returns every layer of a student with the teacher's at the same share of the depth.

    Layer $i$ of $n$ has layer $\lfloor (i + 1) m / n \rfloor - 1$ of $m$.

    Args:
      student: layers $n$.
      teacher: layers $m$, at least as many.

    Raises:
      ConfigError: the teacher has fewer.

    Example:
      >>> even_layers(2, 6)
      ((0, 2), (1, 5))

    References:
      Jiao et al. 2020, TinyBERT, section 3.1.
    """
    if teacher < student:
        raise ConfigError(
            f"distillation: the student has {student} layers, the teacher {teacher}; name the pairs"
            " with layers=((student, teacher), ...)"
        )
    return tuple((i, (i + 1) * teacher // student - 1) for i in range(student))


def check_layers(layers: object, student: int, teacher: int) -> Layers:
    """Returns pairs of layers.

    Args:
      layers: (layer of the student, layer of the teacher) pairs, counted from 0.
      student: its number of layers.
      teacher: likewise.

    Raises:
      ConfigError: no pairs of whole numbers, a layer that is not there, or one of the student
        twice.
    """
    pairs = [pair for pair in layers if isinstance(pair, tuple | list) and len(pair) == 2] if (
        isinstance(layers, tuple | list)) else []  # fmt: skip
    if not pairs or len(pairs) != len(layers):  # type: ignore[arg-type]  # a tuple or list
        raise ConfigError(
            f"distillation: layers={brief(layers)}; give (student, teacher) pairs, such as"
            " ((0, 2), (1, 5))"
        )
    for pair in pairs:
        for who, layer, count in (("student", pair[0], student), ("teacher", pair[1], teacher)):
            whole = is_whole(layer)
            if not (whole and 0 <= layer < count):
                raise ConfigError(
                    f"distillation: layer {brief(layer)} of the {who}, which has {count}; give"
                    f" 0 to {count - 1}"
                )
    if len({pair[0] for pair in pairs}) < len(pairs):
        raise ConfigError(
            f"distillation: layers={brief(layers)} name a layer of the student twice; give each one"
            " layer of the teacher"
        )
    return tuple((int(one), int(other)) for one, other in pairs)


def hidden_loss(
    student_BTD: Array, teacher_BTE: Array, projection_DE: Array, weights_BT: Array
) -> Array:
    r"""Returns the mean squared difference $\|h_s W - h_t\|^2 / E$ over tokens, float32.

    Args:
      student_BTD: hidden states $h_s$.
      teacher_BTE: hidden states $h_t$; no gradient goes to them.
      projection_DE: $W$.
      weights_BT: of the tokens; those of weight 0 count for nothing, whatever they hold.

    References:
      Romero et al. 2015, FitNets; Jiao et al. 2020, TinyBERT, equation 8.
    """
    # float32: squares of 16-bit differences overflow in float16 and lose small ones in bfloat16
    h, target = (
        jnp.where(weights_BT[..., None] != 0, x, 0).astype(jnp.float32)
        for x in (student_BTD, jax.lax.stop_gradient(teacher_BTE))
    )  # zeros at padding, whose numbers are undefined: 0 times infinity would be a gradient of NaN
    difference = h @ projection_DE.astype(jnp.float32) - target
    return weighted_mean(jnp.mean(difference**2, axis=-1), weights_BT)


def relation_loss(
    student_BTD: Array, teacher_BTE: Array, heads: int, keep_BT: Array, causal: bool
) -> Array:
    r"""Returns the mean divergence of a teacher's relations of tokens from a student's, float32.

    $$\mathrm{softmax}\Big(\frac{x x^\top}{\sqrt{d_r}}\Big)$$ of each of $R$ relation heads of $d_r$
    features, whatever the number of attention heads: two widths need have no layer between them.

    Args:
      student_BTD: queries, keys or values $x$ of all heads.
      teacher_BTE: the same of the teacher; no gradient goes to them.
      heads: relation heads R.
      keep_BT: what is no padding.
      causal: whether a token has relations to no later ones.

    References:
      Wang et al. 2021, MiniLMv2, section 3.
    """
    T = student_BTD.shape[1]
    visible = keep_BT[:, None, None, :] & jnp.ones((1, 1, T, T), bool)
    if causal:
        visible = visible & jnp.tril(jnp.ones((T, T), bool))[None, None]

    def log_relations(x: Array) -> Array:
        # float32: the softmax of 16-bit scores loses its tail
        x = jnp.where(keep_BT[..., None], x, 0).astype(jnp.float32)
        x = x.reshape(*x.shape[:2], heads, -1)
        scores = jnp.einsum("bqrd,bkrd->brqk", x, x) * jnp.float32(x.shape[-1] ** -0.5)
        return jax.nn.log_softmax(jnp.where(visible, scores, -1e30))

    log_p = log_relations(jax.lax.stop_gradient(teacher_BTE))
    each_BRT = between(log_relations(student_BTD), log_p, "forward", 0.5)
    return weighted_mean(jnp.mean(each_BRT, axis=1), keep_BT.astype(jnp.float32))


def weighted_mean(x: Array, weights: Array) -> Array:
    """Returns the mean by weights; what has weight 0 may be anything, and of none the mean is 0."""
    total = jnp.sum(jnp.where(weights != 0, weights * x, 0.0))
    return total / jnp.maximum(jnp.sum(weights), 1e-30)
