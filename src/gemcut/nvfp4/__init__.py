"""NVFP4 checkpoints on disk: names and forms of their tensors, how they read back, and their plain tensors."""
