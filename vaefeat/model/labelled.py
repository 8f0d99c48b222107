"""Generative models of rows and their classes, which learn from rows with a label and from rows without.

Each has a classifier q(y|x) inside. A row with a label is worth a bound L(x, y) on log p(x, y); of a row without, every
class is tried, in one batched pass, and the bounds are weighed with the classifier's own opinion:

    U(x) = sum_y q(y|x) (L(x, y) - log q(y|x)) <= log sum_y exp L(x, y), a bound on log p(x).

Classes are logits throughout, never probabilities, and log p(y) and the KL divergence are part of both bounds.

B batch, F width of a hidden layer, K classes, L latents, A auxiliary latents, S samples. "..." is nothing for rows with
one class each, y (B, K), and K for rows with all classes, y (K, 1, K): what does not depend on y is computed once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence
from torch.nn import functional

from vaefeat.config import ModelConfig
from vaefeat.model.augmentation import augment
from vaefeat.model.likelihoods import LIKELIHOODS, refuse_rows
from vaefeat.model.networks import build_networks, build_outputs, hidden_layer
from vaefeat.model.posteriors import DiagonalGaussian
from vaefeat.model.preprocessing import Preprocessing
from vaefeat.model.vae import VAE, likelihood_name

__all__ = ["ADGM", "LABELLED_MODELS", "M1M2", "M2", "SDGM", "LabelledVAE", "Look", "Terms"]

#: The place of y among the inputs of whatever is conditional on it.
_CLASS = 1
#: Draws of the auxiliary variable over which a prediction is averaged.
_PREDICTION_SAMPLES = 16


class Look(NamedTuple):
    """What is seen of rows before a class is assumed.

    Attributes
    ----------
    logits_BK : Tensor
        log q(y|x), or log q(y|a, x), up to a constant of each row.
    h_BF : Tensor
        The encoder's hidden layer.
    a_BA : Tensor
        A draw of q(a|x); of width 0 in models without auxiliary variable.
    log_q_a_B : Tensor
        Its log-density, in nats.
    """

    logits_BK: Tensor
    h_BF: Tensor
    a_BA: Tensor
    log_q_a_B: Tensor


class Terms(NamedTuple):
    """What rows are worth, in nats per row.

    Attributes
    ----------
    bound : Tensor of shape (B,)
        L(x, y) of rows with a label, U(x) of others.
    log_q : Tensor of shape (B, K)
        log q(y|x), normalised.
    """

    bound: Tensor
    log_q: Tensor


class LabelledVAE(nn.Module, ABC):
    """p(x, y) through latents z, and q(y|x).

    Parameters
    ----------
    config : ModelConfig
        Of networks and likelihood; latents are Gaussian with a standard normal prior.
    row_shape : tuple of int
        (F,) or (C, H, W).
    log_prior_K : Tensor
        log p(y).
    auxiliary_dim : int
        A, for the models that have an auxiliary variable.
    preprocessing : Preprocessing, optional
        Fitted scaling; one that changes nothing when None.

    References
    ----------
    Kingma, Rezende, Mohamed and Welling 2014, Semi-Supervised Learning with Deep Generative Models, arXiv:1406.5298,
    equations 6 to 9.
    """

    #: Whether p(x|...) sees the auxiliary variable.
    decodes_auxiliary: ClassVar[bool] = False
    log_prior_K: Tensor

    def __init__(
        self,
        config: ModelConfig,
        row_shape: tuple[int, ...],
        *,
        log_prior_K: Tensor,
        auxiliary_dim: int = 0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.config, self.row_shape = config, row_shape
        self.n_classes, self.auxiliary_dim = len(log_prior_K), auxiliary_dim
        self.register_buffer("log_prior_K", log_prior_K.float())
        self.likelihood = LIKELIHOODS[likelihood_name(config, row_shape)](config)
        self.preprocessing = preprocessing or Preprocessing.identity(row_shape, self.likelihood.scaling)
        # Fully connected whatever the classifier is: the decoder runs for each row and class, where convolutions take
        # ten times as long, and an encoder need not see more than it can say.
        self.encoder, _ = build_networks(replace(config, network="mlp"), row_shape, n_parameters=1)
        decoded = (config.latent_dim, self.n_classes, auxiliary_dim * self.decodes_auxiliary)
        self.decoded = JoinedLayer(config, decoded, one_hot=_CLASS)
        self.decoder = build_outputs(config, row_shape, n_parameters=self.likelihood.n_parameters)
        # Of its own: what tells classes apart is not what reconstructs, and few labels are a weak hold.
        self.classifier, _ = build_networks(config, row_shape, n_parameters=1)
        self.latents = ConditionalGaussian(
            config, (self.encoder.hidden_dim, self.n_classes, auxiliary_dim), config.latent_dim
        )

    @classmethod
    def for_rows(cls, config: ModelConfig, rows: NDArray[Any], *, log_prior_K: Tensor, auxiliary_dim: int = 0) -> Self:
        """Build an untrained model for training rows (n, F) or (n, C, H, W), with the scaling fitted to them.

        Raises
        ------
        ConfigError
            Networks or a likelihood that do not fit the rows.
        InputError
            Rows that the likelihood has no meaning for.
        """
        row_shape = tuple(int(size) for size in rows.shape[1:])
        refuse_rows(config.likelihood, config, rows)
        scaling = LIKELIHOODS[likelihood_name(config, row_shape)].scaling
        return cls(
            config,
            row_shape,
            log_prior_K=log_prior_K,
            auxiliary_dim=auxiliary_dim,
            preprocessing=Preprocessing.fit(rows, scaling, levels=config.levels),
        )

    @abstractmethod
    def look(self, x: Tensor) -> Look:
        """Look at scaled rows (B, ...), with one draw of the auxiliary variable from torch's global generator."""

    @abstractmethod
    def class_log_probabilities(self, x: Tensor) -> Tensor:
        """Give log q(y|x), (B, K), without noise: a row's depends on the row alone."""

    @abstractmethod
    def auxiliary_cost(self, look: Look, y: Tensor, z: Tensor) -> Tensor:
        """Give log q(a|x) - log p(a|...) at the drawn a, in nats, (..., B)."""

    @abstractmethod
    def style(self, rows: Tensor, y_BK: Tensor) -> Tensor:
        """Give what is left of rows as they come, once their class is known: the mean of q(z|x, y), (B, L)."""

    @abstractmethod
    def generate(self, z_BL: Tensor, y_BK: Tensor) -> Tensor:
        """Give E[x|y, z] in the units of the rows, float32 of shape (B, ...)."""

    def observe(self, rows: Tensor, augmentations: Sequence[str] = ()) -> Tensor:
        """Scale rows as they come, change them in passing, and draw binary ones where the model binarizes."""
        x: Tensor = self.preprocessing(rows)
        if augmentations:
            x = augment(x, augmentations).clamp(self.preprocessing.low, self.preprocessing.high)
        return torch.bernoulli(x) if self.config.binarize else x

    def labelled(self, x: Tensor, y_B: Tensor, *, kl_weight: float = 1.0) -> Terms:
        """Bound log p(x, y) of scaled rows x (B, ...) and their classes y (B,), int64; equation 6."""
        look = self.look(x)
        y_BK = functional.one_hot(y_B, self.n_classes).to(x.dtype)
        return Terms(self.joint_bound(look, x, y_BK, kl_weight=kl_weight), look.logits_BK.log_softmax(dim=1))

    def unlabelled(self, x: Tensor, *, kl_weight: float = 1.0) -> Terms:
        """Bound log p(x) of scaled rows x (B, ...): all classes in one pass; equation 7."""
        look = self.look(x)
        y_K1K = torch.eye(self.n_classes, device=x.device).unsqueeze(1)
        bound_KB = self.joint_bound(look, x, y_K1K, kl_weight=kl_weight)
        log_q_BK = look.logits_BK.log_softmax(dim=1)
        return Terms((log_q_BK.exp() * (bound_KB.T - log_q_BK)).sum(dim=1), log_q_BK)

    def joint_bound(self, look: Look, x: Tensor, y: Tensor, *, kl_weight: float = 1.0) -> Tensor:
        """Bound log p(x, y) with one draw of z for each row and class, (..., B), in nats.

        E[log p(x|y, z)] + log p(y) - KL(q(z|x, y) || p(z)), less what the auxiliary variable costs; the latter two are
        weighed with `kl_weight`.
        """
        q = self.latents(look.h_BF, y, look.a_BA)
        z = q.rsample()
        kl = kl_divergence(q, standard_normal(z)) + self.auxiliary_cost(look, y, z)
        log_likelihood = self.likelihood.log_prob(self.decode(z, y, look.a_BA), x).view(z.shape[:-1])
        return log_likelihood + y @ self.log_prior_K - kl_weight * kl

    def decode(self, z: Tensor, y: Tensor, a_BA: Tensor) -> Tensor:
        """Give the likelihood's parameters, (... * B, parameters, ...), class by class."""
        h = self.decoded(z, y, a_BA if self.decodes_auxiliary else a_BA[:, :0])
        return self.decoder(h.flatten(0, -2))  # type: ignore[no-any-return]


