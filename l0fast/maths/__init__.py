"""The maths of every op, in plain PyTorch: the reference that the kernels are held to."""
