"""Code that the Triton backends of several operators share: launches, launch configurations, and common kernels."""
