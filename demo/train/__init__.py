"""Text, tokenizer, training loop and export of the demo checkpoints."""
