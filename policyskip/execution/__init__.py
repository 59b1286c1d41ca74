"""Executing frozen networks in kernels of our own on a GPU."""
