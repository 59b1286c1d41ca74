"""Ways to run a frozen network, of which each image keeps some blocks, on the device that it is on."""
