"""NT-Xent in Triton kernels, for NVIDIA GPUs."""