class M2(LabelledVAE):
    """p(y) p(z) p(x|y, z) with q(y|x) q(z|x, y): the style z knows nothing of the class.

    Kingma et al. 2014, arXiv:1406.5298, section 3.1 ("latent-feature discriminative" is M1, this is M2).
    """

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...], **settings: Any) -> None:
        super().__init__(config, row_shape, **settings)
        self.logits = nn.Linear(self.classifier.hidden_dim, self.n_classes)

    def look(self, x: Tensor) -> Look:
        """Look at scaled rows."""
        h_BF = self.encoder(x)
        return Look(self.logits(self.classifier(x)), h_BF, h_BF[:, :0], h_BF.new_zeros(()))

    def class_log_probabilities(self, x: Tensor) -> Tensor:
        """Give log q(y|x)."""
        return self.logits(self.classifier(x)).double().log_softmax(dim=1)  # type: ignore[no-any-return]

    def auxiliary_cost(self, look: Look, y: Tensor, z: Tensor) -> Tensor:
        """Give nothing."""
        return z.new_zeros(())

    def style(self, rows: Tensor, y_BK: Tensor) -> Tensor:
        """Give the mean of q(z|x, y)."""
        h_BF = self.encoder(self.preprocessing(rows))
        return self.latents.mean(h_BF, y_BK, h_BF[:, :0])

    def generate(self, z_BL: Tensor, y_BK: Tensor) -> Tensor:
        """Give E[x|y, z]."""
        return self.preprocessing.inverse(self.likelihood.mean(self.decode(z_BL, y_BK, z_BL[:, :0])))


