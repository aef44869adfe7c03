"""The learned weighting: a Confidence Network trained by implicit meta-learning.

One update, at classifier parameters θ (docs/method.md, From hypergradient to weights):

1. g = ∇_θ L_outer on strongly augmented labelled images.
2. v ≈ (C + δI)⁻¹ g, C the Gauss-Newton matrix of the weighted FixMatch loss.
3. s_i = ⟨∇_θ m_i CE_i, v⟩ of unlabelled images, by one forward-mode pass: what one more unit of
   weight on image i takes off the outer loss.
4. φ descends −mean_i s_i w_φ(u_i), whose gradient is the hypergradient; here with s_i as a
   direction, averaged over updates, and a pull of the weights towards 1.

The meter does the first three.
"""

import torch

from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.weightings.base import Context
from weighmatch.semisup.weightings.fitted import ImageWeighting
from weighmatch.semisup.weightings.meter import InfluenceMeter


class Learned(ImageWeighting):
    """Weights that lower the loss on labelled images.

    Stages and rounds rank by a head on the classifier's features instead (`weightings.head`), and
    the hypergradient says how much of that ranking to train on (`weightings.share`).
    """

    name = "learned"
    lowers_outer_loss = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.meter = InfluenceMeter(context, self.weights)

    def update(self, classifier: Classifier) -> dict[str, float]:
        assert self.meter is not None
        log = self.meter.measure(classifier)
        spread = self._fit(self.meter)
        self.score_pool()
        return {**log, "weight_spread": spread}

    def _fit(self, meter: InfluenceMeter) -> float:
        """Adam steps on φ; returns the spread of the weights."""
        known = meter.measured.known.nonzero().squeeze(1)
        if len(known) == 0:
            return 0.0
        config, streams = self.context.training.weighting, self.context.streams
        mean = meter.measured.mean()
        spread = 0.0
        for _ in range(config.fit_steps):
            drawn = known[streams.draw(len(known), config.fit_batch, "fit batch").to(known.device)]
            noise = streams["augmentation for the confidence network"]
            weak = self.context.views.weak(self.context.pool[drawn], noise)
            weights = mean_one(torch.sigmoid(self.network(weak)))
            pull = config.proximity / 2 * (weights - 1).square().mean()
            self.descend(-(mean[drawn] * weights).mean() + pull)
            spread = float(weights.detach().std())
        return spread
