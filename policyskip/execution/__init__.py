"""How a frozen network is executed: by Triton kernels on a GPU, by gathering images, or by computing everything."""
