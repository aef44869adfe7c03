"""One free weight an image of the pool (Ren et al., 2018; Ren, Yeh & Schwing, 2020)."""

import torch
from torch import Tensor

from weighmatch.semisup.parts.losses import mean_one
from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.weightings.base import Context, Features, Weighting, otsu_cut
from weighmatch.semisup.weightings.meter import InfluenceMeter


class FreeWeights(Weighting):
    """One free weight an image of the pool (Ren et al., 2018; Ren, Yeh & Schwing, 2020).

    Influence is measured as for `learned`, and an image's running mean is its logit: nothing is
    fitted, so nothing carries over from one image to another. Ren et al. (2018) take one step
    from weights of zero anew at each batch; Ren, Yeh & Schwing (2020) keep a weight an image, as
    here. Images without a measurement, unseen ones above all, score 1 (no opinion): on held-out
    images the scores rank nothing.
    """

    name = "free"
    lowers_outer_loss = True
    transductive = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.meter = InfluenceMeter(context, self.weights)

    def criterion(self, images: Tensor, features: Features, logits: Tensor) -> Tensor:
        return torch.ones(len(images), device=images.device)

    def update(self, classifier: Classifier) -> dict[str, float]:
        assert self.meter is not None
        log = self.meter.measure(classifier)
        known = self.meter.measured.known
        self.pool_scores = torch.where(known, self.meter.measured.mean().sigmoid(), 1.0)
        if self.context.training.weighting.weights == "hard":
            self.cut = otsu_cut(self.pool_scores[known])
        return {**log, "weight_spread": float(mean_one(self.pool_scores).std(correction=0))}
