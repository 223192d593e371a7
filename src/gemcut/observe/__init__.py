"""One streamed pass over a corpus keeps sums, not activations: what score, plan, heal and imatrix are made from."""
