"""`python -m megatron_hybrid.tools.tune_kernels --help`."""