class M1M2(M2):
    """M2 over the posterior means of a VAE that was trained before (M1), and is not changed.

    Means, where the paper draws from the posterior: latents that M1 leaves unused are zero then, and not noise that
    M2 would have to learn to pass over.

    Parameters
    ----------
    config : ModelConfig
        Of M2, whose rows are M1's latents and whose likelihood is therefore Gaussian.
    base : VAE
        M1.
    log_prior_K : Tensor
        log p(y).

    References
    ----------
    Kingma et al. 2014, arXiv:1406.5298, section 3.1, "stacked generative semi-supervised model".
    """

    def __init__(self, config: ModelConfig, base: VAE, *, log_prior_K: Tensor) -> None:
        config = replace(config, network="mlp", likelihood="gaussian", binarize=False)
        super().__init__(config, (base.config.latent_dim,), log_prior_K=log_prior_K)
        self.base = base.requires_grad_(False)

    def observe(self, rows: Tensor, augmentations: Sequence[str] = ()) -> Tensor:
        """Give M1's posterior means (B, L1) for rows as they come."""
        scaling = self.base.preprocessing
        with torch.no_grad():
            x: Tensor = scaling(rows)
            if augmentations:
                x = augment(x, augmentations).clamp(scaling.low, scaling.high)
            return self.base.posterior.statistics(self.base.hidden(x))[0]

    def style(self, rows: Tensor, y_BK: Tensor) -> Tensor:
        """Give the mean of M2's q(z|x, y)."""
        return super().style(self.observe(rows), y_BK)

    def generate(self, z_BL: Tensor, y_BK: Tensor) -> Tensor:
        """Give M1's decoding of M2's."""
        return self.base.reconstruct(super().generate(z_BL, y_BK))


class ADGM(LabelledVAE):
    """M2 with an auxiliary variable a, which makes q(z, y|x), summed over a, richer than a Gaussian.

    p(y) p(z) p(x|y, z) p(a|x, y, z) with q(a|x) q(y|a, x) q(z|a, x, y); the model of rows is that of M2.

    References
    ----------
    Maaløe, Sønderby, Sønderby and Winther 2016, Auxiliary Deep Generative Models, arXiv:1602.05473, section 3.
    """

    def __init__(self, config: ModelConfig, row_shape: tuple[int, ...], *, auxiliary_dim: int, **settings: Any) -> None:
        super().__init__(config, row_shape, auxiliary_dim=auxiliary_dim, **settings)
        encoded = self.encoder.hidden_dim
        self.auxiliary_posterior = DiagonalGaussian(replace(config, latent_dim=auxiliary_dim), encoded)
        # SDGM's p(a|y, z) does not see the row.
        seen = 0 if self.decodes_auxiliary else encoded
        self.auxiliary_prior = ConditionalGaussian(config, (seen, self.n_classes, config.latent_dim), auxiliary_dim)
        self.joined = JoinedLayer(config, (self.classifier.hidden_dim, auxiliary_dim))
        self.logits = nn.Linear(self.joined.width, self.n_classes)

    def look(self, x: Tensor) -> Look:
        """Look at scaled rows, through one draw of a."""
        h_BF = self.encoder(x)
        q = self.auxiliary_posterior(h_BF)
        a_BA = q.rsample()
        logits_BK = self.logits(self.joined(self.classifier(x), a_BA))
        return Look(logits_BK, h_BF, a_BA, q.log_prob(a_BA))

    def class_log_probabilities(self, x: Tensor) -> Tensor:
        """Give log E_q(a|x)[q(y|a, x)] over draws of a whose noise all rows share."""
        generator = torch.Generator().manual_seed(0)
        noise_S1A = torch.randn((_PREDICTION_SAMPLES, 1, self.auxiliary_dim), generator=generator).to(x.device)
        a_SBA, _ = self.auxiliary_posterior.draw(self.encoder(x), noise_S1A)
        log_q_SBK = self.logits(self.joined(self.classifier(x), a_SBA)).double().log_softmax(dim=2)
        return log_q_SBK.logsumexp(dim=0) - math.log(_PREDICTION_SAMPLES)  # type: ignore[no-any-return]

    def auxiliary_cost(self, look: Look, y: Tensor, z: Tensor) -> Tensor:
        """Give log q(a|x) - log p(a|x, y, z)."""
        return look.log_q_a_B - self._auxiliary_prior(look.h_BF, y, z).log_prob(look.a_BA)

    def style(self, rows: Tensor, y_BK: Tensor) -> Tensor:
        """Give the mean of q(z|a, x, y) at the mean of q(a|x)."""
        h_BF = self.encoder(self.preprocessing(rows))
        return self.latents.mean(h_BF, y_BK, self.auxiliary_posterior.statistics(h_BF)[0])

    def generate(self, z_BL: Tensor, y_BK: Tensor) -> Tensor:
        """Give E[x|y, z]; for SDGM at the mean of p(a|y, z)."""
        nothing = z_BL[:, :0]
        a_BA = self.auxiliary_prior.mean(nothing, y_BK, z_BL) if self.decodes_auxiliary else nothing
        return self.preprocessing.inverse(self.likelihood.mean(self.decode(z_BL, y_BK, a_BA)))

    def _auxiliary_prior(self, h_BF: Tensor, y: Tensor, z: Tensor) -> Distribution:
        return self.auxiliary_prior(h_BF[:, :0] if self.decodes_auxiliary else h_BF, y, z)  # type: ignore[no-any-return]


