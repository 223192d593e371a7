"""Which type every tensor of a file gets, what the file then weighs, and the best types for a given size."""
