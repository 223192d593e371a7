"""Cut a large model down to the machine you have, and prove what it cost."""

__version__ = "0.1.0"
