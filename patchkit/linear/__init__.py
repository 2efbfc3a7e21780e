"""Linear attention in a softmax-trained model: feature maps, the hybrid of a softmax window and a linear memory, and its training."""
