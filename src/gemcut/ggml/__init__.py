"""llama.cpp as a library: its types, its quantisers, its models. The only door to the pinned wheel."""
