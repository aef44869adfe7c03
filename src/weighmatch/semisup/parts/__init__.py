"""What a training step is made of: augmentation, losses, networks, random streams, image store."""
