"""A small classifier of the ten MNIST digits, for FID and IS where no Inception weights can be had.

Numbers from it must not be set beside published FID or IS, which use other networks. How it was trained:
`scripts/make_assets.py`; its test accuracy: `fastunlearn/assets/README.md`.
"""

from __future__ import annotations

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import assets

ASSET = "mnist_classifier.safetensors"


class MnistClassifier(nn.Module):
    """Three convolutions and two linear layers; batch normalisation is folded in.

    0.1 M parameters, 2 M multiply-adds an image.
    """

    num_classes = 10
    num_features = 128

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, stride=2, padding=2)  # 28 -> 14
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)  # 14, pooled to 7
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)  # 7, pooled to 3
        self.hidden = nn.Linear(64 * 3 * 3, self.num_features)
        self.output = nn.Linear(self.num_features, self.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, `[B, 128]`, of images `[B, 1, 28, 28]` in [-1, 1]."""
        if x.ndim != 4 or x.shape[1:] != (1, 28, 28):
            raise ValueError(f"x: expected shape [B, 1, 28, 28], got {list(x.shape)}")
        # Black becomes 0, so that zero padding continues the background.
        x = (x + 1) / 2
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, 10]` of images `[B, 1, 28, 28]` in [-1, 1]."""
        return self.output(self.features(x))


def load_mnist_classifier() -> MnistClassifier:
    """The shipped classifier, float32, on the CPU, in eval mode, without gradients."""
    classifier = MnistClassifier()
    classifier.load_state_dict(load_file(assets.path(ASSET)))
    return classifier.eval().requires_grad_(False)
