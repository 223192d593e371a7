"""GGUF files out of a checkpoint: which types, how large, written how."""
