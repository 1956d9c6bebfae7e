"""The kernels of a decoder: `interface` says what they are, the other modules are one device's each."""
