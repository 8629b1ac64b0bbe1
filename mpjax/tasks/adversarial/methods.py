"""Methods of adversarial training, and their settings."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.tasks.adversarial.perturbation import check_norm, projected, steepest, unit
from mpjax.typing import Array


def _check(method: object, **least: bool) -> None:
    """Checks numbers: name -> whether 0 is allowed."""
    where = type(method).__name__
    for name, zero in least.items():
        value = getattr(method, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 <= value < math.inf and (zero or value)):
            wanted = "0 or a positive number" if zero else "a positive number"
            raise ConfigError(f"{where}: {name}={brief(value)} is not {wanted}")
    steps = getattr(method, "steps", 1)
    if not is_whole(steps, 1):
        raise ConfigError(f"{where}: steps={brief(steps)} is not a number of steps of 1 or above")


@dataclasses.dataclass(frozen=True)
class FGM:
    r"""One step along the gradient.

    $$L(x) + w\,L(x + \delta),\quad \delta = \epsilon\,g / \|g\|_2,\quad g = \nabla_x L(x)$$

    Args:
      epsilon: $\epsilon$, the norm of each example's perturbation.
      weight: $w$.

    Raises:
      ConfigError: a number that is not positive.

    References:
      Miyato et al. 2017, Adversarial Training Methods for Semi-Supervised Text Classification,
      section 3.
    """

    epsilon: float = 1.0
    weight: float = 1.0
    clean: float = dataclasses.field(default=1.0, init=False, repr=False)
    steps: int = dataclasses.field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        _check(self, epsilon=False, weight=False)

    def moved(self, offset_BTD: Array, gradient_BTD: Array) -> Array:
        """Returns the next offset; float32, as of the other methods."""
        del offset_BTD  # 0
        return self.epsilon * unit(gradient_BTD)


@dataclasses.dataclass(frozen=True)
class PGD:
    r"""Several steps, each projected onto the ball.

    $$c\,L(x) + w\,L(x + \delta_K),\quad \delta_0 = 0,\quad \delta_{k+1} = \Pi_\epsilon(\delta_k +
    \alpha\,g_k / \|g_k\|_2)$$ or, in the norm `linf`, steps of $\alpha\,\mathrm{sign}(g_k)$.

    Args:
      epsilon: $\epsilon$, the radius of the ball, per example.
      step: $\alpha$.
      steps: $K$.
      norm: `l2` or `linf`.
      weight: $w$.
      clean: $c$; 0 trains on perturbed examples alone, as the paper does.

    Raises:
      ConfigError: settings out of range.

    References:
      Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, section 2.1.
    """

    epsilon: float = 1.0
    step: float = 0.5
    steps: int = 3
    norm: str = "l2"
    weight: float = 1.0
    clean: float = 1.0

    def __post_init__(self) -> None:
        _check(self, epsilon=False, step=False, weight=False, clean=True)
        check_norm("PGD", self.norm)

    def moved(self, offset_BTD: Array, gradient_BTD: Array) -> Array:
        """See `FGM`."""
        step = self.step * steepest(gradient_BTD, self.norm)
        return projected(offset_BTD + step, self.epsilon, self.norm)


@dataclasses.dataclass(frozen=True)
class FreeLB:
    r"""The mean loss along the steps of a walk that begins at a random point.

    $$c\,L(x) + \frac{w}{K} \sum_{k<K} L(x + \delta_k),\quad \delta_{k+1} = \Pi_\epsilon(\delta_k +
    \alpha\,g_k / \|g_k\|_2)$$ with $\delta_0$ uniform in $(-\epsilon, \epsilon) / \sqrt{N}$, $N$
    being the numbers of an example's embeddings. Dropout is the same along the walk.

    Args:
      epsilon: $\epsilon$, the radius of the ball, per example.
      step: $\alpha$.
      steps: $K$.
      weight: $w$.
      clean: $c$; the paper has none.

    Raises:
      ConfigError: settings out of range.

    References:
      Zhu et al. 2020, FreeLB: Enhanced Adversarial Training for Natural Language Understanding,
      algorithm 1 and section 3.3.
    """

    epsilon: float = 1.0
    step: float = 0.5
    steps: int = 3
    weight: float = 1.0
    clean: float = 0.0

    def __post_init__(self) -> None:
        _check(self, epsilon=False, step=False, weight=False, clean=True)

    def moved(self, offset_BTD: Array, gradient_BTD: Array) -> Array:
        """See `FGM`."""
        return projected(offset_BTD + self.step * unit(gradient_BTD), self.epsilon)


@dataclasses.dataclass(frozen=True)
class SMART:
    r"""Predictions change little within a ball, and from one step to the next.

    $$L(x) + w\,\max_{\|\delta\|_\infty \le \epsilon} \ell(f(x + \delta; \theta), f(x; \theta)) +
    \mu\,\ell(f(x; \theta), f(x; \tilde\theta)),\quad \tilde\theta \leftarrow \beta \tilde\theta +
    (1 - \beta)\,\theta$$ with the symmetric divergence $\ell = \mathrm{KL}(p \| q) +
    \mathrm{KL}(q \| p)$, of numbers the squared difference. The maximum is sought from normal noise
    by $\delta \leftarrow \Pi_\epsilon(\delta + \alpha\,g / \|g\|_\infty)$. The average
    $\tilde\theta$ is kept in float32, four bytes a weight, since the last bit of a 16-bit one is
    too coarse for the steps it takes. Its predictions have the dropout of the others, so that
    equal weights are not apart.

    Args:
      epsilon: $\epsilon$, the largest change of a number of the embeddings; the paper's 1e-5 is
        lost in a 16-bit forward pass.
      noise: standard deviation of the first offset.
      step: $\alpha$.
      steps: of the ascent.
      weight: $w$.
      proximal: $\mu$; 0 leaves the last term out.
      decay: $\beta$, at least 0 and below 1.

    Raises:
      ConfigError: settings out of range.

    References:
      Jiang et al. 2020, SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language
      Models, sections 3.1 and 3.2.
    """

    epsilon: float = 1e-2
    noise: float = 1e-3
    step: float = 1e-2
    steps: int = 1
    weight: float = 1.0
    proximal: float = 1.0
    decay: float = 0.99

    def __post_init__(self) -> None:
        _check(
            self, epsilon=False, noise=False, step=False, weight=False, proximal=True, decay=True
        )
        if self.decay >= 1:
            raise ConfigError(f"SMART: decay={self.decay:g} never moves; give one below 1")

    def moved(self, offset_BTD: Array, gradient_BTD: Array) -> Array:
        """See `FGM`."""
        step = self.step * unit(gradient_BTD, "linf")
        return projected(offset_BTD + step, self.epsilon, "linf")


@dataclasses.dataclass(frozen=True)
class VAT:
    r"""Virtual adversarial training: the direction in which the prediction changes most.

    $$L(x) + w\,\mathrm{KL}(p(x) \| p(x + \epsilon d)),\quad d \leftarrow g / \|g\|_2,\quad g =
    \nabla_r\,\mathrm{KL}(p(x) \| p(x + r))|_{r = \xi d}$$ from a random direction. No gradient goes
    through $p(x)$, and no label is needed for the second term.

    Args:
      epsilon: $\epsilon$, the norm of each example's perturbation.
      xi: $\xi$, the distance at which the curvature is measured; too small a one is lost in a
        16-bit forward pass.
      steps: power iterations.
      weight: $w$.

    Raises:
      ConfigError: settings out of range.

    References:
      Miyato et al. 2018, Virtual Adversarial Training, sections 3.2 and 3.3.
    """

    epsilon: float = 1.0
    xi: float = 0.1
    steps: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self, epsilon=False, xi=False, weight=False)

    def moved(self, offset_BTD: Array, gradient_BTD: Array) -> Array:
        """See `FGM`."""
        del offset_BTD
        return self.xi * unit(gradient_BTD)


@dataclasses.dataclass(frozen=True)
class RDrop:
    r"""Two passes with dropout of their own agree.

    $$\tfrac12 (L_1 + L_2) + \tfrac{w}{2} (\mathrm{KL}(p_1 \| p_2) + \mathrm{KL}(p_2 \| p_1))$$
    The paper writes the sum of both losses, its code their mean; so does this, and a learning rate
    stays what it was.

    Args:
      weight: $w$, $\alpha$ in the paper.

    Raises:
      ConfigError: a weight that is not positive.

    References:
      Liang et al. 2021, R-Drop: Regularized Dropout for Neural Networks, section 2.1.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self, weight=False)


Ascent: TypeAlias = FGM | PGD | FreeLB  # of the task's own loss
Method: TypeAlias = Ascent | SMART | VAT | RDrop
