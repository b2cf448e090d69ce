"""From the features of an image to its answer, and from answers to figures."""
