"""What inductor is told: how its C++ is compiled, and what its graphs and their kernels look like before."""
