"""`fused-resnet train`: data, training loop, checkpoints, logs; on one process or under torchrun."""
