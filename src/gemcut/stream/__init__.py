"""Run a checkpoint's own modules layer by layer: what observe, heal and kld share."""
