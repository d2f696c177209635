"""Metrics: pure functions of tensors, each usable alone, with float64 inside.

Distances between two sets of features compare samples with held-out data; what a feature is,
`features` says. No metric tells the whole truth: the class means of the data score a class
accuracy of 1, copies of the training images score a Fréchet distance of 0. So they are meant to
be read together, next to what the training data themselves score against the held-out data.
"""

from anystep.metrics.classifier import Classifier, train_classifier
from anystep.metrics.conditional import class_accuracy, variance_ratio, within_class_variance
from anystep.metrics.features import Features, PixelFeatures, TorchScriptFeatures
from anystep.metrics.frechet import frechet_distance, frechet_from_moments
from anystep.metrics.kernel import kernel_distance
from anystep.metrics.memorisation import Memorisation, memorisation
from anystep.metrics.precision_recall import PrecisionRecall, precision_recall
from anystep.metrics.sliced import sliced_wasserstein

__all__ = [
    "Classifier",
    "Features",
    "Memorisation",
    "PixelFeatures",
    "PrecisionRecall",
    "TorchScriptFeatures",
    "class_accuracy",
    "frechet_distance",
    "frechet_from_moments",
    "kernel_distance",
    "memorisation",
    "precision_recall",
    "sliced_wasserstein",
    "train_classifier",
    "variance_ratio",
    "within_class_variance",
]
