"""NVFP4 and NVFP4A16 checkpoints: written straight from safetensors, read back and checked by other means."""
