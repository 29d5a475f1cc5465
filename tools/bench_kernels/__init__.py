"""`python -m megatron_hybrid.tools.bench_kernels --help`."""
