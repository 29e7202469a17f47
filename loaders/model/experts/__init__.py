"""The experts of a mixture: fused parameters, what they are made from, and the layers that they stand for."""
