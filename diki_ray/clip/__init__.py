"""The frozen CLIP and the place beside each of its attentions."""
