"""Which: from the activations of a layer to clusters of its features."""