class SDGM(ADGM):
    """Two layers of latents, p(y) p(z) p(a|y, z) p(x|a, y, z), with ADGM's q; skip connections all over.

    Maaløe et al. 2016, arXiv:1602.05473, section 3.3 ("skip deep generative model").
    """

    decodes_auxiliary = True


class JoinedLayer(nn.Module):
    """One hidden layer over several inputs: a linear map of each, added up, normalised, activated.

    The same as a layer over their concatenation, but inputs of fewer axes are mapped before they are repeated.

    Parameters
    ----------
    config : ModelConfig
    widths : sequence of int
        Of the inputs; those of width 0 are left out.
    one_hot : int, optional
        Which of the inputs is a class.
    """

    def __init__(self, config: ModelConfig, widths: Sequence[int], *, one_hot: int | None = None) -> None:
        super().__init__()
        self.width = config.hidden_dims[-1]
        self.linear = nn.Linear(sum(widths), self.width)
        if one_hot is not None:
            # A single 1 beside many values of variance one would hardly be heard, and what the class says be learned by
            # the latents first: it starts as loud as all of them.
            nn.init.uniform_(self.linear.weight.detach().split(list(widths), dim=1)[one_hot], -1, 1)
        self.widths = list(widths)
        self.after = hidden_layer(config, self.width)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Join inputs (..., width) that broadcast."""
        weights = self.linear.weight.split(self.widths, dim=1)
        mapped = [functional.linear(*pair) for pair in zip(inputs, weights, strict=True) if pair[0].shape[-1]]
        return self.after(sum(mapped[1:], mapped[0] + self.linear.bias))  # type: ignore[no-any-return]


class ConditionalGaussian(nn.Module):
    """A diagonal Gaussian whose mean and variance come from several inputs, through one hidden layer.

    Parameters
    ----------
    config : ModelConfig
    widths : sequence of int
        Of the inputs, of which the second is a class.
    dim : int
        Of the Gaussian.
    """

    def __init__(self, config: ModelConfig, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.joined = JoinedLayer(config, widths, one_hot=_CLASS)
        self.gaussian = DiagonalGaussian(replace(config, latent_dim=dim), self.joined.width)

    def forward(self, *inputs: Tensor) -> Distribution:
        """Give the distribution with the batch shape that the inputs broadcast to."""
        return self.gaussian(self.joined(*inputs))  # type: ignore[no-any-return]

    def mean(self, *inputs: Tensor) -> Tensor:
        """Give its mean."""
        return self.gaussian.statistics(self.joined(*inputs))[0]


def standard_normal(like: Tensor) -> Distribution:
    """Give N(0, I) over the last axis."""
    zeros = torch.zeros_like(like)
    return Independent(Normal(zeros, torch.ones_like(like), validate_args=False), 1, validate_args=False)


LABELLED_MODELS: dict[str, type[LabelledVAE]] = {"m2": M2, "m1m2": M1M2, "adgm": ADGM, "sdgm": SDGM}
