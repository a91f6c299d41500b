"""What the Triton backends of several operators share: launching, launch configurations, and the common kernels."""
