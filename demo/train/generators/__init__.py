"""Seeded generators of the four written classes; one module per class, one function `document(rng, key)`."""
