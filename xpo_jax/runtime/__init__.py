"""JAX and the operating system: devices, processes, compilation, signals.

Read sharding and distributed, then compilation and interruption; background, cluster_detection and profiling stand
alone.
"""
