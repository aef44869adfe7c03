"""Weights from a classifier of labelled against unlabelled images (Elkan & Noto, 2008)."""

import torch
import torch.nn.functional as F

from weighmatch.semisup.parts.networks import Classifier
from weighmatch.semisup.weightings.fitted import ImageWeighting


class PositiveUnlabelled(ImageWeighting):
    """A classifier of labelled against unlabelled images (Elkan & Noto, 2008).

    Labelled images are positives, the whole pool negatives, both strongly augmented so that the
    few labelled ones are not learned by heart. The odds rank unlabelled images by how much they
    look like labelled ones. It is the control for learned weights: online it uses neither the
    trained classifier nor a hypergradient. Stages and rounds rank by a head on the classifier's
    features instead (`weightings.head`), without a hypergradient there too.
    """

    name = "positive_unlabelled"

    def update(self, classifier: Classifier) -> dict[str, float]:
        config, streams = self.context.training.weighting, self.context.streams
        labelled, pool = self.context.labelled, self.context.pool
        half = config.fit_batch // 2 or 1
        total = 0.0
        for _ in range(config.fit_steps):
            noise = streams["augmentation for the confidence network"]
            positives = labelled[streams.draw(len(labelled), half, "positives")]
            negatives = pool[streams.draw(len(pool), half, "negatives")]
            images = self.context.views.strong(torch.cat([positives, negatives]), noise)
            targets = torch.arange(2 * half, device=images.device).lt(half).float()
            loss = F.binary_cross_entropy_with_logits(self.network(images), targets)
            self.descend(loss)
            total += float(loss.detach())
        self.score_pool()
        return {"confidence_loss": total / config.fit_steps}
